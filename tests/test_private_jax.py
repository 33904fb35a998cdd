"""The private parts of JAX that the package uses are there, and their absence is said in one line."""

import pathlib
import re

import jax
import numpy as np
import pytest

from r1jax.core import private_jax


def test_the_installed_jax_has_every_private_part_that_is_used():
    private_jax.check()


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("_STATE", ("jax._src.distributed", "no_state"), "jax._src.distributed.no_state"),
        ("_SERVICE", ("jax._src.no_module", "service"), "jax._src.no_module.service"),
        ("CLIENT_METHODS", ("key_value_forget",), "jax._src.lib._jax.DistributedRuntimeClient.key_value_forget"),
    ],
)
def test_a_jax_without_a_part_is_refused_with_its_version_and_the_name(monkeypatch, field, value, name):
    monkeypatch.setattr(private_jax, field, value)
    with pytest.raises(ValueError, match=re.escape(f"JAX {jax.__version__} has no {name}, which a run of several")):
        private_jax.check()


def test_compilations_counts_the_kinds_of_arguments():
    program = jax.jit(lambda x: x + 1)
    for value in (np.zeros(3), np.ones(3), np.zeros(4)):
        program(value)
    assert private_jax.compilations(program) == 2


def test_client_methods_are_those_that_are_called():
    folder = pathlib.Path(private_jax.__file__).parent
    sources = "".join((folder / name).read_text() for name in ("hosts.py", "watch.py"))
    assert set(re.findall(r"_client\.(\w+)\(", sources)) == set(private_jax.CLIENT_METHODS)
