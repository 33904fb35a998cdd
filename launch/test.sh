#!/usr/bin/env bash
# Install the test extras into .venv, then ruff and the tests.
# Usage: bash launch/test.sh [--parity] [--slow] [arguments of pytest]      (VENV and PYTHON choose the environment)
#   --parity   also installs torch, transformers, TRL and Tunix, which the parity tests compare with
#   --slow     also runs the tests marked slow
# Two files run at a time; one after the other with --slow, -s (their output is shown) or a number of your own: -n 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/venv.sh
extras=test,jetstream-light
name=test
marks=(-m "not slow")
rest=()
workers=(-n 2 --dist loadfile)
for argument in "$@"; do
  case "$argument" in
    --parity) extras=$extras,parity name=parity ;;
    --slow) marks=() workers=() ;;
    -s | -n*) workers=() rest+=("$argument") ;;
    *) rest+=("$argument") ;;
  esac
done
install "$name" "$extras"
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
exec "$VENV/bin/python" -m pytest "${marks[@]}" "${workers[@]}" "${rest[@]}"
