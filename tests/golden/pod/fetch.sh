# fetch the results
gcloud compute tpus tpu-vm scp --recurse 'r1:my runs' here --worker=0 --zone=us-east5-a --quiet
