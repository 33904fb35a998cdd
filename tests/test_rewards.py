import json
import pathlib
import random
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data import tasks
from r1jax.rewards import compose, rules
from r1jax.rewards.answers import math_answer
from r1jax.rewards.answers.math_answer import extract, grade, parse_number, quick
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

GOOD = "<think> 3 * 4 = 12 </think> <answer> 12 </answer>"


def verdict(answer, reference, extraction="auto"):
    """1.0 or 0.0, or None when the reference is unscorable."""
    score = grade(answer, reference, extraction)
    return score.value if score.scorable else None


@pytest.mark.parametrize(
    ("response", "extraction", "expected"),
    [
        ("<think>\\boxed{1}</think><answer>2</answer>", "auto", "2"),
        ("<answer>1</answer> then <answer> 2 </answer>", "auto", "2"),
        ("<answer>\\boxed{2}</answer>", "answer_tag", "2"),
        ("<think><answer>1</answer></think> done", "answer_tag", None),
        ("so \\boxed{1}, then we get \\boxed{\\frac{1}{\\sqrt{2}}}.", "auto", "\\frac{1}{\\sqrt{2}}"),
        ("so \\boxed{1} and \\boxed{\\frac{1}{\\sqrt{2}}}.", "auto", "1, \\frac{1}{\\sqrt{2}}"),
        ("so $x = \\boxed 9$, in \\boxed{ }", "boxed", "9"),
        ("The answer is $\\frac{1}{2}$, as $3 > 2$. Or 7?", "auto", "$\\frac{1}{2}$, as $3 > 2$"),
        ("答案是 18 元。", "auto", "18 元"),
        ("2 + 5 = 7\n#### 7\n\nQuestion: 2 + 2?\n#### 4", "auto", "7"),
        ("As $x > 1$ the area is $3\\sqrt{2}$, not 5.", "auto", "3\\sqrt{2}"),
        ("The domain is [0, 7).", "auto", "[0, 7)"),
        ("Room B4C, so they have 2 and 5.", "auto", "2 and 5"),
        ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
        ("\\boxed{3} and \\boxed{4", "boxed", "3"),
        ("It is 7, so 3 * 4 = 12.", "auto", "3 * 4 = 12"),
        ("It is -5.", "auto", "-5"),
        ("9 - 5 = 4", "auto", "9 - 5 = 4"),
        ("It is 12", "boxed", None),
        ("It is 12", "answer_tag", None),
        ("no digits here", "auto", None),
        ("<think>so it is 12", "auto", None),
        ("<think>a</think> x + 1 \n", "whole", "x + 1"),
        ("<answer></answer>", "auto", None),
    ],
)
def test_extract_finds_the_answer_in_the_agreed_place(response, extraction, expected):
    assert extract(response, extraction) == expected


def test_extract_names_the_known_extractions_when_given_another():
    with pytest.raises(ValueError, match="'xml' must be one of auto, boxed, answer_tag, whole"):
        extract("5", "xml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        ("10,\\!000", 10000),
        ("10\\,000", 10000),
        ("\\$1,234.50", Fraction(2469, 2)),
        ("$72", 72),
        ("72 dollars per day", 72),
        ("-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-\\dfrac{3}{4}", Fraction(-3, 4)),
        ("\\frac34", Fraction(3, 4)),
        ("1\\frac{4}{5}", Fraction(9, 5)),
        ("-1 4/5", Fraction(-9, 5)),
        ("145^\\circ", 145),
        ("9\\text{ cm}^2", 9),
        ("\\text{9}", 9),
        ("50\\%", 50),
        ("1.5e3", 1500),
        ("−7", -7),
        ("18.", 18),
        ("18元。", 18),
        ("007", 7),
    ],
)
def test_parse_number_reads_the_usual_ways_to_write_a_number(text, value):
    assert parse_number(text).value == value


@pytest.mark.parametrize(
    "text", ["", "x", "3x", "3xy", "1,23", "3, 5", "1 2", "3/0", "2 sin", "7 or 8", "1e9999", "5万", "9" * 5000]
)
def test_parse_number_refuses_what_is_not_one_number(text):
    assert parse_number(text) is None


@given(st.fractions(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_parse_number_round_trips_every_fraction(value, padding):
    assert parse_number(" " * padding + f"{value.numerator}/{value.denominator}").value == value
    assert parse_number(f"{value.numerator:,}").value == value.numerator


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("\\boxed{72}", "He sold 48+24 = 72.\n#### 72", 1),
        ("\\boxed{1,072}", "#### 1072", 1),
        ("\\boxed{7}", "#### 72", 0),  # a correct prefix
        ("\\boxed{3, 5}", "3, 5, 7", 0),
        ("\\boxed{7, 5, 3}", "3, 5, 7", 1),
        ("\\boxed{0.1}", "1/10", 1),
        ("\\boxed{0.30000000000000004}", "0.3", 0),
        ("\\boxed{50\\%}", "50", 1),
        ("\\boxed{50\\%}", "0.5", 1),
        ("\\boxed{50}", "0.5", 0),
        ("\\boxed{3x}", "3", 0),
        ("\\boxed{3}", "3x", 0),
        ("\\boxed{2}", "2t", 0),
        ("\\boxed{b+a + c}", "a + b + c", 1),
        ("<answer>abc + 1</answer>", "1", 0),
        ("\\boxed{\\dfrac{1}{1,\\!000}}", "0.001", 1),
        ("\\boxed{5:00}", "05\\!:\\!00", 1),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{11}", 0),
        ("\\boxed{2^{10}}", "1024", 1),
        ("\\boxed{(1, 2)}", "(2, 1)", 0),
        ("\\boxed{-2x}", "y = -2x", 1),
        ("\\boxed{B}", "\\text{(B)}", 1),
        ("\\boxed{\\text{C}}", "B", 0),
        ("\\boxed{Even}", "\\text{even}", 1),
        ("<answer>The answer is 72</answer>", "72", 1),
        ("<answer>x = 7</answer>", "7", 1),
        ("<answer>seven</answer>", "7", 1),
        ("<answer>答案是18元</answer>", "18", 1),
        ("<answer>苹果</answer>", "苹果", 1),
        ("<answer>梨</answer>", "苹果", 0),
        ("nothing", "\\sqrt{2}", 0),
    ],
)
def test_grade_compares_values(answer, reference, expected):
    assert verdict(answer, reference) == expected


@pytest.mark.parametrize(
    "answer", ["<answer>71 or 72</answer>", "\\boxed{71 \\text{ or } 72}", "<answer>1 2 72</answer>"]
)
def test_grade_refuses_an_answer_that_lists_several_numbers(answer):
    assert verdict(answer, "72") == 0.0


@pytest.mark.parametrize("reference", ["", "  ", "\\frac{1}{", "see the graph above", "#### "])
def test_grade_calls_an_unreadable_reference_unscorable_even_when_the_answer_is_the_same_text(reference):
    score = grade(f"<answer>{reference or 5}</answer>", reference, "auto")
    assert (score.value, score.scorable) == (0.0, False)
    assert "reference" in score.detail


def test_grade_never_runs_the_answer_as_code(tmp_path):
    target = tmp_path / "touched"
    for reference in ("5", "x^2"):
        for answer in (f"__import__('pathlib').Path('{target}').touch()", f"exec(\"open('{target}','w')\")"):
            assert verdict(f"<answer>{answer}</answer>", reference) == 0.0
    assert not target.exists()


def test_quick_and_extract_take_linear_time_on_degenerate_text():
    started = time.perf_counter()
    for unit in (
        "\\(",
        "\\boxed{",
        "<answer>",
        "1,",
        "1 ",
        "$",
        "\\frac{1}",
        "a'",
        "`",
        "```",
        "$$a",
        "{",
        "-",
        "a@",
        "a.",
        "\\begin{a}",
    ):
        text = unit * 8000 + "5"
        quick(text, "5", "auto")
        rules.language_consistency(text, "en")
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("name", ["gsm8k_test", "math500"])
def test_grade_accepts_every_reference_against_itself_and_no_changed_digit(shared_data, name):
    rows = [json.loads(line) for line in (shared_data / f"{name}.jsonl").read_text().splitlines()]
    rows = random.Random(0).sample(rows, 120)
    accepted = [grade(f"so \\boxed{{{row['answer']}}}", row["answer"], "auto").value for row in rows]
    assert sum(accepted) == len(rows)
    changed = [re.sub(r"\d", lambda digit: str(int(digit[0]) % 9 + 1), row["answer"], count=1) for row in rows]
    pairs = [(new, row["answer"]) for new, row in zip(changed, rows, strict=True) if new != row["answer"]]
    assert [pair for pair in pairs if grade(f"\\boxed{{{pair[0]}}}", pair[1], "auto").value] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        ("  \n" + GOOD + " <eos> \n", 1.0),
        (GOOD + "<｜end▁of▁sentence｜>", 1.0),
        (GOOD + "\ntrailing text", 0.0),
        (GOOD + GOOD, 0.0),
        ("before " + GOOD, 0.0),
        ("<think>a</think> between <answer>1</answer>", 0.0),
        ("<answer>1</answer><think>a</think>", 0.0),
        ("<think> </think><answer>1</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a<think>b</think><answer>1</answer>", 0.0),
        ("<think>a<answer>1</answer></think><answer>1</answer>", 0.0),
        ("<think>a</think></think><answer>1</answer>", 0.0),
        ("<think>a</think><answer>1", 0.0),
        ("<answer>1</answer>", 0.0),
        ("", 0.0),
        (GOOD + "\n" + "text after a line end", 0.0),  # `$` of a MULTILINE pattern would match before it
        (GOOD + "\n</answer>", 0.0),
        ("<think>a</think><answer>1</answer></think>", 0.0),
        ("＜think＞a＜/think＞<answer>1</answer>", 0.0),  # full-width brackets
        ("<thіnk>a</thіnk><answer>1</answer>", 0.0),  # a Cyrillic letter
        ("<THINK>a</THINK><answer>1</answer>", 0.0),
        ("<think>a</think><answer><eos></answer>", 0.0),  # nothing to read
        ("<think><|im_end|></think><answer>1</answer>", 0.0),
        ("<think>\u200b</think><answer>1</answer>", 0.0),
        ("<think>a</think><answer>\u2060\ufeff</answer>", 0.0),
        ("<think>\n\ta\n</think>\r\n\n<answer>\n1\n</answer>\n", 1.0),
        ("<think>the tag </s> closes</think><answer>1</answer></s><eos>", 1.0),
    ],
)
def test_format_score_accepts_exactly_one_think_block_then_one_answer_block(text, expected):
    assert rules.format_score(text) == expected


def test_format_score_accepts_plain_text_after_the_thought_only_without_the_answer_tag_rule():
    text = "<think>a</think>\nThe answer is \\boxed{3}."
    assert (rules.format_score(text), rules.format_score(text, require_answer_tag=False)) == (0.0, 1.0)
    assert rules.format_score("<think>a</think> <eos>", require_answer_tag=False) == 0.0


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("<think>we add two numbers</think> 答案是五", "en", 1.0),
        ("<think>我们 add 它们</think>", "zh", 4 / 5),
        ("<think>我们 add 它们</think>", "en", 1 / 5),
        ("the sum is $\\text{somme totale}$ and \\(a+b\\) or \\[x\\] `code words` 12 x2", "en", 1.0),
        ("costs $5 and $6 today", "zh", 0.0),
        ("```\nprint(hello)\n```", "en", 0.0),
        ("12 + 30 = 42", "en", 0.0),
        ("<think></think> some words", "en", 0.0),
        ("сумма sum", "en", 1 / 2),
        ("设 x 等于三", "zh", 1.0),
    ],
)
def test_language_consistency_is_the_share_of_target_words_in_the_thought(text, target, expected):
    assert rules.language_consistency(text, target) == pytest.approx(expected)


TRACES = [
    json.loads(line) for line in (pathlib.Path(__file__).parent / "language_traces.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["text"][:24])
def test_language_consistency_agrees_with_words_counted_by_hand(trace):
    share = trace["matching"] / trace["words"] if trace["words"] else 0.0
    assert rules.language_consistency(trace["text"], trace["target"]) == share


@pytest.mark.parametrize(
    ("spellings", "language"),
    [
        ("en EN English english en-US en_GB en_US.UTF-8 eng anglais 英语", "en"),
        ("zh ZH zh-CN zh_TW zh-Hans-CN zho cmn Chinese Mandarin 中文 简体中文", "zh"),
        ("fr FR French français FRANÇAIS francais fr-CA fr_FR.utf8 fra fre 法语", "fr"),
    ],
)
def test_a_language_is_known_by_its_names_and_codes(spellings, language):
    for spelling in [
        *spellings.split(),
        f" {spellings.split()[1]} ",
        "franc\u0327ais"[: 99 * (language == "fr")] or language,
    ]:
        assert rules.canonical_language(spelling) == language, spelling
        text = {"en": "two words", "zh": "两个词", "fr": "deux mots"}[language]
        assert rules.language_consistency(text, spelling) == 1.0


@pytest.mark.parametrize(
    "name", ["german", "de", "de-AT", "e", "klingon", "en fr", "english and chinese", "xx-en", "eng1", "-"]
)
def test_a_language_that_the_rule_does_not_know_is_refused_with_those_it_knows(name):
    with pytest.raises(ValueError, match=f"^language {name!r} is none that the language reward knows: en, zh, fr"):
        rules.canonical_language(name)


def test_the_reward_of_a_row_takes_its_language_as_data_sets_spell_it():
    asked = dict(id="1", task="math", prompt="1+1", response="<think>一共是二</think>\\boxed{2}", reference="2")
    for spelling, share in (("zh-CN", 1.0), ("Chinese", 1.0), ("English", 0.0)):
        found = compose.score(RewardRequest(**asked, language=spelling), RewardConfig())
        assert found.parts["language"] == share


@pytest.mark.parametrize(("name", "language"), [("cmath", "zh"), ("gsm8k_test", "en"), ("math500", "en")])
def test_the_language_of_every_real_prompt_is_detected(shared_data, name, language):
    rows = [json.loads(line) for line in (shared_data / f"{name}.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows if rules.detect_language(row["prompt"]) != language] == []


def test_language_consistency_tells_languages_of_one_script_apart_by_lexicon():
    text = "<think> 3 * 4 = 12 no wait 3 * 5 = 15 oui banana </think>"
    assert rules.language_consistency(text, "en", tasks.LEXICON) == pytest.approx(2 / 3)
    assert rules.language_consistency(text, "fr", tasks.LEXICON) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ("a b c d e", 3, 0.0),
        ("a b a b", 3, 0.0),  # two runs, both different
        ("a b a b a", 3, 2 / 3 - 1),
        ("Wait wait WAIT wait", 1, 1 / 4 - 1),
        ("no no", 3, 0.0),  # shorter than a run
        ("", 1, 0.0),
        ("我们我们我们", 2, 2 / 5 - 1),  # a Han character is a word
        ("我们 我们\n我们", 2, 2 / 5 - 1),
        ("x = 1 ; x = 1 ;", 4, 4 / 5 - 1),  # numbers and signs are words too
    ],
)
def test_repetition_penalty_is_the_share_of_repeated_runs_of_words(text, ngram, expected):
    assert rules.repetition_penalty(text, ngram) == pytest.approx(expected)


def test_repetition_counts_by_its_weight_alone_and_reads_what_was_sampled():
    looping = request(response="<think>" + "so it is 12 " * 50 + "</think><answer>12</answer>", prefill="so it is 12 ")
    plain, punished = (compose.score(looping, RewardConfig(format=0.0, repetition=weight)) for weight in (0.0, 0.5))
    assert plain.value == 1.0 and plain.parts == punished.parts
    assert punished.parts["repetition"] == rules.repetition_penalty(looping.response, 3) < -0.9
    assert punished.value == 1.0 + 0.5 * punished.parts["repetition"]


@pytest.mark.parametrize(
    ("prompt", "lexicon", "expected"),
    [
        ("How many eggs are left?", None, "en"),
        ("妈咪买了3盒茶叶, 一共多少 kg?", None, "zh"),
        ("3 + 4 = ?", None, "en"),
        ("trouve 3 x + 4 = 19 :", tasks.LEXICON, "fr"),
        ("solve 3 x + 4 = 19 :", tasks.LEXICON, "en"),
    ],
)
def test_detect_language_follows_most_words_of_the_prompt(prompt, lexicon, expected):
    assert rules.detect_language(prompt, lexicon) == expected


def request(task="math", response=GOOD, reference="12", prompt="How many are left?", **fields):
    return RewardRequest("sample-1", task, prompt, response, reference, **fields)


def test_score_is_the_weighted_sum_of_its_parts():
    config = RewardConfig(accuracy=1.0, format=0.5, language=0.25)
    score = compose.score(request(response="<think>we add 它</think><answer>12</answer>"), config)
    assert score.parts == pytest.approx({"accuracy": 1.0, "format": 1.0, "language": 2 / 3, "repetition": 0.0})
    assert score.value == pytest.approx(1.0 + 0.5 + 0.25 * 2 / 3)
    assert tuple(score.parts) == compose.RULE_PARTS


def test_score_grades_the_prefilled_think_tag_with_the_response():
    response = GOOD.removeprefix("<think>")
    assert compose.score(request(response=response), RewardConfig()).parts["format"] == 0.0
    assert compose.score(request(response=response, prefill="<think>"), RewardConfig()).parts["format"] == 1.0


def test_score_of_a_truncated_response_has_no_accuracy_and_no_format():
    score = compose.score(request(truncated=True), RewardConfig())
    assert (score.parts["accuracy"], score.parts["format"], score.scorable) == (0.0, 0.0, True)


def test_score_wants_no_answer_tag_when_the_extraction_is_boxed():
    response = "<think>a</think> It is \\boxed{12}."
    assert compose.score(request(response=response), RewardConfig(extraction="boxed")).value == 2.0
    assert compose.score(request(response=response), RewardConfig()).parts["format"] == 0.0


def test_score_of_a_linear_problem_reads_only_the_answer_tag():
    values = [
        compose.score(request("linear", response, "12", "solve 3 x + 4 = 40 :"), RewardConfig()).parts["accuracy"]
        for response in (GOOD, "<think> ok </think> 12", "<think> ok </think> <answer> 13 </answer>", "12")
    ]
    assert values == [1.0, 0.0, 0.0, 0.0]


def test_score_of_general_and_safety_prompts_comes_from_their_rules():
    prompt = tasks.general_prompts()[0].text
    response = "<think> ok </think> the cat is old"
    score = compose.score(request("general", response, "", prompt, source=tasks.SOURCE), RewardConfig())
    assert score.parts["accuracy"] == pytest.approx(tasks.general_score(prompt, response))
    prompt = tasks.safety_prompts()[0].text
    score = compose.score(request("safety", response, "", prompt, source=tasks.SOURCE), RewardConfig())
    assert (score.parts["accuracy"], score.scorable) == (tasks.safety_score(prompt, response), True)


def test_score_names_the_known_tasks_when_given_another():
    with pytest.raises(ValueError, match="'sample-1' has task 'poetry'; known tasks: " + ", ".join(compose.GRADERS)):
        compose.score(request("poetry"), RewardConfig())


def test_quick_decides_numbers_without_importing_sympy():
    code = (
        "import sys; from r1jax.rewards import compose; from r1jax.rewards.answers import math_answer;"
        "assert math_answer.quick('<answer>1,000</answer>', '1000', 'auto').value == 1.0;"
        "assert math_answer.quick('<answer>x</answer>', 'y^2', 'auto') is None;"
        "print(*sorted({'sympy', 'math_verify', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_reference_answer_reads_a_solution_with_a_box_or_hashes():
    assert math_answer.reference_answer("so $x=\\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    assert math_answer.reference_answer("a #### 1 b #### 72 ") == "72"
    assert math_answer.reference_answer("$\\pi$") == "\\pi"
