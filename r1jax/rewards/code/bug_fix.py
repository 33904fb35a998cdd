"""Grades bug fixes: after the response's change all unit tests of a repository must pass, failing and passing ones.

Tests and repository run in separate sandboxes and exchange messages over a socket (bug_fix_driver.py,
bug_fix_candidate.py). The changed code never shares a process with a test, so it can neither exit, patch the test
runner nor report results itself, and it cannot read the tests. Source: DeepSeek-R1, supplement B.3 (bug fixing: all
unit tests must pass).
"""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath

from r1jax.data import templates
from r1jax.rewards.code import edits
from r1jax.rewards.code.tests import companion, sandbox_of_sample
from r1jax.rewards.sandbox.run import PYTHON, Program
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig


@dataclass(frozen=True)
class Repository:
    """The repository of a bug-fix row. Ids of tests are PATH::function or PATH::Class::method."""

    files: dict[str, str]  # path -> text
    failing: tuple[str, ...]  # ids of tests
    passing: tuple[str, ...]  # ids of tests
    roots: tuple[str, ...]  # folders that are import roots

    def __post_init__(self):
        for path in self.files:
            edits.safe_path(path)
        if not self.failing:
            raise ValueError("'failing' names no test, at least one is needed")
        for test in (*self.failing, *self.passing):
            path, *names = test.split("::")
            if path not in self.files or not 1 <= len(names) <= 2 or not all(map(str.isidentifier, names)):
                raise ValueError(
                    f"the test {test!r} must be PATH::function or PATH::Class::method with a PATH of 'files'"
                )

    def is_test(self, path: str) -> bool:
        """Returns whether a file belongs to the tests, by an id, a folder `test` or `tests`, or its own name."""
        parts = PurePosixPath(path).parts
        named = parts[-1].startswith("test_") or parts[-1].endswith("_test.py") or parts[-1] in _HOOKS
        return named or bool({"test", "tests"} & {*parts[:-1]}) or path in {test.split("::")[0] for test in self.tests}

    @property
    def tests(self) -> tuple[str, ...]:
        return self.failing + self.passing


_HOOKS = ("conftest.py", "sitecustomize.py", "usercustomize.py")


def read_reference(reference: str) -> Repository:
    """Returns the repository of a reference, JSON {files, failing, passing?, roots?}. Raises ValueError if invalid."""
    try:
        fields = json.loads(reference)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the reference is not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("files"), dict):
        raise ValueError("the reference needs 'files', an object of texts by path")
    lists = [fields.get("failing", []), fields.get("passing", []), fields.get("roots", ["."])]
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
        raise ValueError("'failing', 'passing' and 'roots' must be lists of texts")
    if not all(isinstance(text, str) for text in fields["files"].values()):
        raise ValueError("'files' must hold texts")
    return Repository(dict(fields["files"]), *map(tuple, lists))


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns 1 if all failing and passing tests of the reference pass after the change in the response, else 0.

    An unreadable reference is unscorable. A change of a test file, an unsafe path or a diff that does not fit gives 0.
    Raises SandboxUnavailable where programs cannot be isolated.
    """
    try:
        repository = read_reference(request.reference)
    except ValueError as error:
        return Score(0.0, {}, False, str(error))
    try:
        files = edits.apply(templates.summary(request.text), repository.files)
    except ValueError as error:
        return Score(0.0, {}, True, str(error))
    touched = sorted(path for path in {*files, *repository.files} if files.get(path) != repository.files.get(path))
    if barred := [path for path in touched if repository.is_test(path)]:
        return Score(0.0, {}, True, f"the response changes {barred[0]}, which is of the tests")
    if not touched:
        return Score(0.0, {}, True, "the response changes nothing")
    failed = run_tests(repository, files, config)
    return Score(float(not failed), {}, True, failed or f"all {len(repository.tests)} tests passed")


def run_tests(repository: Repository, files: edits.Files, config: RewardConfig) -> str:
    """Returns "" if every test of the repository passes on `files`, else the first that did not and the reason."""
    tests = {path: text for path, text in repository.files.items() if repository.is_test(path)}
    code = {path: text for path, text in files.items() if not repository.is_test(path)}
    wanted = {"tests": repository.tests, "modules": importable(repository, code, tests)}
    driver, candidate = (
        Program(
            (*PYTHON, name),
            {name: companion(name), "code_wire.py": companion("wire.py"), more: json.dumps(value).encode()}
            | {f"repository/{path}": text.encode("utf-8", "surrogatepass") for path, text in texts.items()},
        )
        for name, more, value, texts in (
            ("bug_fix_driver.py", "tests.json", wanted, tests),
            ("bug_fix_candidate.py", "roots.json", repository.roots, code),
        )
    )
    tests_run, repository_run = sandbox_of_sample(config).converse(driver, candidate)
    limit = repository_run.stopped_by or tests_run.stopped_by
    stopped = f"; stopped by the {limit} limit" if limit else ""
    if tests_run.status or tests_run.stopped_by:
        return f"the tests did not end{stopped or f': status {tests_run.status}'}"
    results = json.loads(tests_run.stdout)
    missing = [test for test in repository.tests if results.get(test, "not run")]
    return f"{missing[0]}: {results.get(missing[0], 'not run')}{stopped}" if missing else ""


def importable(repository: Repository, code: edits.Files, tests: edits.Files) -> dict[str, str]:
    """Returns {name: folder} of the modules of the changed repository that tests may import (see `modules`).

    Modules that belong to the tests are not among them: a new file of the same name does not replace one.
    """
    theirs = (
        modules(tests, (".",)).keys() - modules(dict(repository.files.items() - tests.items()), repository.roots).keys()
    )
    return {name: folder for name, folder in modules(code, repository.roots).items() if name not in theirs}


def modules(files: edits.Files, roots: tuple[str, ...]) -> dict[str, str]:
    """Returns {module name: its folder, "" if it is not a package} of the Python files under the import roots."""
    folders: dict[str, str] = {}
    for root in roots:
        base = PurePosixPath(root)
        for path in map(PurePosixPath, files):
            if path.suffix != ".py" or not path.is_relative_to(base):
                continue
            parts = path.relative_to(base).with_suffix("").parts
            for depth in range(1, len(parts)):
                folders[".".join(parts[:depth])] = str(base.joinpath(*parts[:depth]))
            if parts[-1] != "__init__":
                folders.setdefault(".".join(parts), "")
    return folders
