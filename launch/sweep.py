"""A sweep from a checkout: python launch/sweep.py --config=NAME[:PRESET] --sweep=FIELD=v1,v2 [--sweep=...] [--flags].

Points run one after another. In a job array, give each job its own point: --sweep_index=$SLURM_ARRAY_TASK_ID.
A last call without --sweep_index prints the table of all points and runs those that failed.
"""

import pathlib
import runpy
import sys

if __name__ == "__main__":
    if not any(argument.lstrip("-").split("=")[0] in ("sweep", "help", "h") for argument in sys.argv[1:]):
        print("error: launch/sweep.py needs --sweep=FIELD=v1,v2 (and --config=NAME)", file=sys.stderr)
        sys.exit(2)
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    runpy.run_module("r1jax.launch", run_name="__main__", alter_sys=True)
