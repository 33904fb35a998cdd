"""The one module that imports JetStream (google-jetstream 0.2.2): its engine types, Driver and gRPC server.

JetStream's wheel imports `seqio`, and through it tensorflow, for tokenizers that r1jax never builds. Empty placeholder
modules take those names while JetStream is imported and are removed afterwards, so a later `import seqio` gets the real
one. Where JetStream is not installed, this module defines classes with the same names, which suffice for the rollout
sampler; `AVAILABLE` is then False, `notice()` returns what is disabled, and `orchestrator()` and `server_lib()` raise.
"""

import contextlib
import functools
import importlib.util
import logging
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import struct

LIGHT_INSTALL = "pip install '.[jetstream-light]' && pip install --no-deps google-jetstream==0.2.2"


class _AbsentTokenizer:
    """Base of the placeholder classes: they can be subclassed but not instantiated."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise ValueError(
            f"jetstream: {type(self).__name__} needs seqio, which r1jax does not load; "
            "build the engine with its own tokenizer (Engine.build_tokenizer)"
        )


def _placeholders() -> dict[str, ModuleType]:
    """Returns placeholders, by name, for modules that JetStream imports: seqio, and tiktoken if not installed."""
    modules: dict[str, Any] = {}
    if "seqio" not in sys.modules:
        vocabularies: Any = ModuleType("seqio.vocabularies")
        vocabularies.Vocabulary = type("Vocabulary", (_AbsentTokenizer,), {})
        vocabularies.SentencePieceVocabulary = type("SentencePieceVocabulary", (_AbsentTokenizer,), {})
        seqio: Any = ModuleType("seqio")
        modules["seqio"], seqio.vocabularies = seqio, vocabularies
        modules["seqio.vocabularies"] = vocabularies
    if "tiktoken" not in sys.modules and importlib.util.find_spec("tiktoken") is None:
        load: Any = ModuleType("tiktoken.load")
        load.load_tiktoken_bpe = _AbsentTokenizer
        tiktoken: Any = ModuleType("tiktoken")
        modules["tiktoken"], tiktoken.load = tiktoken, load
        modules["tiktoken.load"] = load
    return modules


@contextlib.contextmanager
def _clean_import() -> Generator[None]:
    """Keeps the placeholders in sys.modules, and restores the root logger afterwards (JetStream sets it to DEBUG)."""
    modules = _placeholders()
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        root.setLevel(level)
        root.handlers[:] = handlers


try:
    with _clean_import():
        from jetstream.engine import engine_api, tokenizer_api, tokenizer_pb2
    AVAILABLE, _REASON = True, ""
except Exception as error:  # absent, or broken by another package's version: the sampler works without it
    AVAILABLE, _REASON = False, f"{type(error).__name__}: {error}"


if TYPE_CHECKING:
    from jetstream.core.orchestrator import Driver
else:
    Driver = object  # the real one is imported when a driver is made: see `orchestrator`

if AVAILABLE:
    Engine = engine_api.Engine
    ResultTokens = engine_api.ResultTokens
    SlotData = engine_api.SlotData
    Tokenizer = tokenizer_api.Tokenizer
    TokenizerParameters = tokenizer_pb2.TokenizerParameters  # ty: ignore[missing-attribute] protobuf makes it
else:

    class EngineBase:
        """Base of r1jax's engine where JetStream, which has an abstract class here, is not installed."""

    Engine = EngineBase

    @struct.dataclass
    class SlotData:
        """Output of one slot, arrays of [samples_per_slot, tokens]; `lengths` is [samples_per_slot]."""

        tokens: jax.Array | np.ndarray
        valid: jax.Array | np.ndarray
        lengths: jax.Array | np.ndarray

    @struct.dataclass
    class ResultTokens:
        """Output of one generate call, packed in one array so that one transfer brings it to the host.

        `data` is int32 [slots * samples_per_slot, columns]; each `*_idx` is the (first, last + 1) columns of its part.
        """

        data: jax.Array | np.ndarray
        tokens_idx: tuple[int, int] = struct.field(pytree_node=False)
        valid_idx: tuple[int, int] = struct.field(pytree_node=False)
        length_idx: tuple[int, int] = struct.field(pytree_node=False)
        samples_per_slot: int = struct.field(pytree_node=False)

        def copy_to_host_async(self) -> None:
            if isinstance(self.data, jax.Array):
                self.data.copy_to_host_async()

        def convert_to_numpy(self) -> "ResultTokens":
            """Returns the same result with `data` in host memory; waits for the device."""
            return replace(self, data=np.array(self.data))

        def get_result_at_slot(self, slot: int) -> SlotData:
            """Returns the rows of `slot`."""
            rows = self.data[slot * self.samples_per_slot : (slot + 1) * self.samples_per_slot]
            return SlotData(  # ty: ignore[invalid-explicit-return] the one above
                tokens=rows[:, slice(*self.tokens_idx)],
                valid=rows[:, slice(*self.valid_idx)],
                lengths=rows[:, self.length_idx[0]],
            )

    class TokenizerBase:
        """Base of r1jax's tokenizers where JetStream, which has an abstract class here, is not installed."""

        eos_id: int
        pad_id: int

        @property
        def stop_tokens(self) -> set[int]:
            return {self.eos_id, self.pad_id}

    Tokenizer = TokenizerBase

    @dataclass
    class TokenizerParameters:
        """Where a tokenizer is read from; in JetStream it is a protocol buffer with these fields."""

        path: str = ""
        extra_ids: int = 0


def notice() -> str:
    """Returns one line on what is disabled without JetStream, or "" where JetStream is installed."""
    if AVAILABLE:
        return ""
    return (
        f"JetStream is not available ({_REASON}): rollouts use r1jax's scheduler as always, "
        f"but serving (Driver, gRPC) is off; to turn it on: {LIGHT_INSTALL}"
    )


class _DaemonThread(threading.Thread):
    """Replaces JetThread, which kills the process on an exception and may keep it from exiting."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "daemon": True})


def _keep_prefix(prefix: Any) -> None:
    """Replaces delete_pytree and deletes nothing: a prefix may be shared by several slots."""


def _import_core(name: str) -> Any:
    """Returns jetstream.core.<name>. Raises ValueError, in one line, where something is missing."""
    if not AVAILABLE:
        raise ValueError(notice())
    if hasattr(Engine, "bulk_insert"):
        raise ValueError(
            "serving: the installed JetStream is newer than 0.2.2, whose Driver is needed; " + LIGHT_INSTALL
        )
    try:
        with _clean_import():
            module: Any = importlib.import_module(f"jetstream.core.{name}")
    except ImportError as error:
        raise ValueError(f"serving: jetstream.core.{name} cannot be imported ({error}); {LIGHT_INSTALL}") from error
    module.logging = logging.getLogger(f"jetstream.{name}")  # its logging.info() would configure the root logger
    return module


@functools.cache
def orchestrator() -> Any:
    """Returns jetstream.core.orchestrator with the replacements `_DaemonThread` and `_keep_prefix`.

    Raises ValueError where JetStream, or a package that its Driver needs, is not installed.
    """
    module = _import_core("orchestrator")
    module.JetThread = _DaemonThread
    module.delete_pytree = _keep_prefix  # the original also calls jax.tree_map, which JAX no longer has
    return module


@functools.cache
def server_lib() -> Any:
    """Returns jetstream.core.server_lib, bound to the loopback address because its server has no authentication.

    Raises ValueError where JetStream, or a package that its server needs, is not installed.
    """
    orchestrator()
    module = _import_core("server_lib")
    module._HOST = "127.0.0.1"
    return module
