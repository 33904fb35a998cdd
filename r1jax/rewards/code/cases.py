"""Builds the tests of a code prompt: inputs by generators, outputs by accepted programs, kept for what they break.

Generators and programs run in the sandbox only. Source: DeepSeek-R1, supplement B.3.2: a model writes input generators;
tests on which accepted submissions disagree are dropped; subsets are kept that break known-wrong submissions.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from r1jax.data.hashing import hash64
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.code.programs import Source
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.sandbox.run import PYTHON, Outcome, Program, Sandbox
from r1jax.schema import BuildTestsConfig, RewardConfig, replace

COMPILE_S = 60.0  # of one program; no sample waits for it
KINDS = {
    "single": "the smallest case that the statement allows",
    "random": "a random case of middling size",
    "large": "a random case as large as the limits allow",
    "adversarial": "a case on which a plausible but wrong or slow program fails: ties, extremes, overflow, deep nesting",
    "repeated": "one value or character many times",
    "alternating": "two values or characters by turns",
    "sequential": "values or characters in rising or falling order",
}
PROMPT = (
    "Write test inputs for a programming problem. Its statement stands between the two lines of equals signs.\n\n"
    "==========\n{statement}\n==========\n\n"
    "Give one Python function make_input(kind, rng) in a fenced block. It returns the text of one complete, valid input, just as "
    "a program would read it from standard input, and takes every random choice from rng, a random.Random. kind is one of:\n"
    "{kinds}\n"
    "Keep all limits of the statement. Raise ValueError for a kind that the problem does not have. Use the standard library "
    "only, and write nothing else but the function and its imports."
)
_RUNNER = """
import json, os, random, sys
wanted = json.load(sys.stdin)
sys.stdout = open(os.devnull, "w")
space = {"__name__": "generator"}
exec(compile(open("generator.py", encoding="utf-8").read(), "generator.py", "exec"), space)
made = []
for kind, seed in wanted["cases"]:
    try:
        text = space["make_input"](kind, random.Random(seed))
        made.append(text if isinstance(text, str) and 0 < len(text) <= wanted["most"] else None)
    except Exception:
        made.append(None)
sys.__stdout__.write(json.dumps(made))
"""


@dataclass(frozen=True)
class Problem:
    """A code prompt with programs that are known to be right, programs that are known to be wrong, and input generators."""

    id: str
    statement: str
    accepted: tuple[Source, ...]
    wrong: tuple[Source, ...]
    generators: tuple[str, ...]
    float_tolerance: float | None = None


@dataclass(frozen=True)
class Built:
    """The tests of a problem and how they came about."""

    cases: tuple[tuple[str, str], ...]  # input, output
    inputs: int  # distinct inputs that the generators made
    dropped: int  # on which an accepted program failed or two disagreed
    broken: tuple[int, ...]  # wrong programs, by place, that fail at least one of the cases
    unbroken: tuple[int, ...]  # and those that no input broke


def prompt(statement: str) -> str:
    """Returns the request to write an input generator for a problem."""
    return PROMPT.format(statement=statement, kinds="\n".join(f"- {name}: {what}" for name, what in KINDS.items()))


def build(problem: Problem, config: BuildTestsConfig, reward: RewardConfig, seed: int = 0) -> Built:
    """Returns the tests of a problem. Raises SandboxUnavailable where programs cannot be isolated.

    Raises ValueError when an accepted program does not compile.
    """
    sandbox = open_sandbox(reward.sandbox)
    with ThreadPoolExecutor(config.workers) as pool:
        inputs = generated(problem, config, sandbox, seed)
        accepted, wrong = ([_program(source, reward) for source in part] for part in (problem.accepted, problem.wrong))
        for number, found in enumerate(accepted):
            if isinstance(found, str):
                raise ValueError(f"problem {problem.id!r}: accepted program {number}: {found}")
        printed = _outputs(pool, sandbox, accepted, inputs)
        agreed = [
            outputs[0] if _agree(outputs, problem.float_tolerance) else None for outputs in zip(*printed, strict=True)
        ]
        cases = [(given, output) for given, output in zip(inputs, agreed, strict=True) if output is not None]
        runs = _outputs(pool, sandbox, wrong, [given for given, _ in cases])
    breaks = [
        frozenset(
            place
            for place, outputs in enumerate(runs)
            if (printed := outputs[number]) is None
            or not code_tests.outputs_equal(printed, output, problem.float_tolerance)
        )
        for number, (_, output) in enumerate(cases)
    ]
    sizes = [len(given) for given, _ in cases]
    chosen = cover(breaks, sizes, config.min_tests)
    broken = frozenset().union(*breaks)
    unbroken = tuple(place for place in range(len(wrong)) if place not in broken)
    return Built(
        tuple(cases[n] for n in chosen), len(inputs), len(inputs) - len(cases), tuple(sorted(broken)), unbroken
    )


def generated(problem: Problem, config: BuildTestsConfig, sandbox: Sandbox, seed: int) -> list[str]:
    """Returns the distinct inputs of a problem's generators, in order. One that gives other inputs when run again is left out."""
    found: list[str] = []
    for number, source in enumerate(problem.generators):
        cases = [
            (kind, hash64("input", seed, problem.id, number, kind, n))
            for kind in KINDS
            for n in range(config.inputs_per_kind)
        ]
        wanted = json.dumps({"cases": cases, "most": config.max_input_characters}).encode()
        files = {"generator.py": source.encode("utf-8", "surrogatepass")}
        first, again = (sandbox.run([*PYTHON, "-c", _RUNNER], files, wanted) for _ in range(2))
        if first.stdout == again.stdout:
            found += _texts(first, len(cases))
    return list(dict.fromkeys(found))


def cover(breaks: Sequence[frozenset[int]], sizes: Sequence[int], least: int) -> list[int]:
    """Returns numbers of tests, rising, that together break all that any test breaks, and at least `least` if there are so many.

    Greedy: the test that breaks most of what is left comes next, the smaller one of two. What fills up to `least` breaks
    most in all.
    """
    left, chosen = set(frozenset().union(*breaks)), []
    rest = set(range(len(breaks)))
    while rest and (left or len(chosen) < least):
        best = min(rest, key=lambda n: (-len(breaks[n] & left), -len(breaks[n]), sizes[n], n))
        chosen.append(best)
        rest.remove(best)
        left -= breaks[best]
    return sorted(chosen)


def _texts(outcome: Outcome, count: int) -> list[str]:
    try:
        made = json.loads(outcome.stdout)
    except (ValueError, RecursionError):
        return []
    if outcome.status or outcome.stopped_by or not isinstance(made, list) or len(made) != count:
        return []
    return [text for text in made if isinstance(text, str)]


def _program(source: Source, reward: RewardConfig) -> Program | str:
    """Returns a program as the sandbox runs it, or why it does not compile."""
    if source.language == "python":
        return Program([*PYTHON, "main.py"], {"main.py": source.text.encode("utf-8", "surrogatepass")})
    binary = code_tests.compile_cpp(source.text, replace(reward, deadline_s=COMPILE_S))
    return Program(["./program"], {"program": binary}) if isinstance(binary, bytes) else binary


def _outputs(
    pool: ThreadPoolExecutor, sandbox: Sandbox, programs: Sequence[Program | str], inputs: Sequence[str]
) -> list[list[str | None]]:
    """Returns what each program prints for each input; None where it fails or there is no program."""

    def run(job: tuple[Program | str, str]) -> str | None:
        program, given = job
        if isinstance(program, str):
            return None
        outcome = sandbox.run(program.command, program.files, given.encode("utf-8", "surrogatepass"))
        return None if outcome.status or outcome.stopped_by else outcome.stdout.decode(errors="replace")

    printed = list(pool.map(run, [(program, given) for program in programs for given in inputs]))
    return [printed[n * len(inputs) : (n + 1) * len(inputs)] for n in range(len(programs))]


def _agree(outputs: Iterable[str | None], tolerance: float | None) -> bool:
    first, *others = outputs
    return first is not None and all(
        other is not None and code_tests.outputs_equal(other, first, tolerance) for other in others
    )
