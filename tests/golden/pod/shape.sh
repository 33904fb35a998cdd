# create the queued resource, and wait until it is ACTIVE and every worker READY
gcloud compute tpus queued-resources create r1 --node-id=r1 --type=v5p --topology=4x4x12 --zone=us-east5-a --quiet --runtime-version=v2-alpha-tpuv5 --labels=made-by=r1jax --reserved --network=r1 --async
gcloud compute tpus queued-resources describe r1 --zone=us-east5-a --quiet --format=json
gcloud compute tpus tpu-vm describe r1 --zone=us-east5-a --quiet --format=json
