"""The same as `python -m r1jax.launch --config=export_hf`, from a checkout: python launch/export_hf.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=export_hf")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
