"""Runs the tests of a function against a program in another sandbox; see wire.py. Runs in a sandbox too.

Standard output holds one JSON object, {"passed": bool, "detail": text}; nothing else can write to it.
"""

import builtins
import importlib
import json
import os
import sys
import types

sys.path.insert(0, os.getcwd())
import code_wire  # noqa: E402

verdict = os.dup(1)
link = code_wire.Link()


# Exceptions that would end a test's own loops, or need more arguments than a message.
_NOT_REBUILT = (StopIteration, StopAsyncIteration, UnicodeError)


class ProgramError(Exception):
    """The program raised an exception that is not built in, or sent an invalid reply."""


def ask(action, remote, arguments, keywords=None):
    link.send(code_wire.request(action, code_wire.target_of(remote), arguments, keywords, code_wire.target_of))
    return result(link.receive())


code_wire.Remote.__ask__ = staticmethod(ask)


def result(reply):
    """Returns the value of a reply. Raises the built-in Exception that the program raised, ProgramError for another."""
    match reply:
        case ["ok", value]:
            return code_wire.decode(value, code_wire.Remote)
        case ["error", str(kind), str(message)]:
            known = getattr(builtins, kind, None)
            if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, _NOT_REBUILT):
                raise known(message)
            raise ProgramError(f"{kind}: {message}")
    raise ProgramError("the program sent no reply but something else")


def importable():
    """Makes the program's names importable from the module `solution`."""

    def named(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return code_wire.Remote(name)

    sys.modules["solution"] = module = types.ModuleType("solution")
    module.__getattr__ = named


def run_tests(tests):
    """Runs all tests. Raises whatever the first failing one raises."""
    importable()
    space: dict = {"__name__": "tests"}
    if tests["kind"] == "python-check":
        exec(compile(tests["prompt"], "prompt", "exec"), space)
        exec(compile(tests["code"], "tests", "exec"), space)
        space[tests["entry_point"]] = candidate = code_wire.Remote(tests["entry_point"])
        space["check"](candidate)
        return
    space |= {name: code_wire.Remote(name) for name in tests["names"]}
    space |= {name: importlib.import_module(name) for name in tests["modules"]}
    exec(compile(tests["setup"], "setup", "exec"), space)
    for source in tests["asserts"]:
        exec(compile(source, "tests", "exec"), space)


def place(error):
    """Returns the line of the tests that raised, as a prefix of a message; "" if none did."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests":
            line = f"line {trace.tb_lineno} of the tests: "
        trace = trace.tb_next
    return line


def main():
    with open("tests.json", encoding="utf-8") as file:
        tests = json.load(file)
    if "random" in json.dumps(tests):
        importlib.import_module("random").seed(tests["seed"])
    try:
        result(link.receive())
        run_tests(tests)
        outcome = {"passed": True, "detail": "all tests passed"}
    except BaseException as error:  # any exception is a failure
        outcome = {"passed": False, "detail": f"{place(error)}{type(error).__name__}: {error}"[:500]}
    os.write(verdict, json.dumps(outcome).encode())


main()
