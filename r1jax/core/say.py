"""Messages of a run on stderr, printed by the one process that writes the run's files."""

import sys

from r1jax.core import hosts, remote


def say(*lines: str) -> None:
    """Prints lines on stderr in the writer process and nothing in the others."""
    if hosts.is_writer():
        for line in lines:
            print(remote.shown(line), file=sys.stderr, flush=True)
