"""Runs the tests of a function against a program in another sandbox; see code_wire.py. Runs in a sandbox too.

Standard output gets one JSON object, {"passed": bool, "detail": text}, and nothing else can write there.
"""

import builtins
import importlib
import json
import os
import sys

sys.path.insert(0, os.getcwd())
import code_wire  # noqa: E402

verdict = os.dup(1)
link = code_wire.Link()


def refuse(*_):
    raise TypeError("the program returned something that is not a plain value")


class Remote:
    """Something of the program's, by number or global name. It can be called and passed back, but not compared or judged true."""

    def __init__(self, target):
        object.__setattr__(self, "_target", target)

    def __call__(self, *arguments, **keywords):
        return ask("call", self, arguments, keywords)

    def __getattr__(self, name):
        return ask("get", self, (name,))

    def __setattr__(self, name, value):
        ask("set", self, (name, value))

    __eq__ = __ne__ = __bool__ = __hash__ = refuse


# They mean something to a test's own loops, or are made of more than a message.
_NOT_REBUILT = (StopIteration, StopAsyncIteration, UnicodeError)


class ProgramError(Exception):
    """The program raised something that is no built-in exception, or broke the conversation."""


def number_of(value):
    if not isinstance(value, Remote):
        raise TypeError(f"a test passes {type(value).__name__} to the program, which cannot be sent")
    return object.__getattribute__(value, "_target")


def ask(action, remote, arguments, keywords={}):  # noqa: B006 - never changed
    encoded = [code_wire.encode(value, number_of) for value in arguments]
    named = {key: code_wire.encode(value, number_of) for key, value in keywords.items()}
    link.send({"do": action, "target": number_of(remote), "arguments": encoded, "keywords": named})
    return result(link.receive())


def result(reply):
    """Returns the value of a reply. Raises what the program raised: a built-in Exception of that name, or ProgramError."""
    match reply:
        case ["ok", value]:
            return code_wire.decode(value, Remote)
        case ["error", str(kind), str(message)]:
            known = getattr(builtins, kind, None)
            if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, _NOT_REBUILT):
                raise known(message)
            raise ProgramError(f"{kind}: {message}")
    raise ProgramError("the program sent no reply but something else")


def run_tests(tests):
    """Runs every test to its end. Raises whatever the first that fails raises."""
    space = {"__name__": "tests"}
    if tests["kind"] == "python-check":
        exec(compile(tests["prompt"], "prompt", "exec"), space)
        exec(compile(tests["code"], "tests", "exec"), space)
        space[tests["entry_point"]] = candidate = Remote(tests["entry_point"])
        space["check"](candidate)
        return
    space |= {name: Remote(name) for name in tests["names"]}
    space |= {name: importlib.import_module(name) for name in tests["modules"]}
    exec(compile(tests["setup"], "setup", "exec"), space)
    for source in tests["asserts"]:
        exec(compile(source, "tests", "exec"), space)


def place(error):
    """Returns the line of the tests that raised, "" for none."""
    found, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests":
            found = f"line {trace.tb_lineno} of the tests: "
        trace = trace.tb_next
    return found


def main():
    with open("tests.json", encoding="utf-8") as file:
        tests = json.load(file)
    if "random" in json.dumps(tests):
        importlib.import_module("random").seed(tests["seed"])
    try:
        result(link.receive())
        run_tests(tests)
        outcome = {"passed": True, "detail": "all tests passed"}
    except BaseException as error:  # whatever happens, not passed
        outcome = {"passed": False, "detail": f"{place(error)}{type(error).__name__}: {error}"[:500]}
    os.write(verdict, json.dumps(outcome).encode())


main()
