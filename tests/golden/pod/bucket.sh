# fetch the results
gcloud storage rsync --recursive gs://b/runs here
