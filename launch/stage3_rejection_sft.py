"""The same as `python -m r1jax.launch --config=stage3_rejection_sft`, from a checkout: python launch/stage3_rejection_sft.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=stage3_rejection_sft")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
