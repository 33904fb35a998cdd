"""Runs a repository's tests against its modules in another sandbox; see bug_fix.py. Runs in a sandbox too.

What the tests import from the repository is a proxy of an object in the other sandbox: calls and reads are sent there,
and only plain values and exceptions come back. Prints one JSON object {test id: "" or the failure}.
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
# Comparison, `in` and arithmetic are not forwarded: the repository must not decide whether an expected value is right.
FORWARDED = ("__len__", "__getitem__", "__setitem__", "__delitem__", "__iter__", "__str__", "__repr__", "__enter__")
exception_classes = {}


class Ended(RuntimeError):
    """The repository raised StopIteration. Only `next` raises it again, so that it cannot end a test's loop."""


class RemoteObject(code_wire.Remote):
    """A proxy of an object of the repository; tests may also iterate over it and use it as a context manager."""

    def __next__(self):
        try:
            return ask("call", ask("get", self, ("__next__",)), ())
        except Ended:
            raise StopIteration from None

    def __exit__(self, *_):
        ask("call", ask("get", self, ("__exit__",)), (None, None, None))
        return False  # the repository may not suppress what a test raises


def forward(name):
    return lambda self, *arguments: ask("call", ask("get", self, (name,)), arguments)


for special in FORWARDED:
    setattr(RemoteObject, special, forward(special))


class RemoteModule(types.ModuleType):
    """A proxy of a module of the repository; submodules and attributes of the import system are kept here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask("get", object.__getattribute__(self, "_remote"), (name,))

    def __setattr__(self, name, value):
        if name.startswith("_") or isinstance(value, types.ModuleType):
            super().__setattr__(name, value)
        else:
            ask("set", self._remote, (name, value))


class RepositoryFinder:
    """Import finder and loader of the repository's modules; those with the name of a standard module are not found."""

    def __init__(self, modules):
        self.modules = modules  # name -> directory of those submodules that belong to the tests; "": not a package

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
        return code_wire.decode(reply[1], RemoteObject)
    kind = exception_class([str(name) for name in reply[1]])
    if reply[0] == "class":
        return kind
    raise kind(str(reply[2]))


code_wire.Remote.__ask__ = staticmethod(ask)


def exception_class(ancestry):
    """Returns the local class for an exception class, given its name and those of its bases, in order.

    Classes of the repository are created here, so that tests can refer to them. A BaseException that is no Exception
    becomes RuntimeError.
    """
    name, *bases = ancestry or ["RuntimeError"]
    known = getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, BaseException):
        if issubclass(known, StopIteration):
            return Ended
        return known if issubclass(known, Exception) and not issubclass(known, UnicodeError) else RuntimeError
    if tuple(ancestry) not in exception_classes:
        local_class = type(name.rpartition(".")[2], (exception_class(bases),), {})
        exception_classes[tuple(ancestry)] = local_class
    return exception_classes[tuple(ancestry)]


def load(path):
    """Returns the module of a test file, which is executed at the first call."""
    name = path.removesuffix(".py").replace("/", ".")
    if name not in loaded:
        module = types.ModuleType(name)
        module.__file__, module.__package__ = path, name.rpartition(".")[0]
        sys.modules[name] = loaded[name] = module
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), vars(module))
    return loaded[name]


def run(test):
    """Returns "" if the test with the id PATH::function or PATH::Class::method passes, else the failure."""
    path, *names = test.split("::")
    owner = load(path)
    for name in names[:-1]:
        owner = getattr(owner, name)
    if isinstance(owner, type) and issubclass(owner, unittest.TestCase):
        result = unittest.TestResult()
        unittest.TestSuite([owner(names[-1])]).run(result)
        problems = [text for _, text in (*result.failures, *result.errors, *result.skipped)]
        passed = result.testsRun == 1 and result.wasSuccessful() and not problems
        return "" if passed else "".join(problems).strip().rpartition("\n")[2][:300] or "the test did not run"
    owner = owner() if isinstance(owner, type) else owner
    # A coroutine or a generator would not have run yet.
    return "" if getattr(owner, names[-1])() is None else "the test returns a value, it may have asserted nothing"


warnings.filterwarnings("error", message="It is deprecated to return a value")  # unittest's, for the same reason
loaded = {}
with open("tests.json", encoding="utf-8") as file:
    wanted = json.load(file)
sys.meta_path.insert(0, RepositoryFinder(wanted["modules"]))
sys.path.append(os.path.join(os.getcwd(), "repository"))
os.makedirs("repository", exist_ok=True)
os.chdir("repository")
results = {}
for test in wanted["tests"]:
    try:
        results[test] = run(test)
    except BaseException as error:  # any exception is a failure
        results[test] = f"{type(error).__name__}: {error}"[:300]
    if results[test]:
        break  # one failure is enough: the reward is 1 or 0
os.write(verdict, json.dumps(results).encode())
