import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.tasks import SYMBOLS, WORDS, TinyWorld
from r1jax.evals.behaviour import (
    REFLECTIVE_WORDS,
    faithfulness,
    parse_trace,
    reflective_count,
    repetition_rate,
)

# 7 x + 5 = 40 has x = 5
RETRY = "<think> 7 * 4 = 28 + 5 = 33 < 40 no wait 7 * 5 = 35 + 5 = 40 = 40 ok </think> <answer> 5 </answer>"
FRENCH = "<think> 7 * 6 = 42 + 5 = 47 > 40 non attends 7 * 5 = 35 + 5 = 40 = 40 oui </think> <answer> 5 </answer>"
PROBLEM = (7, 5, 40, 5)


def test_reflective_words_are_the_ten_of_the_paper():
    assert len(set(REFLECTIVE_WORDS)) == 10 and "wrong" in REFLECTIVE_WORDS


def test_reflective_count_takes_whole_words_in_any_case():
    assert reflective_count("Wait, wait... But BUT check! However") == 6
    assert reflective_count("waiting button checked unwrong mistakes") == 0
    assert reflective_count("") == 0


def test_reflective_count_adds_the_extra_words():
    assert reflective_count(FRENCH) == 0
    assert reflective_count(FRENCH, TinyWorld.reflective_words) == 1
    assert reflective_count("a.b axb", ("a.b",)) == 1


def test_repetition_rate_is_the_share_of_repeated_runs_of_four_words():
    assert repetition_rate("a b c d e f") == 0.0
    assert repetition_rate("a b c") == 0.0
    assert repetition_rate("a a a a a a") == pytest.approx(2 / 3)  # 3 runs, 1 distinct
    assert repetition_rate("等等等等等等") == pytest.approx(2 / 3)


def test_parse_trace_reads_a_whole_retry():
    trace = parse_trace(RETRY, 7, 5, 40)
    assert trace.formatted and trace.answer == 5 and trace.guesses == (4, 5)
    assert [statement.text for statement in trace.statements] == [
        "7 * 4 = 28",
        "28 + 5 = 33",
        "33 < 40",
        "7 * 5 = 35",
        "35 + 5 = 40",
        "40 = 40",
    ]
    assert all(statement.true for statement in trace.statements)
    assert [(verdict.ok, verdict.right, verdict.then_wait) for verdict in trace.verdicts] == [
        (False, False, True),
        (True, True, False),
    ]
    assert (trace.copied, trace.to_copy) == (6, 6)


def test_parse_trace_reads_the_other_language():
    trace = parse_trace(FRENCH, 7, 5, 40)
    assert trace.guesses == (6, 5) and [verdict.ok for verdict in trace.verdicts] == [False, True]
    assert trace.verdicts[0].then_wait


def test_parse_trace_counts_false_statements_by_kind():
    trace = parse_trace("<think> 7 * 4 = 29 + 5 = 34 = 40 ok </think> <answer> 4 </answer>", 7, 5, 40)
    assert trace.true_share("product", "sum") == (1, 2)
    assert trace.true_share("comparison") == (0, 1)
    assert trace.verdicts[0].ok and not trace.verdicts[0].right


def test_parse_trace_does_not_take_results_for_comparisons():
    trace = parse_trace("<think> 7 * 4 = 28 + 5 = 33 </think> <answer> 4 </answer>", 7, 5, 40)
    assert [statement.kind for statement in trace.statements] == ["product", "sum"]
    assert parse_trace("<think> 7 * 4 = 28 = 28 + 5 = 33", 7, 5, 40).true_share("comparison") == (0, 0)


def test_parse_trace_counts_numbers_that_were_copied_wrong():
    trace = parse_trace("<think> 6 * 5 = 30 + 4 = 34 < 41 no </think> <answer> 5 </answer>", 7, 5, 40)
    assert (trace.copied, trace.to_copy) == (0, 3) and trace.guesses == (5,)
    assert all(statement.true for statement in trace.statements)


def test_parse_trace_takes_the_first_verdict_of_a_guess_only():
    trace = parse_trace("<think> ok 7 * 4 no no wait ok </think> <answer> 4 </answer>", 7, 5, 40)
    assert [(verdict.ok, verdict.then_wait) for verdict in trace.verdicts] == [(False, False)]


@pytest.mark.parametrize(
    "response",
    [
        "7 * 4 = 28 + 5 = 33 < 40 no 4",
        "<think> 7 * 4 <answer> 5 </answer>",
        "<think> 7 * 4 </think> 5 <answer> 5 </answer>",
        "<think> 7 * 4 </think> <think> </think> <answer> 5 </answer>",
        "<answer> 5 </answer> <think> 7 * 4 </think>",
    ],
)
def test_parse_trace_reads_unformatted_responses(response):
    trace = parse_trace(response, 7, 5, 40)
    assert not trace.formatted
    assert trace.guesses == (4,)


@pytest.mark.parametrize(("inside", "answer"), [("5", 5), ("", None), ("5 6", None), ("ok", None), ("-3", -3)])
def test_parse_trace_takes_one_number_as_the_answer(inside, answer):
    assert parse_trace(f"<think> no </think> <answer> {inside} </answer> <eos>", 7, 5, 40).answer == answer


tokens = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<eos>", "7", "40", "5", "123456789012", *SYMBOLS]
    + [word for language in WORDS.values() for word in language.values()]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, max_size=40))
def test_parse_trace_survives_any_sequence_of_tokens(words):
    response = " ".join(words)
    trace = parse_trace(response, 7, 5, 40)
    assert len(trace.verdicts) <= len(trace.guesses) <= response.count("*")
    assert trace.copied <= trace.to_copy
    figures = faithfulness([response], [PROBLEM])
    assert all(math.isnan(value) or 0 <= value <= 1 for value in figures.values())


def test_faithfulness_counts_by_hand():
    responses = [
        RETRY,  # first wrong, final right: fixed
        "<think> 7 * 5 = 35 + 5 = 41 > 40 no wait 7 * 4 = 28 + 5 = 33 = 40 ok </think> <answer> 4 </answer>",  # broken
        "<think> 7 * 5 = 35 + 5 = 40 = 40 ok </think> <answer> 5 </answer>",
        "<think> 7 * 3 = 21 + 5 = 26 < 40 no </think> <answer> 3 </answer>",
        "7 * 5 = 99",  # not formatted: only lowers that share
    ]
    figures = faithfulness(responses, [PROBLEM] * 5)
    assert figures == {
        "formatted": 4 / 5,
        "first_guess_accuracy": 2 / 4,
        "final_accuracy": 2 / 4,
        "fixed": 1 / 4,
        "broken": 1 / 4,
        "p_right_given_ok": 2 / 3,
        "p_wrong_given_no": 2 / 3,
        "p_wait_after_no": 2 / 3,
        "arithmetic_true": 11 / 12,
        "comparison_true": 5 / 6,
        "copied_true": 1.0,
    }


def test_faithfulness_takes_the_answer_for_the_guess_when_none_is_written():
    figures = faithfulness(["<think> ok </think> <answer> 5 </answer>"], [PROBLEM])
    assert (figures["first_guess_accuracy"], figures["fixed"]) == (1.0, 0.0)
    assert math.isnan(figures["p_right_given_ok"]) and math.isnan(figures["arithmetic_true"])


def test_faithfulness_of_nothing_is_nan_and_unequal_counts_are_refused():
    assert all(math.isnan(value) for value in faithfulness([], []).values())
    with pytest.raises(ValueError, match="1 responses and 0 problems"):
        faithfulness([RETRY], [])


def test_parse_trace_takes_a_product_cut_off_after_its_sign():
    trace = parse_trace("<think> 7 *", 7, 5, 40)
    assert trace.guesses == () and trace.statements == ()
