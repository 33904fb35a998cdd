"""A run on a TPU pod, from a checkout: python launch/tpu_pod.py --name=N --zone=Z --topology=v5p:4x4x8 -- --config=NAME.

Creates the pod, copies and installs this checkout, runs, follows, restarts after preemptions, fetches, deletes.
docs/pod.md is the page about it; --dry_run prints each command, --gke a manifest for GKE.
"""

import pathlib
import sys

if __name__ == "__main__":
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])
    from r1jax.pod import launcher

    sys.exit(launcher.main(sys.argv[1:]))
