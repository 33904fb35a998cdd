"""The check by people: examples are written into a file, and verdicts are read from it (P2 B.3.2)."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from r1jax.core import checkpoint, hosts
from r1jax.data import files, jsonl
from r1jax.recipe import common
from r1jax.recipe.common import StageFolder
from r1jax.recipe.drafts import Counts, Draft, from_record, tally
from r1jax.schema import ColdStartConfig

VERDICTS = ("accept", "reject", "edit")
DRAFTS = "drafts.json"  # in the stage's folder: the examples that wait for verdicts


class Awaited(Exception):
    """Raised when examples wait for people's verdicts; the message names the file and what to do."""


def inputs(path: str) -> dict[str, str]:
    """Returns {path: digest of the verdicts}, "" if the file does not exist yet; {} without a review."""
    return {path: hosts.decide(_digest, path, name=path)} if path else {}


def _digest(path: str) -> str:
    return files.digest(path) if Path(path).exists() else ""


def kept(folder: StageFolder, coldstart: ColdStartConfig) -> tuple[list[Draft], Counts] | None:
    """Returns (drafts, counts) that an earlier run with the same config and inputs wrote for review, or None."""
    record = hosts.decide(_record, folder, coldstart, name=f"what is in {folder.path}")
    return None if record is None else ([from_record(draft) for draft in record["drafts"]], record["counts"])


def _record(folder: StageFolder, coldstart: ColdStartConfig) -> dict | None:
    path = folder.path / DRAFTS
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["key"] == _key(folder, coldstart) else None


def ask(drafts: Sequence[Draft], counts: Counts, folder: StageFolder, coldstart: ColdStartConfig) -> None:
    """Writes the drafts for people to review and keeps them for the next run. Raises Awaited."""
    path = coldstart.review
    record = {"key": _key(folder, coldstart), "counts": counts, "drafts": [draft.record() for draft in drafts]}
    hosts.decide(checkpoint.write_json, folder.path / DRAFTS, record, name=f"what is in {folder.path}")
    rows = [
        {"id": name, "prompt": draft.row()["prompt"], "response": draft.text, "verdict": "", "edit": ""}
        for name, draft in _named(drafts)
    ]
    hosts.decide(jsonl.write, path, rows, name=path)
    raise Awaited(
        f"{folder.path.name}: {len(rows)} examples wait for review in {path}: set each row's verdict to accept, "
        "reject or edit (the new response in 'edit') and run the same command again"
    )


def apply(drafts: Sequence[Draft], stage: str, coldstart: ColdStartConfig, counts: Counts) -> list[Draft]:
    """Returns the drafts that people accepted or edited in their file, and counts the verdicts by task.

    Raises ValueError, with file and line, for an invalid verdict, a row that matches no draft or has another text, and
    a draft without a row; Awaited if rows have no verdict yet.
    """
    path = coldstart.review
    waiting, verdicts = dict(_named(drafts)), {}
    for line, row in jsonl.read_numbered(path, required=("id", "response")):
        place, name, verdict = f"{path}, line {line}", str(row["id"]), row.get("verdict") or ""
        draft = waiting.get(name)
        if draft is None or name in verdicts:
            why = "has two rows" if draft else "is no example of this run"
            raise ValueError(f"{place}: {name!r} {why}; remove the file to have the examples written again")
        if row["response"] != draft.text:
            raise ValueError(
                f"{place} ({name}): 'response' is not the example's; a new text goes into 'edit', and a file of older "
                "examples must be removed"
            )
        if verdict and verdict not in VERDICTS:
            raise ValueError(f"{place} ({name}): field 'verdict' is {verdict!r}, it must be accept, reject or edit")
        text = row.get("edit") or ""
        if verdict == "edit" and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"{place} ({name}): verdict edit without a text in 'edit'")
        verdicts[name] = (verdict, text)
    if missing := [name for name in waiting if name not in verdicts]:
        raise ValueError(
            f"{path}: {len(missing)} examples have no row, the first is {missing[0]!r}; reject with a verdict instead"
        )
    if unread := sum(not verdict for verdict, _ in verdicts.values()):
        raise Awaited(
            f"{stage}: {unread} of {len(waiting)} examples in {path} have no verdict yet; set accept, reject or edit "
            "and run the same command again"
        )
    for name in VERDICTS:
        tally(
            counts, f"review: {name}", (waiting[key].task for key, (verdict, _) in verdicts.items() if verdict == name)
        )
    reviewed = []
    for name, (verdict, text) in verdicts.items():
        if verdict != "reject":
            provenance = waiting[name].provenance | {"review": verdict}
            text = text.strip() if verdict == "edit" else waiting[name].text
            reviewed.append(dataclasses.replace(waiting[name], text=text, provenance=provenance))
    return reviewed


def _named(drafts: Sequence[Draft]) -> list[tuple[str, Draft]]:
    """Returns (unique name, draft): the name is the problem's id, with a number if it has several drafts."""
    seen: dict[str, int] = {}
    named = []
    for draft in drafts:
        number = seen[draft.problem.id] = seen.get(draft.problem.id, 0) + 1
        named.append((draft.problem.id if number == 1 else f"{draft.problem.id}#{number}", draft))
    return named


def _key(folder: StageFolder, coldstart: ColdStartConfig) -> str:
    """Returns a digest of the stage's config and of its inputs except the verdicts."""
    input_digests = json.loads((folder.path / common.INPUTS).read_text(encoding="utf-8"))["inputs"]
    input_digests.pop(coldstart.review, None)
    return hashlib.sha256(json.dumps([folder.hash, input_digests], sort_keys=True).encode()).hexdigest()
