"""Our safetensors reader and writer against the safetensors library, slices, and every kind of broken file."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from r1jax.checkpoints.tensor_file import TYPES, TensorFile, TensorWriter

DRAW = np.random.default_rng(0)
TENSORS = {
    "small": DRAW.normal(size=(3, 5)).astype(ml_dtypes.float8_e4m3fn),
    "half": DRAW.normal(size=7).astype(ml_dtypes.bfloat16),
    "other_half": DRAW.normal(size=(1, 3)).astype(np.float16),
    "wide": DRAW.normal(size=(2, 3, 4)).astype(np.float32),
    "widest": DRAW.normal(size=(4, 2)),
    "none": np.zeros((0, 3), np.float32),
    "one": np.full((), 2.5, np.float32),
}


def write(path: pathlib.Path, tensors: dict[str, np.ndarray], order: list[str] | None = None) -> None:
    with TensorWriter(path, [(name, value.dtype, value.shape) for name, value in tensors.items()]) as writer:
        for name in order or tensors:
            writer.put(name, tensors[name])


def test_a_written_file_is_what_the_safetensors_library_reads(tmp_path):
    write(tmp_path / "a", TENSORS, order=sorted(TENSORS))
    found = dict(deserialize((tmp_path / "a").read_bytes()))
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert (TYPES[found[name]["dtype"]], tuple(found[name]["shape"])) == (value.dtype, value.shape)
        assert bytes(found[name]["data"]) == value.tobytes()
    with safe_open(tmp_path / "a", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("wide"), TENSORS["wide"])
        assert file.metadata() == {"format": "pt"}


def test_metadata_is_kept_in_its_order_so_that_equal_runs_write_equal_bytes(tmp_path):
    metadata = {f"field {number}": f"é {number}" for number in range(20)}
    for name in ("a", "b"):
        with TensorWriter(tmp_path / name, [("one", TENSORS["one"].dtype, ())], metadata) as writer:
            writer.put("one", TENSORS["one"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="numpy") as file:
        assert file.metadata() == metadata


def test_a_file_of_the_safetensors_library_is_read_bit_for_bit(tmp_path):
    theirs = {name: value for name, value in TENSORS.items() if name != "small"}
    save_file(theirs, tmp_path / "a")
    with TensorFile(tmp_path / "a") as file:
        assert file.tensors.keys() == theirs.keys()
        for name, value in theirs.items():
            read = file.read(name)
            assert (read.dtype, read.shape, read.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_every_tensor_reads_back_and_so_do_its_rows(tmp_path):
    write(tmp_path / "a", TENSORS)
    with TensorFile(tmp_path / "a") as file:
        for name, value in TENSORS.items():
            assert file.read(name).tobytes() == value.tobytes()
            assert file.read(name).dtype == value.dtype
        for rows in (slice(1, 2), slice(0, 9), slice(1, None), slice(2, 1)):
            np.testing.assert_array_equal(file.read("widest", rows), TENSORS["widest"][rows])
            np.testing.assert_array_equal(file.read("small", rows), TENSORS["small"][rows])


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    write(tmp_path / "a", TENSORS)
    with TensorFile(tmp_path / "a") as file:
        for name, stored in file.tensors.items():
            assert stored.begin % TENSORS[name].dtype.itemsize == 0


def test_a_transposed_array_is_written_in_its_own_order(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path / "a", {"a": value})
    with TensorFile(tmp_path / "a") as file:
        np.testing.assert_array_equal(file.read("a"), value)


def test_a_tensor_that_is_not_put_is_noticed(tmp_path):
    with (
        pytest.raises(AssertionError, match="not written: \\['b'\\]"),
        TensorWriter(tmp_path / "a", [("b", TYPES["F32"], (2,))]),
    ):
        pass


# Broken files


def raw(path: pathlib.Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "no bytes": (b"", b"", 8, "too few for its header"),
    "header cut": ({"a": entry("F32", [2], 0, 8)}, b"", 10**9, "too few for its header"),
    "data cut": ({"a": entry("F32", [2], 0, 8)}, bytes(7), None, r"describes \d+ bytes, \d+ are there"),
    "data left": ({"a": entry("F32", [2], 0, 8)}, bytes(9), None, r"describes \d+ bytes, \d+ are there"),
    "size": ({"a": entry("F32", [3], 0, 8)}, bytes(8), None, r"a has 8 bytes, F32 \[3\] needs 12"),
    "overlap": ({"a": entry("U8", [8], 0, 8), "b": entry("U8", [4], 4, 8)}, bytes(8), None, "b begins at byte"),
    "hole": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [4], 4, 8)}, bytes(8), None, "b begins at byte"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), None, "entry of a is malformed"),
    "odd shape": ({"a": entry("F32", ["2"], 0, 8)}, bytes(8), None, "entry of a is malformed"),
    "below zero": ({"a": entry("F32", [2], -8, 0)}, bytes(8), None, "entry of a is malformed"),
    "no entry": ({"a": 3}, bytes(8), None, "entry of a is malformed"),
    "no object": (b"[1]", b"", None, "no JSON object"),
    "no JSON": (b"<html>", b"", None, "not JSON"),
    "no text": (b"\xff\xfe\xfd", b"", None, "not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, case):
    header, data, length, words = BROKEN[case]
    path = raw(tmp_path / "weights.safetensors", header, data, length)
    with pytest.raises(ValueError, match=words) as error:
        TensorFile(path)
    assert str(path) in str(error.value) and "copy it again" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["I32", "F8_E5M2", "F4"])
def test_a_type_that_is_not_read_is_named_when_it_is_asked_for(tmp_path, dtype):
    path = raw(
        tmp_path / "a", {"a": entry(dtype, [2], 0, 2 * {"I32": 4}.get(dtype, 1))}, bytes(8 if dtype == "I32" else 2)
    )
    with (
        TensorFile(path) as file,
        pytest.raises(ValueError, match=f"a is {dtype}; F64, F32, F16, BF16, F8_E4M3 are read"),
    ):
        file.read("a")


def test_a_file_that_is_absent_or_becomes_shorter_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        TensorFile(tmp_path / "absent")
    write(tmp_path / "a", TENSORS)
    with TensorFile(tmp_path / "a") as file:
        (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-3])
        with pytest.raises(ValueError, match="became shorter"):
            file.read("small")
