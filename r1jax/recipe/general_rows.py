"""Stage 3's general examples: rows of people or other models, mixed by kind; an editor may add thoughts (P2 B.3.3)."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from r1jax.core.say import say
from r1jax.data import corpus, files
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.recipe import editing, example_files, judging, problems
from r1jax.recipe.drafts import Counts, Draft, tally
from r1jax.recipe.parts import SamplingParts
from r1jax.schema import KINDS, DataConfig, JudgeConfig, RejectionConfig, RewardConfig

GENERAL, NO_KIND = "general", "no kind"


def inputs(stage: str, rejection: RejectionConfig, judge: JudgeConfig) -> dict[str, str]:
    """Returns {path: digest} of config.rejection.general_path and the editor; ValueError for a missing one."""
    digests = problems.file_digests(problems.paths(rejection.general_path))
    return digests | judging.editor_inputs(stage, judge, rejection.editor)


def chosen(
    settings: SamplingParts, rejection: RejectionConfig, judge: JudgeConfig, mesh: Mesh, count: int, counts: Counts
) -> list[dict]:
    """Returns `count` general examples, or fewer if there are fewer: rows of files, or the tiny world's good responses.

    counts["general"] and counts["general by kind"] get the numbers by task and by kind.
    """
    if not problems.has_files(settings.data) and not rejection.general_path:
        rows = corpus.preferred(count, hash64(settings.stage, settings.seed, GENERAL) % 2**32)
        tally(counts, GENERAL, [GENERAL] * len(rows))
        return [row | {"provenance": {"teacher": "rules of the tiny world"}} for row in rows]
    drafts = read(settings.data, settings.reward, rejection)
    tally(counts, "general rows", (draft.problem.kind or NO_KIND for draft in drafts))
    drafts = mixed(drafts, rejection.kind_weights(), count, hash64(settings.stage, settings.seed, "kinds"))
    if rejection.editor and drafts:
        editor = judging.load(settings.stage, settings.seed, judge, mesh)
        drafts = editing.with_thoughts(drafts, editor, settings.seed, judge, counts)
    tally(counts, GENERAL, (draft.task for draft in drafts))
    tally(counts, "general by kind", (draft.problem.kind or NO_KIND for draft in drafts))
    return [draft.row() for draft in drafts]


def read(data: DataConfig, reward: RewardConfig, rejection: RejectionConfig) -> list[Draft]:
    """Returns the general rows with a response: task general in the files of problems, and all rows of general_path.

    Raises ValueError, with file and line, for a bad row, and for one of config.rejection.general_path without a
    response.
    """
    drafts = []
    listed = [(path, data.task) for path in problems.paths(data.path)]
    listed += [(path, GENERAL) for path in problems.paths(data.general_path)]
    for path, task in listed:
        rows = [row for row in files.read(path, data.columns, data.max_rows).rows if row.fields.get("response")]
        drafts += [_draft(row, path, reward) for row in rows if (row.fields.get("task") or task) == GENERAL]
    for path in problems.paths(rejection.general_path):
        table = files.read(path, data.columns)
        file_drafts = [_draft(row, path, reward) for row in table.rows]
        say(*(f"{path}: {note}" for note in table.notes))
        drafts += file_drafts
    return drafts


def _draft(row: files.FileRow, path: str, reward: RewardConfig) -> Draft:
    draft = example_files.draft(row, path, reward, GENERAL)
    return dataclasses.replace(draft, problem=dataclasses.replace(draft.problem, task=GENERAL), gradable=False)


def mixed(drafts: Sequence[Draft], weights: dict[str, float], count: int, key: int) -> list[Draft]:
    """Returns `count` drafts, or fewer if there are fewer, with kinds in proportion to their weights.

    Without weights these are the first ones. If a kind has fewer rows than its share, all are taken and other kinds
    make up for it. Rows of a kind without a weight are left out; sub-kinds of software_engineering without a weight
    share its.
    """
    if not weights:
        return list(drafts[:count])
    by_kind: dict[str, list[Draft]] = {kind: [] for kind in KINDS if kind in weights}
    for draft in drafts:
        kind = draft.problem.kind if draft.problem.kind in weights else draft.problem.kind.split("/")[0]
        if kind in by_kind:
            by_kind[kind].append(draft)
    taken = shares({kind: len(rows) for kind, rows in by_kind.items()}, weights, count)
    return [
        rows[place]
        for number, (kind, rows) in enumerate(by_kind.items())
        for place in sorted(keyed_permutation(len(rows), (key + number) % 2**64)[: taken[kind]])
    ]


def shares(available: dict[str, int], weights: dict[str, float], count: int) -> dict[str, int]:
    """Returns how many rows of each kind to take: `count` in total (or all available), in proportion to the weights.

    Rows are allotted one by one, each to the kind that is furthest below its weight.
    """
    taken = dict.fromkeys(available, 0)
    for _ in range(min(count, sum(available.values()))):
        open_kinds = [kind for kind in available if taken[kind] < available[kind]]
        lagging = min(open_kinds, key=lambda kind: (taken[kind] + 1) / weights[kind])
        taken[lagging] += 1
    return taken
