# Sourced by quickstart.sh, test.sh and tpu_worker.sh, from the root of a checkout: makes the virtual environment and installs into it.
#
# VENV (default .venv) is its folder; PYTHON (default python3, 3.11 or newer) makes it.
# install NAME EXTRAS   installs the checkout with EXTRAS and JetStream without tensorflow, once per state of setup.py; with
#                       the extra parity also Tunix, whose losses need none of its dependencies.

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

make_venv() {
  if [ -x "$VENV/bin/python" ]; then return; fi
  if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $PYTHON is missing or older than 3.11; set PYTHON to a newer one" >&2
    exit 2
  fi
  echo "making the virtual environment $VENV"
  "$PYTHON" -m venv "$VENV"
}

install() {
  local stamp="$VENV/.r1jax-$1" wanted
  make_venv
  wanted="$PWD $2 $(cat setup.py pyproject.toml | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  echo "installing r1jax[$2] into $VENV"
  "$VENV/bin/python" -m pip install --quiet --editable ".[$2]"
  "$VENV/bin/python" -m pip install --quiet --no-deps google-jetstream==0.2.2
  case "$2" in *parity*) "$VENV/bin/python" -m pip install --quiet --no-deps google-tunix==0.1.7 ;; esac
  echo "$wanted" >"$stamp"
}
