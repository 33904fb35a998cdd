"""Examples of reward models: preference pairs and labelled responses, read from JSON Lines and split by prompt."""

import os
from collections.abc import Mapping, Sequence

from r1jax.data import jsonl
from r1jax.data.problems import split_by

FIELDS = {
    "helpful": ("id", "source", "prompt", "chosen", "rejected"),
    "safety": ("id", "source", "prompt", "response", "safe"),
}


def read(path: str | os.PathLike, kind: str) -> list[dict]:
    """Returns the rows of a file with the FIELDS of a kind; a row without id gets its number.

    helpful: prompt, chosen, rejected. safety: prompt, response and `safe` or `unsafe`, true or false; a row without a
    response is itself what is judged: its prompt becomes the response to an empty one. Raises ValueError, naming file and
    row, for a bad one.
    """
    required = ("prompt", "chosen", "rejected") if kind == "helpful" else ("prompt",)
    rows, seen = [], {}
    for number, row in enumerate(jsonl.read(path, required=required), 1):
        place = f"{path}, row {number}"
        found = {"id": str(row.get("id") or f"row-{number}"), "source": str(row.get("source") or "")}
        found |= _pair(row, place) if kind == "helpful" else _labelled(row, place)
        if seen.setdefault(found["id"], number) != number:
            raise ValueError(f"{place}: id {found['id']!r} is also the id of row {seen[found['id']]}; give it its own")
        rows.append(found)
    return rows


def _pair(row: Mapping, place: str) -> dict:
    if not row["prompt"].strip():
        raise ValueError(f"{place}: 'prompt' is empty, needs text")
    if row["chosen"] == row["rejected"]:
        raise ValueError(f"{place}: 'chosen' and 'rejected' are the same text; leave the row out")
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def _labelled(row: Mapping, place: str) -> dict:
    given = [name for name in ("safe", "unsafe") if row.get(name) is not None]
    if len(given) != 1 or not isinstance(row[given[0]], bool):
        told = ", ".join(f"{name}={row[name]!r}" for name in given) or "no label"
        raise ValueError(f"{place}: {told}; needs one of 'safe' and 'unsafe', true or false")
    prompt, response = (row["prompt"], row["response"]) if row.get("response") is not None else ("", row["prompt"])
    if not isinstance(response, str) or not (prompt + response).strip():
        raise ValueError(f"{place}: 'response' is {response!r}, needs text")
    return {"prompt": prompt, "response": response, "safe": row[given[0]] == (given[0] == "safe")}


def split(rows: Sequence[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Returns (training rows, held-out rows), order kept: by hash of the prompt, so that no prompt is on both sides.

    Texts judged without a prompt go by their own. ValueError when the fraction is not in [0, 1].
    """
    return split_by(rows, lambda row: row["prompt"] or row["response"], fraction)
