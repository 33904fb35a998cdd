# create the queued resource, and wait until it is ACTIVE and every worker READY
gcloud compute tpus queued-resources create r1 --node-id=r1 --accelerator-type=v5p-16 --zone=us-east5-a --project=my-project --quiet --runtime-version=v2-alpha-tpuv5 --labels=made-by=r1jax --spot --async
gcloud compute tpus queued-resources describe r1 --zone=us-east5-a --project=my-project --quiet --format=json
gcloud compute tpus tpu-vm describe r1 --zone=us-east5-a --project=my-project --quiet --format=json

# copy the tracked files of this checkout to every worker, and install them
gcloud compute tpus tpu-vm scp r1jax_checkout.tar.gz r1:r1jax_checkout.tar.gz --worker=all --zone=us-east5-a --project=my-project --quiet
gcloud compute tpus tpu-vm ssh r1 --worker=all --zone=us-east5-a --project=my-project --quiet '--command=mkdir -p r1jax && cd r1jax && touch .pod_files && xargs -d '"'"'\n'"'"' rm -f -- < .pod_files && tar -xvzf ../r1jax_checkout.tar.gz > .pod_files && echo R1JAX $(hostname) unpacked'
gcloud compute tpus tpu-vm ssh r1 --worker=all --zone=us-east5-a --project=my-project --quiet '--command=cd r1jax && (sudo mount -t nfs 10.0.0.2:/r1 /mnt) && bash launch/tpu_worker.sh'

# start the run on every worker, and follow worker 0's log until it ends
gcloud compute tpus tpu-vm ssh r1 --worker=all --zone=us-east5-a --project=my-project --quiet '--command=cd r1jax && .venv/bin/python -m r1jax.pod.worker start 6043230b9751 120 -- --config=r1_zero --config.mesh.fsdp=8 --workdir=/mnt/runs '"'"'--config.data.instruction=It'"'"'"'"'"'"'"'"'s "so": $HOME $$ $(HOME) `ls` \ * 😀'"'"' --coordinator=auto'
gcloud compute tpus tpu-vm ssh r1 --worker=0 --zone=us-east5-a --project=my-project --quiet '--command=cd r1jax && .venv/bin/python -m r1jax.pod.worker follow 1'
gcloud compute tpus tpu-vm ssh r1 --worker=all --zone=us-east5-a --project=my-project --quiet '--command=(cd r1jax && .venv/bin/python -m r1jax.pod.worker status) || (mkdir -p r1jax_run && flock -n -s r1jax_run/lock echo R1JAX $(hostname) none)'

# fetch the results
gcloud compute tpus tpu-vm scp --recurse r1:/mnt/runs r1_results --worker=0 --zone=us-east5-a --project=my-project --quiet

# delete the pod
gcloud compute tpus queued-resources delete r1 --zone=us-east5-a --project=my-project --quiet --force
