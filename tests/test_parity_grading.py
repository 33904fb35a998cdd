"""Answers of MATH-500, rewritten and made wrong, graded by math-verify and here."""

import json
import logging
import random

import pytest

from r1jax.data import answer_forms
from r1jax.rewards.answers import reading
from r1jax.rewards.answers.math_answer import grade
from r1jax.rewards.answers.values import Based

math_verify = pytest.importorskip("math_verify", reason="needs the parity extra")

GOLDS = 60
# Kinds of rewriting that math-verify does not read: full stops, words behind a number, text, mixed numbers, factors before a bracket.
UNREAD = {"trailing_period", "unit_word", "text", "mixed_slash", "member_doubled", "unit", "sentence", "lower", "bare"}


def pairs(shared_data):
    """Yields (gold, text, kind) of rewritings and near misses of golds drawn by a fixed seed."""
    golds = [json.loads(line)["answer"] for line in (shared_data / "math500.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    for gold in draw.sample(golds, GOLDS):
        for forms, count in ((answer_forms.rewritings(gold), 2), (answer_forms.perturbations(gold), 1)):
            for kind, text in draw.sample(sorted(forms.items()), min(count, len(forms))):
                yield gold, text, kind


def test_math_verify_and_this_grader_agree_on_rewritings_and_near_misses(shared_data, caplog):
    caplog.set_level(logging.CRITICAL)
    differing = []
    for gold, text, kind in pairs(shared_data):
        sides = [math_verify.parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (gold, text)]
        theirs = bool(math_verify.verify(*sides, timeout_seconds=None))
        here = grade(f"\\boxed{{{text}}}", gold, "boxed").value == 1.0
        if here and not theirs:
            differing += [] if kind in UNREAD else [(gold, text, kind, "paid here alone")]
        if theirs and not here:  # it drops the base of a numeral
            differing += [] if isinstance(reading.read(text), Based) else [(gold, text, kind, "paid there alone")]
    assert differing == []
