"""A model that edits drafts: it rewrites traces in the first person and one language, or adds thoughts to replies."""

import dataclasses
from collections.abc import Callable, Sequence

from r1jax.data.hashing import hash64
from r1jax.recipe.drafts import Counts, Draft, tally
from r1jax.rewards.models import editing
from r1jax.rewards.models.judge import Judge, Request
from r1jax.rewards.rules import detect_language
from r1jax.schema import JudgeConfig, RewardConfig


def rewrite(
    drafts: Sequence[Draft],
    editor: Judge,
    seed: int,
    reward: RewardConfig,
    judge: JudgeConfig,
    counts: Counts,
    keep_unedited: bool = False,
) -> list[Draft]:
    """Returns the drafts rewritten by the editor, in order.

    A draft without a readable edit (also if trace or edit is longer than config.judge.sampler allows) is left out, or
    with `keep_unedited` returned unchanged.
    """
    edits = [editing.read_edit(reply or "") for reply in _ask(editor, drafts, seed, _edit_prompt)]
    tally(counts, "edits asked", (draft.task for draft in drafts))
    tally(counts, "edits read", (draft.task for draft, edit in zip(drafts, edits, strict=True) if edit))
    edited = []
    for draft, edit in zip(drafts, edits, strict=True):
        if edit:
            edited.append(with_text(draft, edit.turn(reward.extraction), judge.checkpoint))
        elif keep_unedited:
            edited.append(draft)
    return edited


def with_thoughts(drafts: Sequence[Draft], editor: Judge, seed: int, judge: JudgeConfig, counts: Counts) -> list[Draft]:
    """Returns the drafts; to those without a thought the editor adds one before the reply.

    If its thought is empty or cannot be read, the reply stays unchanged.
    """
    without_thought = [draft for draft in drafts if "<think>" not in draft.text]
    thoughts = [editing.read_thoughts(reply or "") for reply in _ask(editor, without_thought, seed, _thoughts_prompt)]
    tally(counts, "thoughts asked", (draft.task for draft in without_thought))
    pairs = list(zip(without_thought, thoughts, strict=True))
    tally(counts, "thoughts read", (draft.task for draft, thought in pairs if thought is not None))
    tally(counts, "thoughts added", (draft.task for draft, thought in pairs if thought))
    written = {
        id(draft): with_text(draft, f"<think>\n{thought}\n</think>\n\n{draft.text.strip()}", judge.checkpoint)
        for draft, thought in pairs
        if thought
    }
    return [written.get(id(draft), draft) for draft in drafts]


def language_of(draft: Draft) -> str:
    """Returns the language that a draft's problem names, else that of its text."""
    return draft.problem.language or detect_language(draft.problem.text)


def with_text(draft: Draft, text: str, editor: str) -> Draft:
    """Returns the draft with a text that `editor` wrote; its provenance keeps the earlier text."""
    provenance = {"trace": draft.text} | draft.provenance | {"edited": True, "editor": editor}
    return dataclasses.replace(draft, text=text, provenance=provenance)


def _edit_prompt(draft: Draft, question: str, trace: str, seed: int) -> str:
    return editing.edit_prompt(question, trace, draft.task, language_of(draft), seed)


def _thoughts_prompt(draft: Draft, request: str, reply: str, seed: int) -> str:
    return editing.thoughts_prompt(request, reply, language_of(draft), seed)


def _ask(
    editor: Judge, drafts: Sequence[Draft], seed: int, prompt: Callable[[Draft, str, str, int], str]
) -> list[str | None]:
    """Returns the editor's reply to each draft, None if prompt or reply is too long for its sampler."""
    requests = []
    for draft in drafts:
        question, text = (editor.escape_special_tokens(part) for part in (draft.problem.text, draft.text))
        key = hash64("edit", seed, draft.problem.id, question, text)
        requests.append(Request(prompt(draft, question, text, seed), (key,)))
    return [reply for (reply,) in editor.replies(requests)]
