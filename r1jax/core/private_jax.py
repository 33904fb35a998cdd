"""The private parts of JAX in use: its coordination service, for runs of several processes, and a count of programs.

JAX may move or change them in any release. Nothing else in the package uses a private name of JAX.
"""

import importlib
import operator
from typing import Any

import jax

_STATE = ("jax._src.distributed", "global_state")
_SERVICE = ("jax._src.lib", "_jax.get_distributed_runtime_service")
_CLIENT = ("jax._src.lib", "_jax.DistributedRuntimeClient")
CLIENT_METHODS = (
    "blocking_key_value_get_bytes",
    "key_value_delete",
    "key_value_dir_get",
    "key_value_dir_get_bytes",
    "key_value_increment",
    "key_value_set",
    "key_value_set_bytes",
)


def check() -> None:
    """Raises ValueError, naming the version of JAX and the missing part, when this JAX lacks a part used here."""
    _member(*_STATE)
    _member(*_SERVICE)
    client = _member(*_CLIENT)
    for name in CLIENT_METHODS:
        if not hasattr(client, name):
            raise _lacks(f"{'.'.join(_CLIENT)}.{name}")


def coordination_client() -> Any:
    """Returns this process's client of the coordination service: keys and values that all processes of the run share.

    To be called after jax.distributed.initialize.
    """
    return _member(*_STATE).client


def coordination_service(address: str, processes: int, silence_s: int) -> Any:
    """Returns a running coordination service; it gives up a process that has been silent for `silence_s`."""
    return _member(*_SERVICE)(address, processes, heartbeat_timeout=silence_s, shutdown_timeout=60)


def compilations(program: Any) -> int:
    """Returns for how many kinds of arguments a function made by jax.jit has been compiled."""
    return program._cache_size()


def _member(module: str, name: str) -> Any:
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        raise _lacks(f"{module}.{name}") from None


def _lacks(name: str) -> ValueError:
    return ValueError(
        f"JAX {jax.__version__} has no {name}, which a run of several processes needs: install an older JAX, or adapt "
        "r1jax/core/private_jax.py"
    )
