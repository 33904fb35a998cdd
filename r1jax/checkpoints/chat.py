"""Chat templates of checkpoints, which are untrusted programs: rendered in a sandbox, within limits."""

import contextlib
import datetime
import functools
import json
import signal
import threading
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r1jax.core import errors
from r1jax.core.say import say

MOST_REPEATED = 1_000_000  # items that `*` may make of a text or list
LARGEST_POWER_BITS = 10_000
DEADLINE_S = 5.0  # of one rendering, in the main thread
TODAY = datetime.datetime.combine(datetime.date.today(), datetime.time())  # `strftime_now`: one for all of a process


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without access to private attributes and long ranges; products and powers are bounded too."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            bits = max(abs(left), 2).bit_length() if isinstance(left, int) else 1
            if isinstance(right, int) and bits * abs(right) > LARGEST_POWER_BITS:
                raise SecurityError(f"a power of {right} is too large")
        else:
            for many, times in ((left, right), (right, left)):
                if hasattr(many, "__len__") and isinstance(times, int) and len(many) * times > MOST_REPEATED:
                    raise SecurityError(f"{times} repetitions are too many")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what a model writes; rendered as its content."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller) -> str:
        return caller()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Returns JSON as transformers' filter writes it; Jinja's own would escape what HTML reserves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    _say_date()
    return TODAY.strftime(form)


@functools.cache
def _say_date() -> None:
    """Prints, once a run, the date that templates are given."""
    say(f"the chat template states a date: all prompts of this run say {TODAY:%Y-%m-%d}")


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    functions: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.globals |= functions
    environment.filters["tojson"] = _json
    return environment.from_string(template)


def render(template: str, values: dict[str, Any]) -> str:
    """Returns the template rendered with `values`. Raises ValueError in one line for any error inside it.

    A rendering of more than DEADLINE_S seconds is stopped, where it runs in the main thread.
    """
    try:
        with _deadline(DEADLINE_S):
            return _compiled(template).render(**values)
    except Exception as error:  # a template can raise anything: it is a program
        describe = errors.one_line if isinstance(error, TemplateError) else errors.named
        raise ValueError(describe(error, 500)) from None


@contextlib.contextmanager
def _deadline(seconds: float):
    """Raises TimeoutError in the block after so many seconds; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"not rendered within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
