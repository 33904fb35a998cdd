"""Stage 3's part without a rule: rows of people or other models, mixed by kind, with thoughts where an editor is set (P2 B.3.3)."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from r1jax.core.say import say
from r1jax.data import corpus, files
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.recipe import editing, example_files, judging, problems
from r1jax.recipe.drafts import Counts, Draft, tally
from r1jax.schema import KINDS, Config, DataConfig, JudgeConfig, RejectionConfig, RewardConfig

GENERAL, NO_KIND = "general", "no kind"


def inputs(stage: str, rejection: RejectionConfig, judge: JudgeConfig) -> dict[str, str]:
    """Returns {file or folder: digest} of config.rejection.general_path and of the editor. ValueError for a missing one."""
    paths = problems.paths(rejection.general_path)
    return {path: files.digest(path) for path in paths} | judging.editor_inputs(stage, judge, rejection.editor)


def chosen(config: Config, mesh: Mesh, wanted: int, counts: Counts) -> list[dict]:
    """Returns `wanted` general examples, or as many as there are: rows of files, or the tiny world's that keep its rules.

    counts["general"] and counts["general by kind"] tell how many of each task and kind.
    """
    if not problems.has_files(config.data) and not config.rejection.general_path:
        rows = corpus.preferred(wanted, hash64(config.stage, config.seed, GENERAL) % 2**32)
        tally(counts, GENERAL, [GENERAL] * len(rows))
        return [row | {"provenance": {"teacher": "rules of the tiny world"}} for row in rows]
    found = read(config.data, config.reward, config.rejection)
    tally(counts, "general rows", (draft.problem.kind or NO_KIND for draft in found))
    found = mixed(found, config.rejection.kind_weights(), wanted, hash64(config.stage, config.seed, "kinds"))
    if config.rejection.editor and found:
        found = editing.with_thoughts(
            found, judging.load(config.stage, config.seed, config.judge, mesh), config.seed, config.judge, counts
        )
    tally(counts, GENERAL, (draft.task for draft in found))
    tally(counts, "general by kind", (draft.problem.kind or NO_KIND for draft in found))
    return [draft.row() for draft in found]


def read(data: DataConfig, reward: RewardConfig, rejection: RejectionConfig) -> list[Draft]:
    """Returns the general rows with a response: those of task general in the files of problems, and all of config.rejection.general_path.

    Raises ValueError, with file and line, for a bad row and one of general_path without a response.
    """
    found = []
    listed = [(path, data.task) for path in problems.paths(data.path)]
    listed += [(path, GENERAL) for path in problems.paths(data.general_path)]
    for path, task in listed:
        rows = [row for row in files.read(path, data.columns, data.max_rows).rows if row.fields.get("response")]
        found += [_draft(row, path, reward) for row in rows if (row.fields.get("task") or task) == GENERAL]
    for path in problems.paths(rejection.general_path):
        table = files.read(path, data.columns)
        own = [_draft(row, path, reward) for row in table.rows]
        say(*(f"{path}: {note}" for note in table.notes))
        found += own
    return found


def _draft(row: files.FileRow, path: str, reward: RewardConfig) -> Draft:
    draft = example_files.draft(row, path, reward, GENERAL)
    return dataclasses.replace(draft, problem=dataclasses.replace(draft.problem, task=GENERAL), gradable=False)


def mixed(drafts: Sequence[Draft], weights: dict[str, float], wanted: int, key: int) -> list[Draft]:
    """Returns `wanted` drafts, or as many as there are, whose kinds stand in the ratio of their weights; the first ones without weights.

    A kind with fewer rows than its share gives all of them and the others fill its place. Rows of a kind without a weight are left
    out; the weight of software_engineering is also that of its sub-kinds without one of their own.
    """
    if not weights:
        return list(drafts[:wanted])
    by_kind: dict[str, list[Draft]] = {kind: [] for kind in KINDS if kind in weights}
    for draft in drafts:
        kind = draft.problem.kind if draft.problem.kind in weights else draft.problem.kind.split("/")[0]
        if kind in by_kind:
            by_kind[kind].append(draft)
    taken = shares({kind: len(rows) for kind, rows in by_kind.items()}, weights, wanted)
    return [
        rows[place]
        for number, (kind, rows) in enumerate(by_kind.items())
        for place in sorted(keyed_permutation(len(rows), (key + number) % 2**64)[: taken[kind]])
    ]


def shares(there: dict[str, int], weights: dict[str, float], wanted: int) -> dict[str, int]:
    """Returns how many of each kind make `wanted` (or all that are there) nearest to the weights: one after the other, the kind that
    lags behind its weight most."""
    taken = dict.fromkeys(there, 0)
    for _ in range(min(wanted, sum(there.values()))):
        open_kinds = [kind for kind in there if taken[kind] < there[kind]]
        least = min(open_kinds, key=lambda kind: (taken[kind] + 1) / weights[kind])
        taken[least] += 1
    return taken
