"""Runs a repository's tests against its modules in another sandbox; see bug_fix.py. Runs in a sandbox too.

What the tests import of the repository stands for something in the other sandbox: calling and reading it goes there, and
only plain values and exceptions come back. Standard output gets one JSON object {test id: "" or what went wrong}.
"""

import builtins
import importlib.machinery
import json
import os
import sys
import types
import unittest
import warnings

sys.path.insert(0, os.getcwd())
import code_wire  # noqa: E402

verdict = os.dup(1)
link = code_wire.Link()
# No comparison, `in` or arithmetic: what they say of an expected value must be found out here.
FORWARDED = ("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__str__", "__repr__", "__enter__")
exception_classes = {}


class Ended(RuntimeError):
    """The repository raised StopIteration: an end for `next` alone, or a test's loop could be ended from there."""


class Remote(code_wire.Remote):
    """Something of the repository's: tests may also iterate over it and use it as a context."""

    def __next__(self):
        try:
            return ask("call", ask("get", self, ("__next__",)), ())
        except Ended:
            raise StopIteration from None

    def __exit__(self, *_):
        ask("call", ask("get", self, ("__exit__",)), (None, None, None))
        return False  # what a test raises inside is not the repository's to swallow


def forward(name):
    return lambda self, *arguments: ask("call", ask("get", self, (name,)), arguments)


for special in FORWARDED:
    setattr(Remote, special, forward(special))


class RemoteModule(types.ModuleType):
    """A module of the repository; submodules and the import system's own marks are kept here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask("get", object.__getattribute__(self, "_remote"), (name,))

    def __setattr__(self, name, value):
        if name.startswith("_") or isinstance(value, types.ModuleType):
            super().__setattr__(name, value)
        else:
            ask("set", self._remote, (name, value))


class Repository:
    """Finds the repository's modules for imports, except where the standard library has one of that name."""

    def __init__(self, modules):
        self.modules = modules  # name -> directory that its submodules of the tests are in, or "" for no package

    def find_spec(self, name, path=None, target=None):
        if name not in self.modules or name.split(".")[0] in sys.stdlib_module_names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=bool(self.modules[name]))  # ty: ignore[invalid-argument-type] finder and loader in one

    def create_module(self, spec):
        module = RemoteModule(spec.name)
        module._remote = ask("import", None, (spec.name,))
        return module

    def exec_module(self, module):
        if folder := self.modules[module.__name__]:
            module.__path__ = [os.path.abspath(folder)]


def target_of(value):
    return code_wire.target_of(value._remote if isinstance(value, RemoteModule) else value)


def ask(action, remote, arguments, keywords=None):
    target = None if remote is None else target_of(remote)
    link.send(code_wire.request(action, target, arguments, keywords, target_of))
    reply = link.receive()
    if reply[0] == "ok":
        return code_wire.decode(reply[1], Remote)
    kind = exception_class([str(name) for name in reply[1]])
    if reply[0] == "class":
        return kind
    raise kind(str(reply[2]))


code_wire.Remote.__ask__ = staticmethod(ask)


def exception_class(ancestry):
    """Returns the local class for an exception class, given its name and those of its bases, in order.

    The repository's own are made here, so that tests may name them; what is no Exception comes as RuntimeError.
    """
    name, *bases = ancestry or ["RuntimeError"]
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, BaseException):
        if issubclass(known, StopIteration):
            return Ended
        return known if issubclass(known, Exception) and not issubclass(known, UnicodeError) else RuntimeError
    if tuple(ancestry) not in exception_classes:
        made = type(name.rpartition(".")[2], (exception_class(bases),), {})
        exception_classes[tuple(ancestry)] = made
    return exception_classes[tuple(ancestry)]


def load(path):
    """Returns the module of a test file, run once."""
    name = path.removesuffix(".py").replace("/", ".")
    if name not in loaded:
        module = types.ModuleType(name)
        module.__file__, module.__package__ = path, name.rpartition(".")[0]
        sys.modules[name] = loaded[name] = module
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), vars(module))
    return loaded[name]


def run(test):
    """Returns "" when the test of an id PATH::function or PATH::Class::method passes, else what went wrong."""
    path, *names = test.split("::")
    found = load(path)
    for name in names[:-1]:
        found = getattr(found, name)
    if isinstance(found, type) and issubclass(found, unittest.TestCase):
        result = unittest.TestResult()
        unittest.TestSuite([found(names[-1])]).run(result)
        problems = [text for _, text in (*result.failures, *result.errors, *result.skipped)]
        passed = result.testsRun == 1 and result.wasSuccessful() and not problems
        return "" if passed else "".join(problems).strip().rpartition("\n")[2][:300] or "the test did not run"
    found = found() if isinstance(found, type) else found
    # A coroutine or a generator has run nothing yet.
    return "" if getattr(found, names[-1])() is None else "the test returns a value, it may have asserted nothing"


warnings.filterwarnings("error", message="It is deprecated to return a value")  # unittest's, for the same
loaded = {}
with open("tests.json", encoding="utf-8") as file:
    wanted = json.load(file)
sys.meta_path.insert(0, Repository(wanted["modules"]))
sys.path.append(os.path.join(os.getcwd(), "repository"))
os.makedirs("repository", exist_ok=True)
os.chdir("repository")
results = {}
for test in wanted["tests"]:
    try:
        results[test] = run(test)
    except BaseException as error:  # whatever happens, not passed
        results[test] = f"{type(error).__name__}: {error}"[:300]
    if results[test]:
        break  # one is enough: the reward is all or nothing
os.write(verdict, json.dumps(results).encode())
