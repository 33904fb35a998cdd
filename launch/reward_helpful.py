"""The same as `python -m r1jax.launch --config=reward_helpful`, from a checkout: python launch/reward_helpful.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=reward_helpful")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
