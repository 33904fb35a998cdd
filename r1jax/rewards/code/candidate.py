"""Holds the program under test and serves the requests of its tests; see wire.py. Runs in its own sandbox.

The program may do anything to this process: only answers to requests leave it, and no expected value is in it.
"""

import os
import sys
import types

sys.path.insert(0, os.getcwd())
import code_wire  # noqa: E402

link = code_wire.Link()
module = types.ModuleType("solution")
objects = []


def name(value):
    objects.append(value)
    return len(objects) - 1


def perform(request):
    """Returns the result of one request: call, get or set, on an object by number or a global by name."""
    target = request["target"]
    value = objects[target] if isinstance(target, int) else vars(module)[target]
    return code_wire.act(request, value, objects)


def answer(action, *arguments):
    try:
        return ["ok", code_wire.encode(action(*arguments), name)]
    except BaseException as error:  # exits too: they must not end this process, so that the test goes on and fails
        if not isinstance(error, Exception):
            error = RuntimeError(f"the program raised {type(error).__name__}")
        return ["error", type(error).__name__, str(error)[:500]]


def load():
    """Runs the prompt's code, if any, and then the program, in one module. A bare function body extends the prompt."""
    sys.modules["solution"] = module
    texts = []
    for path in ("prompt.py", "program.py"):
        with open(path, encoding="utf-8") as file:
            texts.append(file.read())
    try:
        parts = [compile(text, "solution", "exec") for text in texts]
    except SyntaxError as error:
        try:
            parts = [compile("\n".join(texts), "solution", "exec")]
        except SyntaxError:
            raise error from None
    for part in parts:
        exec(part, vars(module))


link.send(answer(load))
code_wire.serve(link, lambda request: answer(perform, request))
