"""The same as `python -m r1jax.launch --config=reward_safety`, from a checkout: python launch/reward_safety.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=reward_safety")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
