"""Claims about the tiny world: its problems, its corpus and the rewrite step of cold-start data."""

import re

import numpy as np
import pytest

from r1jax.checkpoints import tokenizer
from r1jax.data import corpus, rewrite, tasks
from r1jax.rewards import compose
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

ASKED = re.compile(r"(?:solve|trouve) (\d+) x \+ (\d+) =")
WRITTEN = re.compile(r"(\d+) \* \d+ = \d+ \+ (\d+) = \d+")


@pytest.fixture(scope="module")
def documents():
    return corpus.documents(20_000, seed=3, drill_fraction=0.3)


def pairs(text):
    return [(int(a), int(b)) for a, b in ASKED.findall(text) + WRITTEN.findall(text)]


def test_no_held_out_pair_occurs_in_any_training_text(documents):
    held_out = {(p.a, p.b) for p in tasks.linear_problems()[1]}
    training = [*documents, *(prompt.text for prompt in tasks.linear_prompts("train"))]
    found = {pair for text in training for pair in pairs(text)}
    assert len(found) > 150
    assert not found & held_out


def test_held_out_pairs_are_whole_and_about_an_eighth():
    train, test = tasks.linear_problems()
    assert not {(p.a, p.b) for p in train} & {(p.a, p.b) for p in test}
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2
    assert len(test) >= 410  # five samples each are at least 2,048 in all


def test_every_document_is_made_of_known_words_and_fits_a_row(documents):
    words = tokenizer.tiny()
    unknown = words.backend.token_to_id("<unk>")
    lengths = []
    for text in documents[:5000]:
        ids = words.encode(text)
        assert unknown not in ids
        lengths.append(len(ids) + 1)
    assert max(lengths) <= 96


def test_documents_depend_on_the_seed_alone():
    assert corpus.documents(50, 1, 0.3) == corpus.documents(50, 1, 0.3)
    assert corpus.documents(50, 1, 0.3) != corpus.documents(50, 2, 0.3)


def test_written_arithmetic_of_the_corpus_is_mostly_true(documents):
    products = [m for text in documents for m in re.findall(r"(\d+) \* (\d+) = (\d+)", text)]
    true = np.mean([int(a) * int(b) == int(c) for a, b, c in products])
    assert 0.97 < true < 1.0


def test_a_retry_follows_a_wrong_check_in_a_minority_of_documents(documents):
    linear = [text for text in documents if ASKED.search(text)]
    share = np.mean(["wait" in text or "attends" in text for text in linear])
    assert 0.08 < share < 0.25


def test_parse_linear_reads_prompts_and_nothing_else():
    for prompt in tasks.linear_prompts("test")[:50]:
        assert tasks.parse_linear(prompt.text).x == int(prompt.reference)
    for text in ("tell cat :", "solve 7 x + 5 = 41 :", "solve 0 x + 5 = 5 :", ""):
        assert tasks.parse_linear(text) is None


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think> cat </think> the cat is small and old thanks", 1.0),
        ("<think> cat </think> the dog is small and old thanks", 2 / 3),
        ("<think> cat </think> the cat is small and small", 1 / 3),
        ("", 0.0),
    ],
)
def test_general_rule_prefers_named_polite_varied_answers(response, value):
    assert tasks.general_score("tell cat :", response) == pytest.approx(value)


def test_safety_rule_wants_refusals_of_harmful_requests_only():
    refusal, steps = "<think> steal car </think> sorry cannot help", "<think> a </think> first take the cat"
    assert tasks.safety_score("how steal cat :", refusal) == 1.0
    assert tasks.safety_score("how steal cat :", steps) == 0.0
    assert tasks.safety_score("how clean cat :", steps) == 1.0
    assert tasks.safety_score("how clean cat :", refusal) == 0.0


def test_tidy_rewrites_into_the_language_of_the_question_and_drops_a_repeated_guess():
    prompt = "trouve 7 x + 5 = 40 :"
    trace = (
        "<think> 7 * 4 = 28 + 5 = 33 < 40 no wait 7 * 4 = 28 + 5 = 33 < 40 non attends "
        "7 * 5 = 35 + 5 = 40 = 40 ok </think> <answer> 5 </answer>"
    )
    text = rewrite.tidy(prompt, trace, "fr")
    assert text == (
        "<think> 7 * 4 = 28 + 5 = 33 < 40 non attends 7 * 5 = 35 + 5 = 40 = 40 oui </think> <answer> 5 </answer>"
    )
    assert rewrite.is_sound(prompt, text)
    score = compose.score(RewardRequest("x", "linear", prompt, text, "5"), RewardConfig())
    assert score.parts == {
        "accuracy": 1.0,
        "format": 1.0,
        "language": 1.0,
        "repetition": pytest.approx(-1 / 28),
    }  # + 5 =


@pytest.mark.parametrize(
    "thinking",
    [
        "7 * 5 = 36 + 5 = 40 = 40 ok",  # wrong product
        "7 * 5 = 35 + 5 = 40 = 40 no",  # wrong verdict
        "7 * 5 = 35 + 5 = 40 = 41 ok",  # another equation
        "7 * 4 = 28 + 5 = 33 > 40 no wait 7 * 5 = 35 + 5 = 40 = 40 ok",  # wrong comparison
    ],
)
def test_unsound_checks_are_refused(thinking):
    prompt = "solve 7 x + 5 = 40 :"
    text = rewrite.tidy(prompt, f"<think> {thinking} </think> <answer> 5 </answer>", "en")
    assert text is not None and not rewrite.is_sound(prompt, text)


def test_tidy_refuses_what_is_no_chain_of_checks():
    assert rewrite.tidy("solve 7 x + 5 = 40 :", "<think> 7 * 5 </think> <answer> 5 </answer>", "en") is None
