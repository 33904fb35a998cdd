"""The same as `python -m r1jax.launch --config=build_tests`, from a checkout: python launch/build_tests.py [--flags]."""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    sys.argv.insert(1, "--config=build_tests")
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
