import json
import time

import pytest

from r1jax.rewards import choice, compose
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

PROMPT = "What is the degree?\nA. 0\nB. 1/2\nC. A finite field\nD. 6 cm\nwide"
OPTIONS = {"A": "0", "B": "1/2", "C": "A finite field", "D": "6 cm\nwide"}


def value(response, reference="B", prompt=PROMPT, extraction="auto"):
    """1.0 or 0.0, or None when the reference is unscorable."""
    score = compose.score(
        RewardRequest("a", "mcq", prompt, response, reference), RewardConfig(extraction=extraction, format=0.0)
    )
    return score.value if score.scorable else None


def test_read_options_takes_the_last_block_of_lettered_lines():
    assert choice.read_options(PROMPT) == OPTIONS
    assert choice.read_options("A. first\nB. list\nWhich?\nOptions:\n(A) x\n(B) y\n(C) z") == dict(A="x", B="y", C="z")
    assert choice.read_options("A. Smith sold 3 pens. How many?") == {}


@pytest.mark.parametrize(
    "answer",
    [
        *("B", "(B)", "[B]", "B.", "B)", "b", "(b)", "B) 1/2", "(B) 1/2", "B: 1/2", "B. because it halves", "$B$"),
        *(
            "\\text{B}",
            "\\text{(B)}",
            "\\mathrm{B}",
            "**B**",
            "the answer is B",
            "The correct answer is (B).",
            "Option B",
        ),
        *("Answer: B", "1/2", "\\frac{1}{2}", "0.5", "The answer is 1/2."),
    ],
)
def test_mcq_accepts_the_usual_ways_to_name_one_option(answer):
    assert value(f"<answer>{answer}</answer>") == 1.0
    assert value(f"so \\boxed{{{answer}}}", extraction="boxed") == 1.0
    assert [value(f"<answer>{answer}</answer>", other) for other in "ACD"] == [0.0] * 3


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "A",
            "C",
            "(D)",
            "0",
            "A finite field",
            "B or C",
            "A, B",
            "B and C",
            "(B)(C)",
            "BC",
            "B) 0",
            "B. 1/2 or 0",
            "B. or C",
        ),
        *("B) A finite field", "not B", "E", "", "1/3", "The answer is A. No, the answer is B", "B" * 2000, "C B"),
    ],
)
def test_mcq_refuses_another_option_two_options_and_none(answer):
    assert value(f"<answer>{answer}</answer>") == 0.0


def test_mcq_reads_an_options_text_whatever_its_capitals_and_lines():
    assert value("<answer>a finite  field.</answer>", "C") == 1.0
    assert value("<answer>D. 6 cm wide</answer>", "D") == 1.0
    assert value("<answer>finite</answer>", "C") == 0.0


def test_a_capital_letter_is_a_label_and_a_small_one_an_options_text():
    prompt = "Which?\nA. b\nB. a\nC. B"
    assert (value("\\boxed{a}", "B", prompt), value("\\boxed{A}", "A", prompt)) == (1.0, 1.0)
    assert (value("\\boxed{B}", "B", prompt), value("\\boxed{B}", "C", prompt)) == (1.0, 0.0)


def test_mcq_reads_option_texts_that_begin_with_a_label():
    prompt = "Which?\nA. (I) and (II)\nB. (A) and (C)\nC. (E) none"
    assert [
        value(f"<answer>The answer is {text}</answer>", letter, prompt)
        for letter, text in choice.read_options(prompt).items()
    ] == [1.0] * 3


def test_an_option_text_that_two_options_share_names_neither():
    prompt = "Which?\nA. 5\nB. 5\nC. 6"
    assert value("\\boxed{5}", "A", prompt) == 0.0
    assert value("\\boxed{A. 5}", "A", prompt) == 1.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>it is B</think> It is C.", 0.0),
        ("<think>it is C", 0.0),
        ("First A.\nThe answer is:\nB", 1.0),
        ("I thought of A.\nAnswer: (B)\nas shown above", 1.0),
        ("So B is too small\nB", 1.0),
        ("\\boxed{A} no, \\boxed{B}", 1.0),
        ("The answer is B, or the answer is C", 0.0),
        ("B or C?", 0.0),
    ],
)
def test_mcq_finds_the_option_without_a_tag_in_the_last_statement_or_line(response, expected):
    assert value(response) == expected


def test_mcq_without_options_in_the_prompt_goes_by_letters_alone():
    assert (value("\\boxed{B}", prompt="Which?"), value("\\boxed{B) red}", prompt="Which?")) == (1.0, 1.0)
    assert (value("\\boxed{B) A or C}", prompt="Which?"), value("\\boxed{red}", prompt="Which?")) == (0.0, 0.0)


@pytest.mark.parametrize("reference", ["", "Z", "E", "B or C", "purple"])
def test_mcq_with_a_reference_that_is_no_option_is_unscorable(reference):
    assert value(f"\\boxed{{{reference}}}", reference) is None


@pytest.mark.parametrize("reference", ["B", "(B)", "B. 1/2", "\\text{(B)}", "1/2", "b"])
def test_mcq_reads_the_reference_by_letter_or_text(reference):
    assert value("\\boxed{B}", reference) == 1.0


def test_mcq_takes_linear_time_on_degenerate_text():
    started = time.perf_counter()
    for unit in ("A. ", "A.\n", "(A", "answer is ", ":", "answer:", "B) ", " ", "\\text{", "$", "is,"):
        value(unit * 8000, prompt=unit * 8000)
    assert time.perf_counter() - started < 5.0


def test_mcq_tells_the_options_of_real_questions_apart_by_letter_and_by_text(shared_data):
    lines = (shared_data / "mmlu_stem.jsonl").read_text().splitlines()[::10]
    for row in map(json.loads, lines):
        options = choice.read_options(row["prompt"])
        assert [text.split() for text in options.values()] == [str(text).split() for text in row["meta"]["options"]]
        for letter, text in options.items():
            same = [other for other in options.values() if other.casefold() == text.casefold()]
            if len(same) == 1 and text not in choice.LETTERS:
                assert choice.choose(text, options) == letter
        assert [value(f"\\boxed{{{x}}}", row["answer"], row["prompt"]) for x in options] == [
            float(x == row["answer"]) for x in options
        ]
