#!/usr/bin/env bash
# Run on every worker of a pod by launch/tpu_pod.py: installs the checkout into .venv, with a newer Python where needed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usable() { "$1" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ] && ! usable "$PYTHON"; then # the images of TPU VMs come with Python 3.10
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON=$(python3 -m uv python find 3.12)
fi
. launch/venv.sh
install tpu tpu,data,wandb,jetstream-light
echo "R1JAX $(hostname) installed"
