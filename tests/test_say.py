"""A run speaks on stderr through one function, in the one process that writes its files."""

import ast
import pathlib

import pytest

from r1jax.core import hosts
from r1jax.core.say import say

ROOT = pathlib.Path(__file__).resolve().parents[1]
OTHERS = {  # processes of their own, and the last line of one that ends
    "core/say.py",
    "core/urls.py",  # below core.say, which puts URLs into its lines; a run at a URL is one process
    "data/arithmetic.py",
    "launch.py",
    "plan/compile.py",
    "pod/launcher.py",  # runs on a laptop, without JAX and without processes that write for others
    "pod/shell.py",
}


@pytest.mark.parametrize("writes", [True, False])
def test_only_the_writing_process_says_lines(monkeypatch, capsys, writes):
    monkeypatch.setattr(hosts, "is_writer", lambda: writes)
    say("one", "two")
    say()
    assert capsys.readouterr() == ("", "one\ntwo\n" if writes else "")


def prints_on_stderr(source: str) -> bool:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(
        ast.unparse(call.func) == "print"
        and any(word.arg == "file" and ast.unparse(word.value) == "sys.stderr" for word in call.keywords)
        for call in calls
    )


def test_no_other_module_prints_on_stderr():
    package = ROOT / "r1jax"
    names = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    printing = {name for name in names if prints_on_stderr((package / name).read_text(encoding="utf-8"))}
    assert printing == OTHERS
