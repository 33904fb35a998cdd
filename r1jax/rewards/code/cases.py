"""Builds the tests of a code prompt: generators make inputs, accepted programs give outputs, and few tests are kept.

Generators and programs run in the sandbox only. Source: DeepSeek-R1, supplement B.3.2: a model writes input generators;
tests on which accepted submissions disagree are dropped; subsets are kept that break known-wrong submissions.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from r1jax.data.hashing import hash64
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.code.programs import SourceCode
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.sandbox.run import PYTHON, Outcome, Program, Sandbox
from r1jax.schema import BuildTestsConfig, RewardConfig, replace

COMPILE_S = 60.0  # time limit for compiling one program; it may be long, because no sample waits for it
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
class CodeProblem:
    """A code prompt with input generators, and with programs that are known to be right or known to be wrong."""

    id: str
    statement: str
    accepted: tuple[SourceCode, ...]
    wrong: tuple[SourceCode, ...]
    generators: tuple[str, ...]
    float_tolerance: float | None = None


@dataclass(frozen=True)
class Built:
    """The tests of a problem, with counts of how they were chosen."""

    cases: tuple[tuple[str, str], ...]  # (input, output)
    inputs: int  # distinct inputs that the generators made
    dropped: int  # inputs on which an accepted program failed or two disagreed
    broken: tuple[int, ...]  # indices of wrong programs that fail at least one of the cases
    unbroken: tuple[int, ...]  # indices of wrong programs that pass all inputs


def prompt(statement: str) -> str:
    """Returns the prompt that asks a model for an input generator of a problem."""
    return PROMPT.format(statement=statement, kinds="\n".join(f"- {name}: {what}" for name, what in KINDS.items()))


def build(problem: CodeProblem, config: BuildTestsConfig, reward: RewardConfig, seed: int = 0) -> Built:
    """Returns the tests of a problem. Raises SandboxUnavailable where programs cannot be isolated.

    Raises ValueError when an accepted program does not compile.
    """
    sandbox = open_sandbox(reward.sandbox)
    with ThreadPoolExecutor(config.workers) as pool:
        inputs = generated(problem, config, sandbox, seed)
        accepted, wrong = ([_program(source, reward) for source in part] for part in (problem.accepted, problem.wrong))
        for number, program in enumerate(accepted):
            if isinstance(program, str):
                raise ValueError(f"problem {problem.id!r}: accepted program {number}: {program}")
        printed = _outputs(pool, sandbox, accepted, inputs)
        agreed = [
            outputs[0] if _agree(outputs, problem.float_tolerance) else None for outputs in zip(*printed, strict=True)
        ]
        cases = [(input_text, output) for input_text, output in zip(inputs, agreed, strict=True) if output is not None]
        runs = _outputs(pool, sandbox, wrong, [input_text for input_text, _ in cases])
    breaks = [
        frozenset(
            place
            for place, outputs in enumerate(runs)
            if (printed := outputs[number]) is None
            or not code_tests.outputs_equal(printed, output, problem.float_tolerance)
        )
        for number, (_, output) in enumerate(cases)
    ]
    sizes = [len(input_text) for input_text, _ in cases]
    chosen = cover(breaks, sizes, config.min_tests)
    broken = frozenset().union(*breaks)
    unbroken = tuple(place for place in range(len(wrong)) if place not in broken)
    return Built(
        tuple(cases[n] for n in chosen), len(inputs), len(inputs) - len(cases), tuple(sorted(broken)), unbroken
    )


def generated(problem: CodeProblem, config: BuildTestsConfig, sandbox: Sandbox, seed: int) -> list[str]:
    """Returns the distinct inputs of a problem's generators, in order, without those of nondeterministic generators."""
    inputs: list[str] = []
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
            inputs += _texts(first, len(cases))
    return list(dict.fromkeys(inputs))


def cover(breaks: Sequence[frozenset[int]], sizes: Sequence[int], least: int) -> list[int]:
    """Returns ascending indices of tests that together break every program that any test breaks.

    The choice is greedy: the next test is the one that breaks most of the remaining programs, and the smaller of two.
    Further tests, those that break most programs, are added up to `least`.
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
        texts = json.loads(outcome.stdout)
    except (ValueError, RecursionError):
        return []
    if outcome.status or outcome.stopped_by or not isinstance(texts, list) or len(texts) != count:
        return []
    return [text for text in texts if isinstance(text, str)]


def _program(source: SourceCode, reward: RewardConfig) -> Program | str:
    """Returns a program that the sandbox can run, or the reason why it does not compile."""
    if source.language == "python":
        return Program([*PYTHON, "main.py"], {"main.py": source.text.encode("utf-8", "surrogatepass")})
    binary = code_tests.compile_cpp(source.text, replace(reward, deadline_s=COMPILE_S))
    return Program(["./program"], {"program": binary}) if isinstance(binary, bytes) else binary


def _outputs(
    pool: ThreadPoolExecutor, sandbox: Sandbox, programs: Sequence[Program | str], inputs: Sequence[str]
) -> list[list[str | None]]:
    """Returns what each program prints for each input; None where it fails or did not compile."""

    def run(job: tuple[Program | str, str]) -> str | None:
        program, input_text = job
        if isinstance(program, str):
            return None
        outcome = sandbox.run(program.command, program.files, input_text.encode("utf-8", "surrogatepass"))
        return None if outcome.status or outcome.stopped_by else outcome.stdout.decode(errors="replace")

    printed = list(pool.map(run, [(program, input_text) for program in programs for input_text in inputs]))
    return [printed[n * len(inputs) : (n + 1) * len(inputs)] for n in range(len(programs))]


def _agree(outputs: Iterable[str | None], tolerance: float | None) -> bool:
    first, *others = outputs
    return first is not None and all(
        other is not None and code_tests.outputs_equal(other, first, tolerance) for other in others
    )
