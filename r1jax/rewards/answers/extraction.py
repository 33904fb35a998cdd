"""Finds the final answer in a response and in a reference."""

import functools
import re

from r1jax.data import templates
from r1jax.data.boxes import last_boxes
from r1jax.rewards.answers import words
from r1jax.rewards.answers.notation import FORMULA

EXTRACTIONS = ("auto", "boxed", "answer_tag", "whole")
# The fence of a code block, possibly after white space and the marks of a list item or a quotation.
_FENCE = re.compile(
    r"^([ \t]*(?:>[ \t]*)*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(`{3,}(?=[^\n`]*$)|~{3,})([^\n]*)$", re.MULTILINE
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)[\s,]+)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be)\b)?\s*[:=]?\s*(?:(?:option|choice)\b\s*)?",
    re.IGNORECASE,
)


# "The answer is", and words that may come between it and the answer.
_PHRASE = re.compile(
    r"\b(?:answers?|result|solution|(?:correct|right|best)\s+(?:option|choice))\b(?:\s+(?:to|of|for)\s[^.\n:=]{0,60}?)?\**\s*(?:(?:is|are|would\s+be|will\s+be|should\s+be|must\s+be|equals|becomes)\b|[:=])\**[ \t]*"
    r"(?:(?:therefore|thus|then|simply|just|exactly|equal\s+to|given\s+by)\b\s*)?[:=]?\s*|"
    r"(?:最终)?(?:正确)?(?:答案|结果)\s*(?:应该|应)?\s*(?:是|为|等于|[:：=])\s*[:：]?\s*",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|never|no|isn't|wasn't|cannot|wrong|incorrect|rejected|false|bad|invalid)\b|不是|并非|错误|不对",
    re.IGNORECASE,
)
_MARKER = re.compile(r"^[ \t]*####[ \t]*(?!#)(?=[-+−$€£¥(\[\\]|\d)(?!\d+[.)]\s+[A-Za-z])([^\n]+)", re.MULTILINE)
_COUNTED = re.compile(
    r"([-+−$€£¥]{0,2}\s?\d[\d,]*(?:\.\d+)?%?(?:\s[A-Za-z]+)?)((?:\s[A-Za-z]+)*?)(?:\sout)?\s(?:in|of|for|per|from|at|on|each|with|over|during|among)\s([^,;]*)"
)
_CHANGING = words.CHANGING | words.NUMBER_WORDS | frozenset(("case", "most", "least"))
_NEXT_QUESTION = re.compile(
    r"^[ \t*#]*(?:Question|Q|Problem|Exercise|Input|User|问题|问|题目)[ \t]*\d*[ \t]*[:：]",
    re.MULTILINE | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\d)[.!?。！？](?=\s|$)|(?<=\d)[.!?](?=\s+[^\d]|\s*$)|[。！？\n]")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|mbox|operatorname)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]+\*?\}|\\[A-Za-z]+")
_BOLD = re.compile(r"(?<![\w*)])\*\*([^*\n]+)\*\*(?![\w*(])")
_ANSWER_MARK = re.compile(r"\d|\w[\^=<>+*/]|^[=<>]")  # an answer has one of these; a run of only letters is no answer
_CHUNK = re.compile(r"\S+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FORMULA_WORDS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt pi theta alpha beta gamma lambda arcsin arccos arctan max min gcd lcm infty infinity oo frac cdot times le ge ne pm "
    "leq geq neq left right text cup cap in circ binom dfrac tfrac".split()
)
_JOINING = frozenset(("and", "or", "和", "或"))


def extract(response: str, extraction: str) -> str | None:
    r"""Returns the answer's text in an assistant turn, or None if there is none.

    Only what follows the last `</think>` is read; an unclosed `<think>` leaves no answer. By `extraction`:

    - `answer_tag`: the last `<answer>...</answer>`, or the boxes inside it if there are some.
    - `boxed`: the last complete `\boxed{...}`, or the last ones if they are side by side.
    - `whole`: all of it.
    - `auto`: the first that exists of the answer tag, the boxes, what follows "the answer is", what follows `####`, the
      last formula between dollar signs or brackets, and the last number or formula between words.

    Raises ValueError for another `extraction`.
    """
    if extraction not in EXTRACTIONS:
        raise ValueError(f"extract: extraction={extraction!r} must be one of {', '.join(EXTRACTIONS)}")
    text = templates.summary(response)
    if extraction == "whole":
        return text or None
    if extraction == "boxed":
        return last_boxes(text)
    tagged = _last_answer_tag(text)
    if extraction == "answer_tag" or tagged is not None:
        return tagged
    text = _BOLD.sub(r"\1", text)
    for find in (last_boxes, _stated, _marked, _last_formula, _formula_alone, _last_alone):
        if (answer := find(text)) is not None:
            return answer
    return None


@functools.lru_cache(maxsize=4096)
def reference_answer(reference: str) -> str:
    r"""Returns the final answer of a reference: after GSM8K's last `####`, or the last `\boxed{}`s, or all of it."""
    text = reference.rsplit("####", 1)[-1].strip() if "####" in reference else reference.strip()
    text = text.replace(r"\\boxed", r"\boxed")  # escaped twice
    boxed = last_boxes(text)
    text = text if boxed is None else boxed
    return without_dollars(text)


def _stated(text: str) -> str | None:
    """Returns the rest of the sentence after the last "the answer is" that precedes the first `####`."""
    if marker := _MARKER.search(text):
        text = text[: marker.start()]
    phrases = list(_PHRASE.finditer(text))
    if not phrases:
        return None
    if question := _NEXT_QUESTION.search(text, phrases[0].end()):
        text = text[: question.start()]
        phrases = [phrase for phrase in phrases if phrase.end() <= len(text)]
    phrase = phrases[-1]
    line = text.rfind("\n", 0, phrase.start()) + 1
    before = re.split(r"[.;!?。；]\s*", text[line : phrase.start()])[-1]
    if _DENIED.search(before):
        return text[line:].split("\n", 1)[0].strip()  # "this is not the answer: 5" does not give the answer
    rest = text[phrase.end() :].lstrip("*_ \t\r\n")
    formula = FORMULA.match(rest)
    start = formula.end() if formula else 0
    end = _SENTENCE_END.search(rest, start)
    sentence = rest[: end.start()] if end else rest
    return sentence.strip().strip("*_").strip() or None


def _marked(text: str) -> str | None:
    """Returns what follows the last `####` (GSM8K) with a number before the next question of a few-shot turn begins."""
    first = _MARKER.search(text)
    if first is None:
        return None
    end = _NEXT_QUESTION.search(text, first.end())
    marker = list(_MARKER.finditer(text, first.start(), end.start() if end else len(text)))[-1]
    counted = _COUNTED.match(marker[1])
    if counted and not {word.lower() for part in counted.group(2, 3) for word in part.split()} & _CHANGING:
        return counted[1]
    return marker[1].strip()


def _last_formula(text: str) -> str | None:
    last = None
    for match in FORMULA.finditer(text):
        last = match
    return None if last is None else next(group for group in last.groups() if group is not None).strip() or None


def _formula_alone(text: str) -> str | None:
    r"""Returns a text of one line if it is a formula, which may have words in `\text{}`, or at most two words."""
    if not text or "\n" in text or len(text) > 300 or "<answer>" in text:
        return None
    outside = _TEXT.sub(" ", text)
    named = _COMMAND.sub(" ", outside)
    plain_words = [word for word in _WORD.findall(named) if word not in _FORMULA_WORDS]
    short = len(plain_words) <= 2 and len(named.split()) <= 2
    formula = not plain_words and (
        bool(_COMMAND.search(text)) or len(named.split()) > 1 or not re.search(r"[^\W\d_]", named)
    )
    return text.strip() if short or formula else None


def _last_alone(text: str) -> str | None:
    """Returns the last number or formula between the words of a text: `7`, `3 * 4 = 12`, `[0, 7)`, `2 and 5`."""
    run: list[str] = []
    best: list[str] = []
    before, marked, words_before = "", False, []
    for chunk in _CHUNK.findall(text):
        label, before = before.lower() in words.LABELS, chunk
        if label and re.fullmatch(r"\(?\w{1,3}\)?[.,:;]?", chunk):
            run, marked = [], False
            continue
        bare = chunk if chunk in ("*", "-") else chunk.strip('*_"`')
        if _is_formula(bare) or (run and bare in (*_JOINING, "-", "–", "—")):
            if not run and _DENIED.search(" ".join(words_before[-2:])):
                run = words_before[-2:]  # "it is not 7" does not give the answer
            run.append(bare)
            marked = marked or bool(_ANSWER_MARK.search(bare))
            if marked:
                best = run
            if bare.endswith((".", ":", "!", "?", "。")):
                run, marked = [], False
        else:
            run, marked = [], False
        words_before = [] if chunk.endswith((".", "!", "?", ";", "。")) else [*words_before[-2:], bare]
    while best and best[-1] in _JOINING:
        best.pop()
    answer = " ".join(best).rstrip(".,:;!?。，").lstrip(",:;!?。，").strip()
    return answer or None


def _is_formula(chunk: str) -> bool:
    """Returns whether a text without spaces is part of a formula and not a word."""
    if chunk in ("a", "A", "I", "-", "–", "—", ""):
        return False
    return all(word in _FORMULA_WORDS for word in _WORD.findall(chunk)) and bool(re.search(r"[\w=<>+*/^√π∞-]", chunk))


def _last_answer_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    content = text[start + len("<answer>") : end].strip()
    boxed = last_boxes(content)
    return (content if boxed is None else boxed) or None


def fences(text: str, flush: bool = False) -> tuple[list[tuple[str, str]], bool]:
    """Returns ([(label after the opening marks, content)] of fenced blocks, whether the last one is unclosed).

    A block ends at marks like its own, or more of them, with nothing after them and indented by less than four columns
    more. Its content loses the indent of the opening marks, and the marks of a quotation around it. With `flush` only
    marks at the start of a line count.
    """
    blocks, opened = [], None
    for fence in _FENCE.finditer(text):
        if flush and fence[1]:
            continue
        if opened is None:
            opened = fence
        elif fence[2].startswith(opened[2]) and not fence[3].strip() and _closes(fence[1], opened[1]):
            content = text[opened.end() + 1 : fence.start()]
            blocks.append((opened[3].strip(), _outdented(content, opened[1]) if opened[1] else content))
            opened = None
    return blocks, opened is not None


def _closes(before: str, opened: str) -> bool:
    """Returns whether marks after the prefix `before` can close a block: no list item, and not indented too far."""
    return not before.strip(" \t>") and _width(before) < _width(opened) + 4


def _width(before: str) -> int:
    return len(before.expandtabs(4))


def _outdented(content: str, before: str) -> str:
    """Returns the lines of a block without the quotation marks and the indent (at most) of its opening marks."""
    quotes = before.count(">")
    width = _width(before.rpartition(">")[2].removeprefix(" ") if quotes else before)
    lines = []
    for line in content.split("\n"):
        for _ in range(quotes):
            line = line.lstrip(" \t").removeprefix(">").removeprefix(" ") if line.lstrip(" \t")[:1] == ">" else line
        indent = len(line) - len(line.lstrip(" \t"))
        spaces = line[:indent].expandtabs(4)
        lines.append((spaces[width:] + line[indent:]) if width and indent else line)
    return "\n".join(lines)


def without_lead(answer: str) -> str:
    """Returns an answer without a lead such as "the answer is", "Answer:" or "option"."""
    lead = _LEAD.match(answer)
    return answer[lead.end() :] if lead and lead.end() < len(answer) else answer


def without_dollars(text: str) -> str:
    """Returns a text without the one pair of dollar signs around all of it."""
    whole = len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]
    return text[1:-1].strip() if whole else text


def final_answer(response: str, extraction: str) -> str | None:
    """Returns what `extract` returns; only for `auto` without a tag or box it is all of the text after the thought."""
    if extraction != "auto":
        return extract(response, extraction)
    return extract(response, "answer_tag") or extract(response, "boxed") or extract(response, "whole")
