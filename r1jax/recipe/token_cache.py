"""The tokens of a stage's examples on disk: made once by several processes, in blocks, and mapped into memory.

`STAGE/examples.tokens/KEY/` holds two .npy files a block: `N.tokens.npy`, the tokens of its examples one after another
(int32; a trained token is stored as ~id, which is negative), and `N.lengths.npy`, how many each example has and how
many of them are trained. The lengths are written last, so a block with lengths is whole. `blocks.npy` and
`lengths.npy`, over all blocks, follow when every block is there. KEY is a digest of everything that the tokens depend
on.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.context
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import files, hosts
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.data.packing import PackItem
from r1jax.recipe import prompts, sft_rows
from r1jax.recipe.progress import Progress
from r1jax.rewards.worker import main_module_hidden
from r1jax.schema import DataConfig

BLOCK_BYTES = 4 << 20  # of rows, whose tokens make one block
FORMAT = 1  # of the files and of how rows become tokens: another number makes every cache anew
OPEN_BLOCKS = (
    256  # that a process keeps mapped: each map has a file descriptor, of 1024 that a process usually may have
)
BUILD_DEADLINE_S = 48 * 3600.0  # within which the slowest process must have made its blocks
_TOKENS, _LENGTHS, _BLOCKS = "tokens.npy", "lengths.npy", "blocks.npy"


class TokenCache:
    """The examples of a finished cache, or a choice of them; an example is read from disk when it is asked for."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lengths, self._trained = np.load(folder / _LENGTHS).T  # [examples] int32 each
        self._firsts = np.load(folder / _BLOCKS)  # [blocks + 1] the first example of each block, then their number
        self._ends = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])  # tokens before each example
        self._chosen = np.arange(len(self._lengths))
        self._block = functools.lru_cache(OPEN_BLOCKS)(self._open)

    def only(self, places: np.ndarray) -> "TokenCache":
        """Returns the cache with the examples at `places` alone, in that order."""
        chosen = copy.copy(self)
        chosen._chosen = self._chosen[places]
        return chosen

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, [examples] int32."""
        return self._lengths[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, place: int) -> PackItem:
        """Returns an example. Raises IndexError beyond the last one."""
        number = self._chosen[place]
        block = int(np.searchsorted(self._firsts, number, "right")) - 1
        before = self._ends[self._firsts[block]]
        stored = self._block(block)[self._ends[number] - before : self._ends[number + 1] - before]
        trained = stored < 0
        return PackItem(np.where(trained, ~stored, stored), trained.astype(np.float32))

    def outline(self, place: int) -> PackItem:
        """Returns an example of zeros with as many tokens and trained ones as that at `place`; no block is read."""
        number = self._chosen[place]
        length = self._lengths[number]
        mask = np.arange(length) >= length - self._trained[number]
        return PackItem(np.zeros(length, np.int32), mask.astype(np.float32))

    def _open(self, block: int) -> np.ndarray:
        return np.load(_file(self._folder, block, _TOKENS), mmap_mode="r")


@dataclass(frozen=True)
class RowReading:
    """What the rows of a file are turned into tokens with. `stage` and `data` decide how prompts are rendered."""

    path: Path  # JSON Lines
    stage: str
    data: DataConfig
    tokenizer: Tokenizer


def load(reading: RowReading, workers: int = 0, block_bytes: int = BLOCK_BYTES) -> TokenCache:
    """Returns the tokens of a file's rows, made first where the cache beside the file lacks them.

    Blocks that an interrupted process has finished are kept, caches with another key removed. `workers` processes make
    the missing blocks, by default one a processor; the processes of a run divide them. Raises ValueError for a bad row
    (with file and line) and for a full disk, in one line.
    """
    plan = hosts.decide(_plan, reading, block_bytes, name=f"the blocks of {reading.path}")
    folder, missing = Path(plan["folder"]), [(number, jsonl.LineRange(*part)) for number, part in plan["missing"]]
    if not plan["finished"]:
        with _full_disk_in_one_line(reading.path, folder):
            _make(reading, folder, list(hosts.share(missing)), plan["rows"], workers)
            hosts.barrier(f"the tokens of {reading.path}", BUILD_DEADLINE_S)
            hosts.decide(_finish, folder, plan["blocks"], name=f"{folder}/{_LENGTHS}")
    return TokenCache(folder)


@contextlib.contextmanager
def _full_disk_in_one_line(path: Path, folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: the disk is full; the tokens need about as much room as {path.name}, "
            f"{path.stat().st_size / 1e9:.1f} GB; finished blocks are kept, and the same command makes the others"
        ) from None


def remove(path: Path) -> None:
    """Removes the cache beside a file of rows."""
    if hosts.is_writer():
        shutil.rmtree(_beside(path), ignore_errors=True)


def finished_blocks(path: Path) -> int:
    """Returns how many blocks of the cache beside a file of rows are whole."""
    return len(list(_beside(path).glob(f"*/[0-9]*.{_LENGTHS}")))


def _beside(path: Path) -> Path:
    return path.with_suffix(".tokens")


def _file(folder: Path, block: int, kind: str) -> Path:
    return folder / f"{block:05}.{kind}"


def _plan(reading: RowReading, block_bytes: int) -> dict:
    """Returns the cache's folder, whether it is finished, its number of blocks, those missing, and all rows."""
    digest, parts = jsonl.parts(reading.path, block_bytes)
    if not parts:
        raise ValueError(f"{reading.path}: no rows; at least one JSON object per line is needed")
    folder = _beside(reading.path) / _key(reading, digest, block_bytes)
    for other in _beside(reading.path).glob("*"):
        if other.name != folder.name:
            shutil.rmtree(other, ignore_errors=True)
    files.remove_unfinished(folder)
    missing = [
        (number, [part.start, part.end, part.line, part.lines])
        for number, part in enumerate(parts)
        if not _file(folder, number, _LENGTHS).exists()
    ]
    rows, finished = sum(part.lines for part in parts), (folder / _LENGTHS).exists()
    return {
        "folder": str(folder),
        "finished": finished,
        "blocks": len(parts),
        "missing": [] if finished else missing,
        "rows": rows,
    }


def _key(reading: RowReading, digest: str, block_bytes: int) -> str:
    """Returns the digest of what tokens depend on: the rows, the tokenizer, and how a prompt is rendered."""
    data, words = reading.data, reading.tokenizer
    template = prompts.template(reading.stage, data, words)
    parts = [FORMAT, digest, tokenizer_digest(words), template, data.instruction, data.think_prefill, block_bytes]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Returns the sha256 of a tokenizer: its files as it saves them, chat template included, and its stop ids."""
    sha = hashlib.sha256(repr((tokenizer.stop_ids, tokenizer.chat_template)).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            sha.update(file.name.encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()


def _make(
    reading: RowReading, folder: Path, missing: list[tuple[int, jsonl.LineRange]], all_rows: int, workers: int
) -> None:
    """Makes this process's blocks; with more than one it shows rows, rows a second and the minutes left."""
    rows, done = sum(part.lines for _, part in missing), 0
    workers = min(workers or _processors(), len(missing))
    if rows < all_rows and hosts.process_count() == 1:
        say(f"{reading.path.name}: the tokens of {all_rows - rows} of {all_rows} rows are there already")
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            progress = (
                stack.enter_context(Progress(f"tokens of {reading.path.name}", rows)) if len(missing) > 1 else None
            )
            for lines in _blocks(reading, folder, missing, workers):
                done += lines
                rate = done / (time.monotonic() - started)
                if progress is not None:
                    progress.update(done, **{"rows/s": rate, "minutes left": (rows - done) / rate / 60})
    except BrokenProcessPool:
        raise ValueError(
            f"{folder}: a process that makes tokens was killed, perhaps for lack of memory; finished blocks are kept, "
            "and the same command makes the others"
        ) from None


def _processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(
    reading: RowReading, folder: Path, missing: list[tuple[int, jsonl.LineRange]], workers: int
) -> Iterator[int]:
    """Makes blocks, in this process with one worker, and yields the lines of each one that is finished."""
    if workers <= 1:
        for number, part in missing:
            yield _make_block(reading, folder, number, part)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_TokenContext(), initializer=_start, initargs=(reading, folder))
    try:
        for future in as_completed([pool.submit(_work, number, part) for number, part in missing]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _make_block(reading: RowReading, folder: Path, number: int, part: jsonl.LineRange) -> int:
    """Writes the files of one block and returns the number of its lines."""
    stored, lengths = [np.empty(0, np.int32)], []
    for row in jsonl.read_part(reading.path, part):
        for item in sft_rows.items_of(row, reading.stage, reading.data, reading.tokenizer):
            stored.append(np.where(item.loss_mask > 0, ~item.tokens, item.tokens))
            lengths.append((len(item.tokens), np.count_nonzero(item.loss_mask[1:])))  # nothing predicts the first token
    _save(_file(folder, number, _TOKENS), np.concatenate(stored))
    _save(_file(folder, number, _LENGTHS), np.asarray(lengths, np.int32).reshape(-1, 2))
    return part.lines


def _finish(folder: Path, blocks: int) -> None:
    """Writes the files over all blocks."""
    lengths = [np.load(_file(folder, number, _LENGTHS)) for number in range(blocks)]
    _save(folder / _BLOCKS, np.cumsum([0, *map(len, lengths)]))
    _save(folder / _LENGTHS, np.concatenate(lengths))


def _save(path: Path, array: np.ndarray) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


class _TokenProcess(multiprocessing.context.SpawnProcess):
    def start(self) -> None:
        with main_module_hidden():
            super().start()


class _TokenContext(multiprocessing.context.SpawnContext):
    """Starts fresh processes: a fork of one that runs JAX may hang."""

    Process = _TokenProcess


def _start(reading: RowReading, folder: Path) -> None:
    """Sets a worker up. It ends with the process that started it, however that ends."""
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = reading, folder


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _work(number: int, part: jsonl.LineRange) -> int:
    assert _job is not None  # `_start` has run
    return _make_block(*_job, number, part)


_job: tuple[RowReading, Path] | None = None
