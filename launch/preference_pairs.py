"""The same as `python -m r1jax.launch --config=preference_pairs`, from a checkout: python launch/preference_pairs.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=preference_pairs")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
