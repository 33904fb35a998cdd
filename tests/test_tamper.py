"""Nothing of tests/tamper_cases.py is paid, gets out, stays, or takes the trainer with it; its honest twin is paid in full."""

import ast
import hashlib
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tamper_cases import PROGRAMS, TEXT, Case

from r1jax import rewards
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.sandbox import run as sandbox
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import Limits, RewardConfig, SandboxConfig

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(shutil.which(tool) is None, reason=f"{name}: no {tool} for the sandbox")
    )
    for name, tool in (("bubblewrap", "bwrap"), ("unshare", "unshare"))
]
LIMITS = {
    **{"wall_s": 12.0, "cpu_s": 1.0, "memory_bytes": (224 << 20) + os.getpid(), "processes": 8, "file_bytes": 1 << 20},
    **{"disk_bytes": 4 << 20, "output_bytes": 64 << 10},
}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What the attacks aim at: a file, a listening socket, a variable of the environment, our checkout."""
    bait = tmp_path_factory.mktemp("bait")
    (bait / "secret.txt").write_text("the secret")
    bait.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listening, pytest.MonkeyPatch.context() as patch:
        name = f"r1jax-tamper-{os.getpid()}"
        listening.bind("\0" + name)
        listening.listen()
        patch.setenv("R1JAX_TAMPER_SECRET", "the secret")
        yield {"bait": str(bait), "repository": str(REPOSITORY), "socket": name}


def state(outside: dict) -> dict[str, str]:
    """Returns {path: digest} of the files that an attack could want to change."""
    roots = [pathlib.Path(outside["bait"]), REPOSITORY / "r1jax" / "rewards", REPOSITORY / "tests"]
    files = [path for root in roots for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files += [path for path in REPOSITORY.iterdir() if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def left_of(memory_bytes: int) -> list[str]:
    """Returns the processes that have this limit of the address space, which programs in the sandbox inherit."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            limits = pathlib.Path(f"/proc/{name}/limits").read_text()
        except OSError:
            continue
        if f" {memory_bytes} " in limits:
            found.append(name)
    return found


def graded(cases: list[Case], outside: dict, config: RewardConfig) -> dict[str, tuple[Score, Score]]:
    """Returns {case: (score of the attack, score of its twin)}, graded by one pool, and nothing else of them left."""
    before, started = state(outside), time.monotonic()
    requests = [
        RewardRequest(f"{case.name}, {role}", case.task, case.prompt, text.format(**outside), case.reference)
        for case in cases
        for role, text in (("attack", case.response), ("twin", case.twin))
    ]
    with RewardPool(config) as pool:
        scores = pool.score(requests)
        again = pool.score(requests[1:2])  # the pool lives on
    assert again[0].parts["accuracy"] == 1.0, again[0].detail
    assert time.monotonic() - started < config.batch_deadline_s
    assert left_of(config.sandbox.memory_bytes) == []
    assert state(outside) == before
    assert os.environ["R1JAX_TAMPER_SECRET"] == "the secret"
    return {case.name: pair for case, pair in zip(cases, zip(scores[::2], scores[1::2], strict=True), strict=True)}


@pytest.fixture(scope="module", params=BACKENDS)
def programs(request, outside):
    limits = SandboxConfig(backend=request.param, **LIMITS)
    config = RewardConfig(workers=3, deadline_s=60.0, batch_deadline_s=600.0, sandbox=limits)
    return graded(PROGRAMS, outside, config)


@pytest.fixture(scope="module")
def texts(outside):
    return graded(
        TEXT, outside, RewardConfig(workers=2, deadline_s=3.0, batch_deadline_s=600.0, sandbox=SandboxConfig(**LIMITS))
    )


def test_the_suite_has_its_sixty_cases_each_with_a_name_of_its_own():
    cases = [*PROGRAMS, *TEXT]
    assert len({case.name for case in cases}) == len(cases) >= 60


def test_a_program_that_runs_is_found_by_the_limit_that_marks_it():
    limits = Limits(wall_s=20.0, memory_bytes=(96 << 20) + os.getpid())
    with ThreadPoolExecutor(1) as thread:
        command = [*sandbox.PYTHON, "-c", "import time; time.sleep(2)"]
        run = thread.submit(sandbox.Sandbox(limits, "unshare").run, command, {})
        found: list[str] = []
        while not found and not run.done():
            found = left_of(limits.memory_bytes)
        assert found
        assert run.result().status == 0
    assert left_of(limits.memory_bytes) == []


def assert_stopped(case: Case, pair: tuple[Score, Score]) -> None:
    attack, twin = pair
    assert attack.parts[case.part] == 0.0, attack.detail
    assert re.search(case.stopped, attack.detail), attack.detail
    assert (twin.scorable, twin.parts[case.part]) == (True, 1.0), twin.detail


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: case.name)
def test_a_hostile_program_is_stopped_by_its_defence_and_its_twin_is_paid(case, programs):
    assert programs[case.name][0].scorable, "a hostile program is wrong, not ungradable"
    assert_stopped(case, programs[case.name])


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_a_hostile_answer_is_stopped_and_its_twin_is_paid(case, texts):
    assert_stopped(case, texts[case.name])


def test_no_program_is_started_but_by_the_sandbox():
    """What starts processes, or compiles or executes text, is named here; files that run inside are imported by nothing."""
    inside = re.compile(r"init|probe|wire|code_wire|(\w+_)?(candidate|driver)")
    starts = re.compile(
        r"(subprocess|pty)\.\w+|os\.(system|exec\w*|spawn\w*|posix_spawn\w*|fork\w*|popen)|exec|eval|compile"
    )
    found = set()
    for path in pathlib.Path(rewards.__file__).parent.rglob("*.py"):
        if inside.fullmatch(path.stem):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and starts.fullmatch(ast.unparse(node.func)):
                found.add((path.name, ast.unparse(node.func)))
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name.rpartition(".")[2] for alias in node.names]
                assert not any(inside.fullmatch(name) for name in names), path.name
    assert found == {("run.py", "subprocess.Popen")}
