# create the queued resource, and wait until it is ACTIVE and every worker READY
gcloud compute tpus queued-resources create r1 --node-count=2 --node-prefix=r1 --accelerator-type=v5p-16 --zone=us-east5-a --quiet --runtime-version=v2-alpha-tpuv5 --labels=made-by=r1jax --async
gcloud compute tpus queued-resources describe r1 --zone=us-east5-a --quiet --format=json
gcloud compute tpus tpu-vm describe r1-0 --zone=us-east5-a --quiet --format=json
gcloud compute tpus tpu-vm describe r1-1 --zone=us-east5-a --quiet --format=json

# copy the tracked files of this checkout to every worker, and install them
gcloud compute tpus tpu-vm scp r1jax_checkout.tar.gz r1-0:r1jax_checkout.tar.gz --worker=all --zone=us-east5-a --quiet --tunnel-through-iap
gcloud compute tpus tpu-vm ssh r1-0 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=mkdir -p r1jax && cd r1jax && touch .pod_files && xargs -d '"'"'\n'"'"' rm -f -- < .pod_files && tar -xvzf ../r1jax_checkout.tar.gz > .pod_files && echo R1JAX $(hostname) unpacked'
gcloud compute tpus tpu-vm ssh r1-0 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=cd r1jax && bash launch/tpu_worker.sh'
gcloud compute tpus tpu-vm scp r1jax_checkout.tar.gz r1-1:r1jax_checkout.tar.gz --worker=all --zone=us-east5-a --quiet --tunnel-through-iap
gcloud compute tpus tpu-vm ssh r1-1 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=mkdir -p r1jax && cd r1jax && touch .pod_files && xargs -d '"'"'\n'"'"' rm -f -- < .pod_files && tar -xvzf ../r1jax_checkout.tar.gz > .pod_files && echo R1JAX $(hostname) unpacked'
gcloud compute tpus tpu-vm ssh r1-1 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=cd r1jax && bash launch/tpu_worker.sh'

# start the run on every worker, and follow worker 0's log until it ends
gcloud compute tpus tpu-vm ssh r1-0 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=cd r1jax && .venv/bin/python -m r1jax.pod.worker start 3da9a7ca50d2 120 -- --config=r1_zero:v3_671b --config.mesh.fsdp=1 --config.mesh.expert=8 --workdir=/mnt/runs --coordinator=auto'
gcloud compute tpus tpu-vm ssh r1-1 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=cd r1jax && .venv/bin/python -m r1jax.pod.worker start 3da9a7ca50d2 120 -- --config=r1_zero:v3_671b --config.mesh.fsdp=1 --config.mesh.expert=8 --workdir=/mnt/runs --coordinator=auto'
gcloud compute tpus tpu-vm ssh r1-0 --worker=0 --zone=us-east5-a --quiet --tunnel-through-iap '--command=cd r1jax && .venv/bin/python -m r1jax.pod.worker follow 1'
gcloud compute tpus tpu-vm ssh r1-0 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=(cd r1jax && .venv/bin/python -m r1jax.pod.worker status) || (mkdir -p r1jax_run && flock -n -s r1jax_run/lock echo R1JAX $(hostname) none)'
gcloud compute tpus tpu-vm ssh r1-1 --worker=all --zone=us-east5-a --quiet --tunnel-through-iap '--command=(cd r1jax && .venv/bin/python -m r1jax.pod.worker status) || (mkdir -p r1jax_run && flock -n -s r1jax_run/lock echo R1JAX $(hostname) none)'

# fetch the results
gcloud compute tpus tpu-vm scp --recurse r1-0:/mnt/runs r1_results --worker=0 --zone=us-east5-a --quiet --tunnel-through-iap
