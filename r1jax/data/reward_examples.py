"""Examples of reward models: preference pairs and labelled responses, read from files and split by prompt."""

from collections.abc import Mapping, Sequence

from r1jax.data import dialects, files
from r1jax.data.problems import split_by

FIELDS = {
    "helpful": ("id", "source", "prompt", "chosen", "rejected"),
    "safety": ("id", "source", "prompt", "response", "safe"),
}


def read(path: str, kind: str, columns: Sequence[str] = ()) -> tuple[list[dict], list[str]]:
    """Returns (rows with the FIELDS of a kind, remarks on how the file was read); `columns` are as in `data.files`.

    helpful: prompt, chosen, rejected. safety: prompt, response and `safe` or `unsafe`, true or false; a row without a
    response is itself what is judged: its prompt becomes the response to an empty one. Raises ValueError, naming file
    and line, for a bad one.
    """
    table = files.read(path, columns)
    rows, seen = [], {}
    for row in table.rows:
        if isinstance(row.fields["prompt"], list):
            raise ValueError(f"{row.place}: 'prompt' has several turns; write them as one text, as in 'Human: ...'")
        example = {"id": row.fields["id"], "source": row.fields.get("source", "")}
        example |= _pair(row.fields, row.place) if kind == "helpful" else _labelled(row.fields, row.place)
        if seen.setdefault(example["id"], row.place) != row.place:
            raise ValueError(
                f"{row.place}: id {example['id']!r} is also the id of {seen[example['id']]}; give it its own"
            )
        rows.append(example)
    return rows, table.notes


def _pair(row: Mapping, place: str) -> dict:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(dialects.missing(name, row, place))
    if not row["prompt"].strip():
        raise ValueError(f"{place}: 'prompt' is empty, needs text")
    if row["chosen"] == row["rejected"]:
        raise ValueError(f"{place}: 'chosen' and 'rejected' are the same text; leave the row out")
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def _labelled(row: Mapping, place: str) -> dict:
    labels = [name for name in ("safe", "unsafe") if row.get(name) is not None]
    if len(labels) != 1 or not isinstance(row[labels[0]], bool):
        stated = ", ".join(f"{name}={row[name]!r}" for name in labels) or "no label"
        raise ValueError(f"{place}: {stated}; needs one of 'safe' and 'unsafe', true or false")
    prompt, response = (row["prompt"], row["response"]) if "response" in row else ("", row["prompt"])
    if not (prompt + response).strip():
        raise ValueError(f"{place}: 'response' is {response!r}, needs text")
    return {"prompt": prompt, "response": response, "safe": row[labels[0]] == (labels[0] == "safe")}


def split(rows: Sequence[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Returns (training rows, held-out rows), order kept: by hash of the prompt, so that no prompt is on both sides.

    Texts judged without a prompt go by their own. ValueError when the fraction is not in [0, 1].
    """
    return split_by(rows, lambda row: row["prompt"] or row["response"], fraction)
