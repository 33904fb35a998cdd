"""Holds a repository that the model changed, in its own sandbox, and serves the requests of its tests; see bug_fix.py.

The repository may do anything to this process: only answers to requests leave it, and the tests are not in it.
"""

import importlib
import json
import os
import sys

sys.path.insert(0, os.getcwd())
import code_wire  # noqa: E402

link = code_wire.Link()
objects = []


def name(value):
    objects.append(value)
    return len(objects) - 1


def ancestry(kind):
    """Returns the names of an exception class and its bases, nearest first; without a module for built-in classes."""
    classes = [base for base in kind.__mro__ if issubclass(base, BaseException)]
    return [
        base.__name__ if base.__module__ == "builtins" else f"{base.__module__}.{base.__qualname__}" for base in classes
    ]


def perform(request):
    if request["do"] == "import":
        return importlib.import_module(*request["arguments"])
    return code_wire.act(request, objects[request["target"]], objects)


def answer(request):
    try:
        value = perform(request)
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["class", ancestry(value)]
        return ["ok", code_wire.encode(value, name)]
    except Exception as error:
        return ["error", ancestry(type(error)), str(error)[:500]]
    except BaseException as error:  # exits too: they must not end this process, so that the test goes on and fails
        return ["error", ["RuntimeError"], f"the repository raised {type(error).__name__}"]


with open("roots.json", encoding="utf-8") as file:
    roots = json.load(file)
os.makedirs("repository", exist_ok=True)
os.chdir("repository")
sys.path[:0] = [os.path.abspath(root) for root in roots]
code_wire.serve(link, answer)
