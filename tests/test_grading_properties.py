"""What holds of every mathematical verdict: it is reflexive on golds, symmetric, exact to the last place, and never an error."""

import contextlib
import functools
import itertools
import json
import pathlib
import signal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from r1jax.data import answer_forms
from r1jax.rewards.answers import math_answer
from r1jax.rewards.answers.extraction import EXTRACTIONS
from r1jax.rewards.answers.values import Choice

PROCESSOR_S = 5.0  # of the processor that one verdict may take, many times what one does take
FILES = ("gsm8k_test", "math500", "math_train", "svamp", "cmath")


class TooSlow(BaseException):
    """Ends a verdict that takes too long; no `except Exception` of a library takes it for its own."""


@contextlib.contextmanager
def bounded():
    """Raises TooSlow when the block takes more than PROCESSOR_S of the processor, which a busy machine does not change."""

    def ring(number, frame):
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def verdict(answer: str, reference: str) -> bool | None:
    """Returns whether an answer in a tag equals a reference; None if the reference cannot be graded."""
    return math_answer.explain(f"<answer>{answer}</answer>", reference, "answer_tag").verdict


def golds(path: pathlib.Path) -> list[str]:
    found = [str(json.loads(line)["answer"]) for line in path.read_text(encoding="utf-8").splitlines()]
    return [gold for gold in dict.fromkeys(found) if gold.strip()]


# Reflexive and symmetric


@pytest.mark.parametrize("name", FILES)
def test_every_gold_of_real_data_is_right_as_an_answer_in_a_tag_and_in_a_box(shared_data, name):
    some = golds(shared_data / f"{name}.jsonl")
    boxes = [gold for gold in some if math_answer.grade(f"So \\boxed{{{gold}}}.", gold, "auto").value != 1.0]
    assert [gold for gold in some if verdict(gold, gold) is not True] + boxes == []
    assert len(some) > 50


def asymmetric(first: str, second: str) -> bool:
    """Returns whether two answers, both of which can be references, are equal one way round alone.

    An option's letter is named by an answer, which has no letter to be named by: that is not symmetric.
    """
    with bounded():
        found = [
            math_answer.explain(f"<answer>{answer}</answer>", reference, "answer_tag")
            for answer, reference in ((first, second), (second, first))
        ]
    if any(isinstance(side.reference_value, Choice) for side in found):
        return False
    return {side.verdict for side in found} == {True, False}


@functools.cache
def forms(path: pathlib.Path) -> list[tuple[str, str]]:
    """Returns (gold, the same or a near miss written otherwise) of every gold of a file."""
    return [
        (gold, form)
        for gold in golds(path)
        for form in (*answer_forms.rewritings(gold).values(), *answer_forms.perturbations(gold).values())
    ]


def test_golds_and_their_rewritings_and_near_misses_are_equal_both_ways_round_or_neither(shared_data):
    pairs = forms(shared_data / "math500.jsonl")
    assert len(pairs) > 5000
    assert [pair for pair in pairs[::2] if asymmetric(*pair)] == []


def test_golds_that_are_no_plain_numbers_are_equal_both_ways_round_or_neither(shared_data):
    some = [gold for gold in golds(shared_data / "math500.jsonl") if math_answer.parse_number(gold) is None]
    assert len(some) > 50
    assert [pair for pair in itertools.combinations(some, 2) if asymmetric(*pair)] == []


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_two_forms_of_golds_are_equal_both_ways_round_or_neither(shared_data, data):
    texts = st.sampled_from(forms(shared_data / "math500.jsonl")).map(lambda pair: pair[1])
    assert not asymmetric(data.draw(texts), data.draw(texts))


# Exact to the last place that is stated


@st.composite
def integers(draw) -> tuple[str, str]:
    value, step = draw(st.integers(-(10**30), 10**30)), draw(st.sampled_from((-1, 1)))
    return str(value), str(value + step)


@st.composite
def decimals(draw) -> tuple[str, str]:
    """Draws a decimal number and its neighbour in the last place."""
    value, places, step = draw(st.integers(-(10**20), 10**20)), draw(st.integers(1, 18)), draw(st.sampled_from((-1, 1)))

    def written(number: int) -> str:
        digits = str(abs(number)).zfill(places + 1)
        return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"

    return written(value), written(value + step)


@st.composite
def fractions(draw) -> tuple[str, str]:
    """Draws a fraction and one with its numerator or denominator changed by one."""
    top, bottom, step = draw(st.integers(1, 10**12)), draw(st.integers(2, 10**12)), draw(st.sampled_from((-1, 1)))
    changed = (top + step, bottom) if draw(st.booleans()) else (top, bottom + step)
    form = draw(st.sampled_from(("\\frac{%d}{%d}", "%d/%d", "-\\dfrac{%d}{%d}")))
    return form % (top, bottom), form % changed


@st.composite
def scientific(draw) -> tuple[str, str]:
    """Draws a number times a power of ten, and one with the mantissa's last digit or the exponent changed by one."""
    mantissa, places, power = draw(st.integers(1, 10**8)), draw(st.integers(0, 6)), draw(st.integers(-300, 300))
    step = draw(st.sampled_from((-1, 1)))
    changed = (mantissa + step, power) if draw(st.booleans()) else (mantissa, power + step)
    form = draw(st.sampled_from(("{} \\times 10^{{{}}}", "{} \\cdot 10^{{{}}}", "{}e{}")))

    def written(digits: int, power: int) -> str:
        text = str(digits).zfill(places + 1)
        return form.format(f"{text[:-places]}.{text[-places:]}" if places else text, power)

    return written(mantissa, power), written(*changed)


NEIGHBOURS = st.one_of(integers(), decimals(), fractions(), scientific())
PLACES = {  # where a number stands in an answer, beside others that no drawn number is
    "alone": "{}",
    "set": "\\{{{}, \\frac{{1}}{{7919000000000000}}\\}}",
    "list": "{}, \\sqrt{{2}}",
    "tuple": "(\\pi, {}, 4)",
    "pair in a set": "\\{{(1, {}), (2, 3)\\}}",
    "interval": "[{}, \\infty)",
    "upper end": "(-\\infty, {})",
    "union": "(-\\infty, {}) \\cup (10^{{400}}, \\infty)",
    "matrix": "\\begin{{pmatrix}} 1 & {} \\\\ 0 & x \\end{{pmatrix}}",
    "unit": "{} \\text{{ cm}}",
    "percent": "{}\\%",
    "named": "x = {}",
    "inequality": "x < {}",
    "two letters": "x + y \\le {}",
    "equation": "{} x + y = 1",
    "sum": "\\sqrt{{2}} + {}",
    "root": "\\sqrt[3]{{{}}}",
    "part": "\\frac{{x}}{{{}}}",
    "all but one": "\\mathbb{{R}} \\setminus \\{{{}\\}}",
    "factor": "{} \\cdot x + 1",
    "counted": "{} \\text{{ apples}}",
    "money": "\\${}",
}


@pytest.mark.parametrize("place", PLACES)
@given(pair=NEIGHBOURS)
@settings(max_examples=60, deadline=None)
def test_a_number_changed_by_one_in_its_last_place_is_wrong_wherever_it_stands(place, pair):
    gold, changed = (PLACES[place].format(text) for text in pair)
    with bounded():
        assert verdict(gold, gold) is True, gold
        assert verdict(changed, gold) is False, (gold, changed)
        assert verdict(gold, changed) is False, (gold, changed)


SENTENCES = (
    "The answer is {}.",
    "So the answer is {} apples",
    "We get $x = {}$.",
    "Hence\n#### {}",
    "it costs \\boxed{{{}}} dollars",
)


@pytest.mark.parametrize("sentence", SENTENCES)
@given(pair=NEIGHBOURS)
@settings(max_examples=60, deadline=None)
def test_a_number_changed_by_one_in_its_last_place_is_wrong_in_a_sentence(sentence, pair):
    gold, changed = pair
    with bounded():
        assert math_answer.grade(sentence.format(gold), gold, "auto").value == 1.0
        assert math_answer.grade(sentence.format(changed), gold, "auto").value == 0.0


# Never an error, and in bounded time

PIECES = """\\frac \\sqrt \\sqrt[3] { } { } ( ) [ ] \\{ \\} ^ _ ^{ _{ \\left( \\right) \\left. | , ; : . ... ! !! ' % $ $$ \\$ # #### + - * / = < > \\le \\ne
\\in \\cup \\cap \\setminus \\pm \\mp \\times \\cdot \\infty \\pi \\sin \\log_2 \\ln \\max \\gcd \\binom \\sum_{k=1}^{ \\int_0^1 dx \\begin{pmatrix} \\end{pmatrix}
\\begin{cases} \\end{cases} & \\\\ \\text{ \\mathrm{ \\text{cm} \\boxed{ <answer> </answer> </think> \\pmod \\equiv \\vec \\langle \\rangle \\circ ^\\circ \\mathbb{R}
0 1 2 9 10 007 1.5 .5 1,000 1e9 9^{9^{9}} 10^{12} 999999! x y z e i f f( n abc cm km apples and or not million is 答案是 ½ √ ∞ ² − ， 。 π ° ） \u0000 \u200b ﬁ 𝟓""".split()
SPACED = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(("", " "))), max_size=24)
PIECED = SPACED.map(lambda pieces: "".join(piece + space for piece, space in pieces))
LATEX = st.text("\\{}()[]^_$&|,.;:!%#+-*/=<> 0123456789xyzeinfrasqtcopl", max_size=60)
ANYTHING = st.one_of(st.text(max_size=80), LATEX, PIECED)


@given(answer=ANYTHING, reference=ANYTHING, extraction=st.sampled_from(EXTRACTIONS))
@example(answer="9^{9^{9^{9}}}", reference="2", extraction="whole")
@example(answer="(" * 900, reference="{" * 900, extraction="whole")
@example(answer="\\frac" * 180, reference="5", extraction="whole")
@example(answer="-" * 990 + "1", reference="1", extraction="whole")
@example(answer="\\sin 999999!", reference="5", extraction="whole")
@example(answer="", reference="À一", extraction="whole")
@example(answer="1" * 1000, reference="1" * 999, extraction="whole")
@settings(max_examples=1500, deadline=None)
def test_no_text_is_an_error_or_takes_long_as_an_answer_or_as_a_reference(answer, reference, extraction):
    for one, other in ((answer, reference), (answer, answer), (answer, "5"), ("x < 5", answer)):
        with bounded():
            score = math_answer.grade(one, other, extraction)
            quick = math_answer.quick(one, other, extraction)
        assert score.value in (0.0, 1.0) and score.scorable in (True, False)
        assert quick in (None, score)
