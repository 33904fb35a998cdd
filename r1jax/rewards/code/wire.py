"""Messages between a test and the program under test: lines of JSON over a socket, which is the standard input of both.

Runs in both sandboxes, so it imports the standard library only. Only plain values are sent. Values are rebuilt from
exact built-in types, so that no method of the other side ever runs here. Any other object stays where it is; a number
refers to it.
"""

import builtins
import collections
import importlib
import json
import os
import sys

MAX_LINE_BYTES = 8 << 20
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
_MAPPINGS = {"dict": dict, "OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
_TEXTS = {  # tag -> (module, writer, reader); modules are imported when needed, because imports slow down every start
    "Decimal": ("decimal", "__str__", "__call__"),
    "Fraction": ("fractions", "__str__", "__call__"),
    "datetime": ("datetime", "isoformat", "fromisoformat"),
    "date": ("datetime", "isoformat", "fromisoformat"),
    "time": ("datetime", "isoformat", "fromisoformat"),
}
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_SMALL = 1 << 53


def encode(value, name):
    """Returns JSON for a value; `name(value)` gives the number that refers to an object that is not plain."""
    if value is None or value is True or value is False:
        return value
    for kind in (int, float, complex, str, bytes):
        if isinstance(value, kind) and type(value) is not kind:  # additions of a subclass are dropped
            value = int.__add__(value, 0) if kind is int else kind.__new__(kind, value)  # ty: ignore[no-matching-overload, invalid-argument-type] one kind a time
    if isinstance(value, str | float):
        return value
    if isinstance(value, int):
        return value if -_SMALL < value < _SMALL else ["int", hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, range):
        return ["range", *(encode(part, name) for part in (value.start, value.stop, value.step))]
    if hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
        return ["iterator", *(encode(item, name) for item in value)]
    if isinstance(value, _VIEWS):
        return ["set" if isinstance(value, _VIEWS[0]) else "list", *(encode(item, name) for item in value)]
    for tag, kind in reversed(_MAPPINGS.items()):
        if isinstance(value, kind):
            return [tag, *([encode(key, name), encode(item, name)] for key, item in value.items())]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *(encode(item, name) for item in value)]
    for tag, (module, writer, _) in _TEXTS.items():
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], tag)):
            return [tag, getattr(value, writer)()]
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return ["type", value.__name__]
    return ["object", name(value)]


def decode(data, named):
    """Returns the value of JSON made by `encode`; `named(number)` gives the object for a number. Raises ValueError."""
    if data is None or isinstance(data, bool | str | float | int):
        return data
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ValueError(f"not a value: {str(data)[:80]}")
    tag, rest = data[0], data[1:]
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode(item, named) for item in rest)
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({decode(key, named): decode(item, named) for key, item in rest})
    if tag == "iterator":
        return iter([decode(item, named) for item in rest])
    if tag == "int":
        return int(rest[0], 16)
    if tag == "complex":
        return complex(*rest)
    if tag in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(rest[0])
    if tag == "range":
        return range(*(decode(part, named) for part in rest))
    if tag in _TEXTS:
        module, _, reader = _TEXTS[tag]
        kind = getattr(importlib.import_module(module), tag)
        return kind(rest[0]) if reader == "__call__" else getattr(kind, reader)(rest[0])
    if tag == "type" and isinstance(vars(builtins).get(rest[0]), type):
        return vars(builtins)[rest[0]]
    if tag == "object":
        return named(rest[0])
    raise ValueError(f"not a value: {tag[:80]}")


class Remote:
    """A proxy of an object on the other side, by number or name. It can be used and sent back, but not compared."""

    __ask__ = None  # set by the importing program: (action, remote, arguments, keywords) -> the other side's answer

    def __init__(self, target):
        object.__setattr__(self, "_target", target)

    def __call__(self, *arguments, **keywords):
        return Remote.__ask__("call", self, arguments, keywords)  # ty: ignore[not-callable]

    def __getattr__(self, name):
        return Remote.__ask__("get", self, (name,))  # ty: ignore[not-callable]

    def __setattr__(self, name, value):
        Remote.__ask__("set", self, (name, value))  # ty: ignore[not-callable]

    def refuse(self, *_):
        raise TypeError("what was returned is not a plain value: it cannot be compared or judged true")

    __eq__ = __ne__ = __bool__ = __hash__ = refuse
    del refuse


def target_of(value):
    """Returns the number or name of a Remote. Raises TypeError for any other object, which cannot be sent."""
    if not isinstance(value, Remote):
        raise TypeError(f"a test passes {type(value).__name__} to the program, which cannot be sent")
    return object.__getattribute__(value, "_target")


def request(action, target, arguments, keywords, name):
    """Returns the message of a request; `name` as in `encode`."""
    encoded = [encode(value, name) for value in arguments]
    named = {key: encode(value, name) for key, value in (keywords or {}).items()}
    return {"do": action, "target": target, "arguments": encoded, "keywords": named}


def act(message, value, objects):
    """Performs a message of `request` on a value (call it, get or set an attribute) and returns the result."""
    arguments = [decode(item, objects.__getitem__) for item in message["arguments"]]
    keywords = {key: decode(item, objects.__getitem__) for key, item in message["keywords"].items()}
    if message["do"] == "call":
        return value(*arguments, **keywords)
    return {"get": getattr, "set": setattr}[message["do"]](value, *arguments)


def serve(link, answer):
    """Answers every message until the other side ends."""
    while True:
        try:
            message = link.receive()
        except EOFError:
            return
        link.send(answer(message))


class Link:
    """One end of the socket, moved away from standard input, so that code that reads or prints cannot disturb it."""

    def __init__(self):
        self._descriptor = os.dup(0)
        self._lines = open(self._descriptor, "rb", closefd=False)
        silence = os.open(os.devnull, os.O_RDWR)
        os.dup2(silence, 0)
        os.dup2(silence, 1)

    def send(self, message):
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]

    def receive(self):
        """Returns the next message. Raises EOFError at the end, ValueError for a line that is too long or not JSON."""
        line = self._lines.readline(MAX_LINE_BYTES)
        if not line:
            raise EOFError("the program ended before its tests did")
        if not line.endswith(b"\n"):
            raise ValueError(f"the program sent half a line, or one of more than {MAX_LINE_BYTES} bytes")
        return json.loads(line)
