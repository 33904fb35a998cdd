"""The corpus a tiny base model reads: drills, worked equations of many qualities, and the two other families.

The mixture follows what decides whether reinforcement learning grows re-checking: a few documents retry after a wrong
check, and those that do are right more often than those that do not. A held-out (a, b) pair occurs in no document.
"""

from dataclasses import dataclass

import numpy as np

from r1jax.data.tasks import (
    ADJECTIVES,
    COPULA,
    HARMFUL,
    HARMLESS,
    MAX_NUMBER,
    REFUSAL,
    STEPS,
    TOPICS,
    WORDS,
    Linear,
    linear_problems,
)

MAX_TRIES = 6


@dataclass(frozen=True)
class Noise:
    """How unreliable the writer of a document is, all as probabilities."""

    arithmetic: float = 0.02  # a product or sum is off
    verdict: float = 0.03  # a comparison or verdict is a coin flip
    language: float = 0.15  # a word is in the other language


class DocumentWriter:
    """Writes documents from one NumPy generator."""

    def __init__(self, rng: np.random.Generator, noise: Noise):
        self.rng, self.noise = rng, noise

    def word(self, role: str, language: str) -> str:
        if self.rng.random() < self.noise.language:
            language = "fr" if language == "en" else "en"
        return WORDS[language][role]

    def off(self, value: int) -> int:
        """Returns the value, sometimes wrong."""
        if self.rng.random() < self.noise.arithmetic:
            value += int(self.rng.choice([-10, -2, -1, 1, 2, 10]))
        return int(np.clip(value, 0, MAX_NUMBER))

    def check(self, problem: Linear, guess: int) -> tuple[str, int]:
        """Returns one written substitution `a * g = u + b = v cmp c` and the v that was written."""
        product = self.off(problem.a * guess)
        total = self.off(product + problem.b)
        sign = "=" if total == problem.c else "<" if total < problem.c else ">"
        if self.rng.random() < self.noise.verdict:
            sign = str(self.rng.choice(["<", "=", ">"]))
        return f"{problem.a} * {guess} = {product} + {problem.b} = {total} {sign} {problem.c}", total

    def first_guess(self, problem: Linear) -> int:
        return self.bounded(problem, problem.x + round(self.rng.normal(0, 4)))

    def next_guess(self, problem: Linear, guess: int, total: int) -> int:
        step = (problem.c - total) / problem.a * self.rng.uniform(0.5, 1.5)
        step = round(step) or int(np.sign(problem.c - total))
        return self.bounded(problem, guess + step)

    def bounded(self, problem: Linear, guess: int) -> int:
        """Returns the guess, limited so that a * g + b is at most 99, the largest number of the vocabulary."""
        return int(np.clip(guess, 1, (MAX_NUMBER - problem.b) // problem.a))

    def tries(self, problem: Linear, language: str, go_on: float) -> tuple[str, int]:
        """Returns the checks of a document and its last guess; `go_on` is the probability of more after a wrong one."""
        guess, parts = self.first_guess(problem), []
        for attempt in range(MAX_TRIES):
            text, total = self.check(problem, guess)
            right = text.split()[-2] == "="
            parts.append(f"{text} {self.word('ok' if right else 'no', language)}")
            if right or attempt == MAX_TRIES - 1 or self.rng.random() >= go_on:
                break
            parts.append(self.word("wait", language))
            guess = self.next_guess(problem, guess, total)
        return " ".join(parts), guess

    def linear(self, problem: Linear, language: str, kind: str) -> str:
        """Returns a worked equation of a kind: terse, unchecked, once, retry, retry_untagged."""
        prompt = problem.text(language)
        if kind == "terse":
            return f"{prompt} {self.first_guess(problem)}"
        if kind == "unchecked":
            guess = self.first_guess(problem)
            return f"{prompt} <think> {problem.a} * {guess} </think> <answer> {guess} </answer>"
        if kind == "once":
            thought, guess = self.tries(problem, language, 0.0)
        elif kind == "retry":
            thought, guess = self.tries(problem, language, 0.6)
        else:
            thought, guess = self.tries(problem, language, 0.4)
            return f"{prompt} {thought} {guess}"
        return f"{prompt} <think> {thought} </think> <answer> {guess} </answer>"

    def drill(self, problems: tuple[Linear, ...]) -> str:
        """Returns true arithmetic: products, sums, comparisons, or whole substitutions."""
        kind, parts = self.rng.integers(4), []
        for _ in range(int(self.rng.integers(3, 8))):
            if kind == 0:
                a = int(self.rng.integers(2, 10))
                g = int(self.rng.integers(1, MAX_NUMBER // a + 1))
                parts.append(f"{a} * {g} = {a * g} .")
            elif kind == 1:
                b = int(self.rng.integers(0, 31))
                u = int(self.rng.integers(0, MAX_NUMBER - b + 1))
                parts.append(f"{u} + {b} = {u + b} .")
            elif kind == 2:
                v = int(self.rng.integers(0, MAX_NUMBER + 1))
                c = int(np.clip(v + round(self.rng.normal(0, 8)), 0, MAX_NUMBER))
                sign, role = ("=", "ok") if v == c else ("<", "no") if v < c else (">", "no")
                parts.append(f"{v} {sign} {c} {WORDS[str(self.rng.choice(['en', 'fr']))][role]} .")
            else:
                p = problems[int(self.rng.integers(len(problems)))]
                g = self.bounded(p, p.x + round(self.rng.normal(0, 5)))
                total = p.a * g + p.b
                sign = "=" if total == p.c else "<" if total < p.c else ">"
                parts.append(f"{p.a} * {g} = {p.a * g} + {p.b} = {total} {sign} {p.c} .")
        return " ".join(parts)

    def general(self, language: str) -> str:
        """Returns a prompt about a topic and an answer that keeps the stated preference only sometimes."""
        topics, adjectives = TOPICS[language], ADJECTIVES[language]
        topic = str(self.rng.choice(topics))
        named = topic if self.rng.random() < 0.6 else str(self.rng.choice(topics))
        first, second = (str(word) for word in self.rng.choice(adjectives, 2))
        the, verb, joint = COPULA[language]
        ending = f" {WORDS[language]['thanks']}" if self.rng.random() < 0.4 else ""
        prompt = f"{WORDS[language]['tell']} {topic} :"
        return f"{prompt} <think> {topic} {first} </think> {the} {named} {verb} {first} {joint} {second}{ending}"

    def safety(self, language: str) -> str:
        """Returns a harmless or harmful request and an answer that refuses the harmful ones only half the time."""
        harmful = self.rng.random() < 0.5
        verb = str(self.rng.choice(HARMFUL[language] if harmful else HARMLESS[language]))
        topic = str(self.rng.choice(TOPICS[language]))
        refuse = self.rng.random() < (0.5 if harmful else 0.15)
        first, take, then, use = STEPS[language]
        the = COPULA[language][0]
        answer = " ".join(REFUSAL[language]) if refuse else f"{first} {take} {the} {topic} {then} {use} {the} {topic}"
        return f"{WORDS[language]['how']} {verb} {topic} : <think> {verb} {topic} </think> {answer}"


KINDS = ("terse", "unchecked", "once", "retry", "retry_untagged")
KIND_WEIGHTS = (0.25, 0.20, 0.27, 0.13, 0.15)


def documents(count: int, seed: int, drill_fraction: float, other_fraction: float = 0.08) -> list[str]:
    """Returns `count` documents of the base corpus, without the end-of-text token.

    `drill_fraction` of them are arithmetic, `other_fraction` belong to the general and safety families.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    writer, train = DocumentWriter(rng, Noise()), linear_problems()[0]
    result = []
    for _ in range(count):
        language = "en" if rng.random() < 0.5 else "fr"
        draw = rng.random()
        if draw < drill_fraction:
            result.append(writer.drill(train))
        elif draw < drill_fraction + other_fraction:
            result.append(writer.general(language) if rng.random() < 0.5 else writer.safety(language))
        else:
            kind = str(rng.choice(KINDS, p=KIND_WEIGHTS))
            result.append(writer.linear(train[int(rng.integers(len(train)))], language, kind))
    return result


def preferred(count: int, seed: int) -> list[dict]:
    """Returns `count` general and safety examples {id, prompt, response} that keep the rules, for stage 3's mixture."""
    rng = np.random.Generator(np.random.Philox(seed))
    rows = []
    for number in range(count):
        language = ("en", "fr")[int(rng.integers(2))]
        words, topic = WORDS[language], str(rng.choice(TOPICS[language]))
        if rng.random() < 0.5:
            first, second = (str(word) for word in rng.choice(ADJECTIVES[language], 2, replace=False))
            the, verb, joint = COPULA[language]
            prompt = f"{words['tell']} {topic} :"
            answer = f"<think> {topic} {first} </think> {the} {topic} {verb} {first} {joint} {second} {words['thanks']}"
        else:
            harmful = rng.random() < 0.5
            verb = str(rng.choice(HARMFUL[language] if harmful else HARMLESS[language]))
            first, take, then, use = STEPS[language]
            the = COPULA[language][0]
            steps = f"{first} {take} {the} {topic} {then} {use} {the} {topic}"
            prompt = f"{words['how']} {verb} {topic} :"
            answer = f"<think> {verb} {topic} </think> {' '.join(REFUSAL[language]) if harmful else steps}"
        rows.append({"id": f"general-{number}", "prompt": prompt, "response": answer})
    return rows
