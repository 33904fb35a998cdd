import json
import time

import pytest
from conftest import shared_folder, unavailable

from r1jax.data import jsonl
from r1jax.rewards import compose
from r1jax.rewards.answers import choice
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


def test_multiple_choice_cases_are_graded_as_they_say():
    path = shared_folder() / "cases" / "grading_cases.jsonl"
    if not path.is_file():
        unavailable(f"no cases in {path}; set R1JAX_SHARED to the folder that holds cases/")
    rows = [row for row in jsonl.read(path) if row["task"] == "mcq"]
    found = {r["id"]: value(r["response"], r["reference"], r["prompt"], r["extraction"]) for r in rows}
    assert found == {row["id"]: float(row["expected"]) for row in rows}
    assert len(rows) > 0


CITY = "What is the capital of France?\nA. Berlin\nB. Paris\nC. Madrid\nD. Rome"
CLAIMS = """
The answer is B.|The answer is option B.|The correct answer is **B**.|The answer must be B.|My final answer is B.|Answer: B|Answer - B|Ans: B
The answer is, of course, B.|The answer is clear: B.|The answer is as follows: B|The answer is undoubtedly B.|The choice is clear: B.
The answer is B) Paris.|The answer is (B) Paris.|The answer is Paris.|The correct answer is Paris (B).|Paris|B - Paris|B (Paris)|B, Paris|B!
The answer is B, not C.|The answer is B rather than C.|The answer is not A but B.|It is not A, it is B.|It's not A but B.|Not A, not C, not D: B.
The answer is B since A, C and D are elsewhere.|The answer is B (A, C and D are elsewhere).|The answer is B. A, C and D are elsewhere.
Options A, C and D are elsewhere, so it is B|A and C are wrong, and D is wrong too, so the answer is B.|A isn't correct, B is.|C is out, so B.
B is correct.|(B) is correct.|Option B is the right one.|So B is right.|B must be correct.|B turns out to be correct.|B it is.|B is the only correct option.
Only B fits.|A: wrong. B: correct. C: wrong. D: wrong.|The only option that fits is B.|B is the answer; C isn't.|C is not the answer, B is.
I would choose B.|I'd go with option B.|I pick B.|I vote B.|I'd say B.|Let's go with B.|Choose B.|Locking in B.|My choice is B.|We should select B.
It is B.|So it must be B.|So, B.|Hence (B).|=> B|That leaves B.|We are left with B.|This corresponds to option B.|Finally, B.|Then B.
I first thought A, but the answer is B.|At first A seems right, but B is correct.|A might look right, but the answer is B.|Between A and B, I choose B.
Clearly B.|I think B.|Which gives us B.|B ✓|Only B is on the Seine.|对应B选项|Might it be D? No. It is B.|Is it C? No, B.|The answer is C. Wait, no: the answer is B.|The answer is C. Actually, it is B.|If France is meant, B is correct.
The answer is B. It is not C.|The answer is B.\\n\\nExplanation: it is on the Seine.|B\\n\\nIt is on the Seine.|The answer is:\\n\\nB|# Answer\\n\\n**B**
<answer>The answer is B.</answer>|<answer>B, not C</answer>|<answer>B because it is on the Seine</answer>|\\boxed{\\text{Option B}}|The answer is Ｂ|The answer is Ⓑ
答案是B|答案为B。|正确答案：（B）|本题答案选B。|【答案】B|选择 B|故选B。|应选B|我选B|所以选择B选项。|B选项正确|A错，B对。|不是A，而是B。|选B，不选C。|只有B是对的|B才是正确答案
La bonne réponse est la B.|Réponse : B|Je choisis B.|C'est B.|La réponse est B, pas A.|La respuesta correcta es la B.|Respuesta: B|No es A, es B.|La opción B es correcta.
Die Antwort ist B.|Antwort: B|Ich wähle B.|B ist richtig.|Nicht A, sondern B.|Daher ist die Antwort B.|A resposta é B.|La risposta è B.|Ответ: B|正解はB|정답은 B
"""
HEDGES = """
The answer is B or C.|The answer is B and C.|The answer is B, C.|The answer is B/C.|The answers are A and B.|B or C|B/C|B, C|BC|(B)(C)|B & C|B; C|ABCD
The answer is either B or C.|It is either B or D.|Both B and C are correct.|A and B are correct.|Options A and B are correct.|B (or C)|I'd choose B or C.
The answer is B, but C is also possible.|The answer is B, though A is also correct.|The answer is B. C is also correct.|B is correct and A is correct.
The answer is not B.|The answer isn't B.|The answer cannot be B.|It is not B.|Not B.|No, not B.|B is not correct.|B is wrong.|B isn't right.|B can't be right.|B doesn't fit.
B is ruled out.|B can be eliminated.|B, no.|B: no|B: incorrect|Anything but B.|All except B.|Neither B nor C.|None of the above.|We exclude B.|B is the wrong answer.
I would not choose B.|I wouldn't choose B.|I can't choose B.|I refuse to choose B.|I don't think B is correct.|I doubt that it is B.|I reject B.
B is tempting, but the answer is D|B looks right, but D is correct.|The answer is D, not B.|The answer is D rather than B.|Unlike B, option D is correct.|Instead of B, choose C.
Although B looks right, D is the answer.|Many would choose B, but the answer is D.|The answer is D because B is in Germany.|B is out, so C.|A is better than B.|D, not B
The answer is B. Wait, it is C.|The answer is B. No, the answer is C.|The answer is B. That is wrong.|The answer is B.\\nThe answer is D.|B\\nD|First B, finally A.
I initially chose B.|I almost chose B.|My first answer was B.|The answer is B or, possibly, C.|Wrong: B|It might be B.|Maybe B.|Perhaps the answer is B.|The answer might be B.|B could be correct.|If B is correct, Berlin is wrong.|Suppose B is correct.|Let's say B is correct; then A fails.
Is it B?|Would you choose B?|B?|B? No.|Which option is correct, B?|I cannot decide between B and C.|I'm not sure whether it is B.|So B is too small|The answer is B) Berlin|(B) Rome
<answer>B or C</answer>|<answer>not B</answer>|<answer>B is incorrect</answer>|<answer>B\\nC</answer>|\\boxed{B, C}|\\boxed{BC}|\\boxed{\\text{not B}}|Plan B|The answer is 12.
不选B|答案不是B|答案不是B，是C。|不是B，而是C。|B错误|B不正确|B不对|B不是答案|选B或C|选B和C|故选BC|故选B、C|可能是B|答案可能是B|排除B|如果选B，则不对。|答案是B吗|选B还是选C|答案是C而非B
La réponse n'est pas B.|La réponse est B ou C.|B n'est pas correct.|B est fausse.|Ce n'est pas B.|Die Antwort ist nicht B.|Die Antwort ist B oder C.|B ist falsch.|Nicht B.|La respuesta no es B.|B no es correcta.
"""


def statements(block):
    return [text.replace("\\n", "\n") for line in block.strip().split("\n") for text in line.split("|")]


@pytest.mark.parametrize("response", statements(CLAIMS))
def test_mcq_reads_an_option_that_a_sentence_claims(response):
    assert value(response, "B", CITY) == 1.0


@pytest.mark.parametrize("response", statements(HEDGES))
def test_mcq_refuses_options_that_are_denied_doubted_or_several(response):
    assert value(response, "B", CITY) == 0.0


def test_mcq_reads_what_is_false_as_the_question_asks():
    asked = "Which of these is NOT a city?\nA. Rome\nB. Rhine\nC. Paris\nD. Madrid"
    for response in (
        "The answer is B. B is not a city.",
        "The false statement is B.",
        "不正确的是B",
        "The incorrect option is B.",
    ):
        assert (value(response, "B", asked), value(response, "B", CITY)) == (
            1.0,
            float(response.startswith("The answer")),
        ), response
    for response in (
        "The wrong answer is B.",
        "The least likely answer is B.",
        "错误答案是B",
        "La mauvaise réponse est B.",
    ):
        assert value(response, "B", CITY) == 0.0


def test_mcq_takes_true_and_no_for_the_text_of_an_option():
    prompt = "Does it hold?\nA. Yes\nB. No\nC. Incorrect\nD. True"
    for letter, text in choice.read_options(prompt).items():
        for response in (f"{letter}: {text}", f"The answer is {letter}: {text}", f"Answer: {letter}) {text}", text):
            assert [value(response, other, prompt) for other in "ABCD"] == [float(letter == x) for x in "ABCD"], (
                response
            )


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
    for unit in (
        "A. ",
        "A.\n",
        "(A",
        "answer is ",
        ":",
        "answer:",
        "B) ",
        " ",
        "\\text{",
        "$",
        "is,",
        "so B, ",
        "A or ",
        "not ",
    ):
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


@pytest.mark.parametrize("answer", ["B) It is doubled.", "(B) It is doubled", "B) (1,1)"])
def test_one_options_letter_before_another_ones_text_names_none(answer):
    options = {"A": "It is doubled.", "B": "It is halved.", "C": "(1,1)"}
    assert choice.named(answer, options) is None
    assert choice.named("B) It is halved.", options) == "B"
