#!/usr/bin/env bash
# Install into .venv and run the tiny recipe; it ends with a table and a report in runs/.
# Usage: bash launch/quickstart.sh [flags of r1jax.launch]      (VENV and PYTHON choose the environment)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh
install quickstart jetstream-light
exec "$VENV/bin/python" -m r1jax.launch --config=quickstart "$@"
