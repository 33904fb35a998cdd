import json
import time

import pytest
from small import problems_of

from r1jax.data import reasoning_gym
from r1jax.rewards import compose
from r1jax.rewards.answers import countdown
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

NONSENSE = ("", "nonsense", "I do not know", "[]", "{}", "...", "None")


def value(task, answer, reference, prompt=""):
    """1.0 or 0.0, or None when the reference is unscorable."""
    request = RewardRequest("a", task, prompt, f"<think>x</think><answer>{answer}</answer>", reference)
    score = compose.score(request, RewardConfig(format=0.0))
    return score.value if score.scorable else None


PUZZLE = json.dumps({"numbers": [19, 63, 75, 55], "target": 86})


@pytest.mark.parametrize(
    "answer", ["55 - 63 + 19 + 75", "(55-63)+(19+75)", "75 + 19 − (63 - 55)", "$55 - 63 + 19 + 75$"]
)
def test_countdown_accepts_any_expression_of_the_numbers_that_equals_the_target(answer):
    assert value("countdown", answer, PUZZLE) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *("86", "55 - 63 + 19 + 76", "75 + 11", "55 - 63 + 19 + 75 + 0", "19 + 63 + 75 + 55", "55 - 63 + 19 + 75 = 86"),
        *(
            "55 - 63 + 19 + 75 if 1 else 0",
            "max(86, 1)",
            "55-63+19+75+(19-19)",
            "86.0",
            "[86][0]",
            "19/(63-63)",
            "9**9**9**9",
        ),
        *("(" * 100 + "86" + ")" * 100, "-" * 199 + "1", "__import__('os').getpid()", "", "1+" * 3000 + "1"),
    ],
)
def test_countdown_refuses_other_numbers_other_values_and_anything_but_arithmetic(answer):
    assert value("countdown", answer, PUZZLE) == 0.0


def test_countdown_with_an_unreadable_reference_is_unscorable():
    assert [
        value("countdown", "1", reference) for reference in ("", "86", "[]", '{"numbers": ["x"], "target": 1}')
    ] == [None] * 4


def test_countdown_divides_exactly():
    assert countdown.evaluate("1/3*3") == (1, [1, 3, 3])
    assert countdown.evaluate("7/2") == (7 / 2, [7, 2])


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("[1, 2, 3]", "[1,2,3]", 1),
        ("(1, 2)", "[1, 2]", 1),
        ("{'a': [1, None]}", '{"a": [1, null]}', 1),
        ("'abc'", '"abc"', 1),
        ("abc", "abc", 1),
        ("a  b\nc ", "a  b\nc", 1),
        ("```\n[1, 2]\n```", "[1, 2]", 1),
        ("`True`", "True", 1),
        ("[1, 2]", "[1, 2, 3]", 0),
        ("a", "a\nb", 0),
        ("1", "1.0", 0),
        ("1", "True", 0),
        ("[1, 0]", "[true, false]", 0),
        ("2 + 1", "3", 0),
        ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}", 1),
        ("[" * 9000, "[1]", 0),
        ("9" * 20_000, "9", 0),
        ("__import__('os').getpid()", "5", 0),
        ("x", " ", None),
    ],
)
def test_code_io_compares_whole_literals_and_whole_output(answer, reference, expected):
    assert value("code_io", answer, reference) == expected


def test_reasoning_gym_prompts_depend_on_family_seed_and_index_alone():
    first, again = (reasoning_gym.prompts("chain_sum", 4, seed=3) for _ in range(2))
    assert first == again and len({prompt.text for prompt in first}) == 4
    assert [prompt.id for prompt in first][:2] == ["chain_sum-3-0", "chain_sum-3-1"]
    assert reasoning_gym.prompts("chain_sum", 2, seed=3) == first[:2]
    assert reasoning_gym.prompts("chain_sum", 1, seed=90) != first[:1]


QUICK = (
    "basic_arithmetic",
    "chain_sum",
    "leg_counting",
    "caesar_cipher",
    "syllogism",
    "number_sorting",
    "maze",
    "mini_sudoku",
)
QUICK += (
    "knights_knaves",
    "word_sorting",
    "spell_backward",
    "base_conversion",
    "tower_of_hanoi",
    "prime_factorization",
)


@pytest.mark.parametrize("family", QUICK)
def test_reasoning_gym_accepts_the_librarys_own_answer_and_no_nonsense(family):
    for prompt in reasoning_gym.prompts(family, 3, seed=11):
        own = json.loads(prompt.reference)["answer"]
        assert value("reasoning_gym", own, prompt.reference, prompt.text) == 1.0
        assert [value("reasoning_gym", text, prompt.reference, prompt.text) for text in NONSENSE] == [0.0] * len(
            NONSENSE
        )


@pytest.mark.slow
def test_every_family_in_use_accepts_its_own_answers_only_and_runs_no_text(results, tmp_path):
    marker = tmp_path / "ran"
    figures = {}
    for family in reasoning_gym.families():
        started = time.perf_counter()
        prompts = reasoning_gym.prompts(family, 4, seed=7)
        seconds = time.perf_counter() - started
        for prompt in prompts:
            own = json.loads(prompt.reference)["answer"]
            touch = f"__import__('pathlib').Path('{marker}').touch()"
            assert value("reasoning_gym", own, prompt.reference, prompt.text) == 1.0, family
            wrong = (*NONSENSE, touch, f"[[{touch}]]", f"['a', {touch}]")
            for text in (text for text in wrong if text != own):
                assert value("reasoning_gym", text, prompt.reference, prompt.text) == 0.0, (family, text)
        assert not marker.exists(), family
        figures[family] = round(seconds / 4, 3)
    results("reasoning_gym", {"families": len(figures), "seconds_per_problem": figures})


def test_reasoning_gym_pays_no_partial_credit():
    [prompt] = reasoning_gym.prompts("chain_sum", 1)
    own = json.loads(prompt.reference)["answer"]
    assert value("reasoning_gym", f"{own} or so", prompt.reference, prompt.text) == 0.0


@pytest.mark.parametrize("family", ["game_of_life_halting", "countdown", "graph_color"])
def test_an_excluded_family_gives_no_prompts_and_no_score_and_says_why(family):
    reason = reasoning_gym.EXCLUDED[family]
    with pytest.raises(ValueError) as caught:
        reasoning_gym.prompts(family, 1)
    assert str(caught.value) == f"reasoning_gym: family {family!r} is excluded: {reason}"
    assert value("reasoning_gym", "True", json.dumps({"family": family, "answer": "True", "metadata": {}})) is None


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "5",
        "{}",
        '{"family": "chess", "answer": "1"}',
        '{"family": "tower_of_hanoi", "answer": "1", "metadata": {}}',
    ],
)
def test_reasoning_gym_with_an_unreadable_reference_is_unscorable(reference):
    assert value("reasoning_gym", "1", reference) is None


def test_puzzles_are_graded_in_killable_workers():
    assert not {"reasoning_gym", "countdown", "code_io"} & compose.IN_PROCESS
    [prompt] = reasoning_gym.prompts("chain_sum", 1)
    response = f"<answer>{json.loads(prompt.reference)['answer']}</answer>"
    request = RewardRequest(prompt.id, prompt.task, prompt.text, response, prompt.reference)
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0)) as pool:
        [score] = pool.score([request])
    assert (score.scorable, score.parts["accuracy"]) == (True, 1.0), score.detail


def test_countdown_rows_of_the_data_are_graded_as_countdown(shared_data):
    from r1jax.data import jsonl

    rows = jsonl.read(shared_data / "countdown.jsonl")
    prompts = problems_of(rows)
    assert {prompt.task for prompt in prompts} == {"countdown"}
    grades = [value("countdown", row["answer"], prompt.reference) for row, prompt in zip(rows, prompts, strict=True)]
    assert sum(grades) == len(rows)
    bare = [
        value("countdown", str(row["meta"]["target"]), prompt.reference)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    assert sum(bare) == 0
