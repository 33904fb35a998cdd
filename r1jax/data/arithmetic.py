"""Sums of two small numbers as JSONL: a task that a 135M model solves now and then, so that RL on it has a signal.

Usage: python -m r1jax.data.arithmetic OUT.jsonl
"""

import sys
from pathlib import Path

from r1jax.data import jsonl

LARGEST = 20  # of the two numbers


def rows(largest: int = LARGEST) -> list[dict]:
    """Returns every sum a + b with 1 <= a, b <= largest as {id, task, prompt, answer}."""
    return [
        {"id": f"sum-{a}-{b}", "task": "math", "prompt": f"What is {a} + {b}?", "answer": str(a + b)}
        for a in range(1, largest + 1)
        for b in range(1, largest + 1)
    ]


def main(arguments: list[str]) -> int:
    """Writes the rows to the file named on the command line and returns the exit code."""
    if len(arguments) != 1:
        print(__doc__.strip().splitlines()[-1], file=sys.stderr)
        return 2
    jsonl.write(Path(arguments[0]), rows())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
