"""Holds the program under test and does what the test asks of it; see wire.py. Runs in a sandbox of its own.

The program may do as it likes with this process: all that comes out are answers to calls, and nothing in here knows the
right ones.
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
    except BaseException as error:  # exits too: they concern the program, and the test goes on to fail
        if not isinstance(error, Exception):
            error = RuntimeError(f"the program raised {type(error).__name__}")
        return ["error", type(error).__name__, str(error)[:500]]


def load():
    """Runs the prompt's code, if any, and then the program, in one module. A bare function body continues the prompt."""
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
