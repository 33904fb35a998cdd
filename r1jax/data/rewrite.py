"""The rewrite step of cold-start data on the tiny world: a trace becomes a clean one, or is refused.

The paper lets people and a language model rewrite R1-Zero's traces into one readable language; here the same is done
by rule: every word in the question's language, a check that repeats an earlier guess left out, one fixed layout.
"""

import re

from r1jax.data.tasks import WORDS, Linear, parse_linear

_TRY = re.compile(r"(\d+) \* (\d+) = (\d+) \+ (\d+) = (\d+) ([<=>]) (\d+) (\S+)")
_WORD_ROLE = {word: role for words in WORDS.values() for role, word in words.items()}


def tidy(prompt: str, response: str, language: str) -> str | None:
    """Returns the rewritten response to a linear prompt, or None when the trace is not a chain of checks.

    The result is not trusted: grade it again.
    """
    problem, thinking = parse_linear(prompt), response.split("</think>")[0].replace("<think>", "").strip()
    answer = re.search(r"<answer> (\d+) </answer>", response)
    if problem is None or answer is None:
        return None
    words, tries, seen = WORDS[language], [], set()
    for part in re.split(r" (?:wait|attends) ", thinking):
        match = _TRY.fullmatch(part)
        if match is None or _WORD_ROLE.get(match[8]) not in ("ok", "no"):
            return None
        if match[2] not in seen:
            seen.add(match[2])
            tries.append(f"{part.rsplit(' ', 1)[0]} {words[_WORD_ROLE[match[8]]]}")
    joined = f" {words['wait']} ".join(tries)
    return f"<think> {joined} </think> <answer> {answer[1]} </answer>"


def is_sound(prompt: str, response: str) -> bool:
    """Returns whether every check of a tidy response is about this equation and true, and only the last ends in ok."""
    problem = parse_linear(prompt)
    checks = [match.groups() for match in _TRY.finditer(response)]
    return (
        problem is not None
        and bool(checks)
        and all(_true(problem, check, last=index == len(checks) - 1) for index, check in enumerate(checks))
    )


def _true(problem: Linear, check: tuple[str, ...], last: bool) -> bool:
    a, guess, product, b, total, c = (int(check[i]) for i in (0, 1, 2, 3, 4, 6))
    sign = "=" if total == c else "<" if total < c else ">"
    holds = (a, b, c) == (problem.a, problem.b, problem.c) and product == a * guess and total == product + b
    return holds and check[5] == sign and (_WORD_ROLE[check[7]] == "ok") == last == (sign == "=")
