"""Safetensors files, read and written one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets) and
the tensors back to back. Only the bytes that are asked for are read, and no page of a file is mapped into the process,
so its resident memory does not grow with the checkpoint. Format: the README of github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
NAMES = {kind: name for name, kind in TYPES.items()}
OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
SIZES = {name: kind.itemsize for name, kind in TYPES.items()} | OTHER_SIZES | {"I64": 8, "U64": 8}  # bytes
_MOST = 1 << 30  # bytes asked of the kernel at once; it moves at most 2 GiB


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its type as the header writes it, its shape, and the range of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """One file, open for reading; `tensors` is {name: Stored} of its header.

    Raises ValueError when the file cannot be opened, is cut short, or its header does not describe it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from None
        try:
            self.tensors = self._header()
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns a tensor, or the `rows` of its leading dimension; bfloat16 and FP8 as ml_dtypes adds them to NumPy.

        Raises ValueError for a type that is not in TYPES.
        """
        stored = self.tensors[name]
        if stored.dtype not in TYPES:
            raise ValueError(f"{self.path}: {name} is {stored.dtype}; {', '.join(TYPES)} are read")
        kind, shape, begin = TYPES[stored.dtype], stored.shape, stored.begin
        if rows != slice(None):
            first, last, _ = rows.indices(shape[0])
            begin += first * math.prod(shape[1:]) * kind.itemsize
            shape = (max(last - first, 0), *shape[1:])
        result = np.empty(shape, kind)
        self._fill(result.reshape(-1).view(np.uint8).data, begin)
        return result

    def _fill(self, target: memoryview, begin: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._file.fileno(), [target[done : done + _MOST]], begin + done)
            if count == 0:
                self._refuse("it became shorter while it was read")
            done += count

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.path} is cut short or no safetensors file ({why}); copy it again")

    def _header(self) -> dict[str, Stored]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
        if size < 8 or length > size - 8:
            self._refuse(f"{size} bytes are too few for its header")
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        try:
            header = json.loads(text)
        except ValueError:
            self._refuse("its header is not JSON")
        if not isinstance(header, dict):
            self._refuse("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: self._stored(name, entry, 8 + length) for name, entry in header.items()}
        place = 8 + length
        for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if stored.begin != place:
                self._refuse(f"{name} begins at byte {stored.begin}, not at {place}")
            place = stored.end
        if place != size:
            self._refuse(f"its header describes {place} bytes, {size} are there")
        return tensors

    def _stored(self, name: str, entry: Any, start: int) -> Stored:
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            self._refuse(f"the header's entry of {name} is malformed")
        if dtype in SIZES and end - begin != math.prod(shape) * SIZES[dtype]:
            self._refuse(
                f"{name} has {end - begin} bytes, {dtype} {list(shape)} needs {math.prod(shape) * SIZES[dtype]}"
            )
        return Stored(dtype, shape, start + begin, start + end)


class TensorWriter:
    """One file being written: the header at once, then every tensor at its place, in any order.

    `tensors` are (name, type, shape). Wide types come first in the file, so that every tensor is aligned. `metadata`
    goes into the header. The same arguments always give the same bytes.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
        self._places: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        end = 0
        for name, kind, shape in sorted(tensors, key=lambda tensor: -tensor[1].itemsize):
            begin, end = end, end + math.prod(shape) * kind.itemsize
            header[name] = {"dtype": NAMES[kind], "shape": shape, "data_offsets": (begin, end)}
            self._places[name] = (kind, tuple(shape), begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = Path(path).open("wb", buffering=0)
        self._write(len(text).to_bytes(8, "little") + text, 0)
        self._file.truncate(self._start + end)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        assert kind is not None or not self._places, f"not written: {list(self._places)[:3]}"

    def put(self, name: str, value: np.ndarray) -> None:
        """Writes one tensor; each name once, with the type and shape that were announced."""
        kind, shape, begin = self._places.pop(name)
        assert (value.dtype, value.shape) == (kind, shape), f"{name}: {value.dtype} {value.shape}, not {kind} {shape}"
        self._write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, self._start + begin)

    def _write(self, data: bytes | memoryview, begin: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done : done + _MOST], begin + done)
