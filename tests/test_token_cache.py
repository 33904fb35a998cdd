"""Claims about the tokens of examples on disk: those made directly, once, whatever stops or changes in between."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small import byte_tokenizer

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts, sharding
from r1jax.data import jsonl
from r1jax.recipe import fine_tuning, sft_rows, token_cache
from r1jax.recipe.token_cache import RowReading, TokenCache, load
from r1jax.schema import DataConfig, MeshConfig, PackConfig
from r1jax.train import sft, step

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEMPLATE = (  # without the thoughts of earlier turns: each assistant turn of a conversation is an example
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS, ROW_BYTES = 300, 200


def words(template: str = TEMPLATE) -> Tokenizer:
    return byte_tokenizer(template)


def row(number: int) -> dict:
    """Returns a row of one turn, or, every fourth, of a conversation with two trained turns."""
    response = f"<think>é\n{'so ' * (number % 17)}</think>{number}"
    numbered = {"id": f"r{number}", "prompt": f"What is {number}?", "response": response}
    if number % 4:
        return numbered
    spoken = (
        ("user", "Hi"),
        ("assistant", "<think>Oh</think>Hi"),
        ("user", f"And {number}?"),
        ("assistant", f"{number} " * 9),
    )
    turns = [{"role": role, "content": content} for role, content in spoken]
    return numbered | {"prompt": turns[:-1], "response": turns[-1]["content"], "messages": turns}


def reading(folder, rows: int = ROWS, data: DataConfig | None = None, template: str = TEMPLATE) -> RowReading:
    path = folder / "examples.jsonl"
    if not path.exists():
        jsonl.write(path, map(row, range(rows)))
    return RowReading(path, "distill", data or DataConfig(template="chat"), words(template))


def direct(source: RowReading) -> list:
    rows = jsonl.read(source.path)
    return [item for one in rows for item in sft_rows.items_of(one, source.stage, source.data, source.tokenizer)]


def assert_same(cache, items) -> None:
    assert len(cache) == len(items) and cache.lengths.tolist() == [len(item.tokens) for item in items]
    for cached, item in zip((cache[place] for place in range(len(cache))), items, strict=True):
        for name in ("tokens", "loss_mask"):
            one, other = getattr(cached, name), getattr(item, name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def blocks(source: RowReading) -> dict[str, int]:
    """Returns {name: time of change} of the finished blocks of the one cache beside a file."""
    (folder,) = source.path.with_suffix(".tokens").iterdir()
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.lengths.npy")}


def test_two_workers_make_the_tokens_that_one_process_makes_directly(tmp_path):
    source = reading(tmp_path)
    items = direct(source)
    assert len(items) == ROWS * 5 // 4
    cache = load(source, workers=2, block_bytes=20 * ROW_BYTES)
    assert len(blocks(source)) > 8
    assert_same(cache, items)
    chosen = np.asarray([7, 300, 2])
    assert_same(cache.only(chosen), [items[place] for place in chosen])


def test_batches_from_the_cache_are_those_of_the_rows_bit_for_bit(tmp_path):
    source = reading(tmp_path, 40)
    items, cache = direct(source), load(source, 1, 1000)
    size, order = PackConfig(row_tokens=256, rows_per_micro_batch=2), [17, 3, 29, 11, 5, 30]
    (mapped, *rest), (held, *expected) = (
        sft.make_batch([examples[place] for place in order], size, 4) for examples in (cache, items)
    )
    assert rest == expected and mapped.keys() == held.keys()
    for name, array in held.items():
        assert mapped[name].tobytes() == array.tobytes() and mapped[name].dtype == array.dtype


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_with_the_blocks_it_has_finished(tmp_path, workers):
    source = reading(tmp_path)
    code = (
        "import pathlib, test_token_cache as t\n"
        f"t.load(t.reading(pathlib.Path({str(tmp_path)!r})), {workers}, {ROW_BYTES})"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    folder, deadline = source.path.with_suffix(".tokens"), time.monotonic() + 240
    while len(list(folder.glob("*/[0-9]*.lengths.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(pathlib.Path(f"/proc/{child}/stat").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    before = blocks(source)
    total = len(jsonl.parts(source.path, ROW_BYTES)[1])
    assert 3 <= len(before) < total  # killed in the middle
    cache = load(source, workers=1, block_bytes=ROW_BYTES)
    after = blocks(source)
    assert len(after) == total and {name: after[name] for name in before} == before
    assert_same(cache, direct(source))


def test_a_block_without_its_lengths_and_a_file_cut_off_are_made_again(tmp_path):
    source = reading(tmp_path, 40)
    load(source, 1, 1000)
    (folder,) = source.path.with_suffix(".tokens").iterdir()
    for name in ("lengths.npy", "00001.lengths.npy"):
        (folder / name).unlink()
    (folder / "00001.tokens.npy").write_bytes((folder / "00001.tokens.npy").read_bytes()[:-40])
    (folder / ".00002.tokens.npy.1.tmp").write_bytes(b"")
    assert_same(load(source, 1, 1000), direct(source))
    assert not list(folder.glob(".*"))


def test_a_finished_cache_is_read_without_making_any_token(tmp_path, monkeypatch):
    source = reading(tmp_path, 40)
    load(source)
    monkeypatch.setattr(sft_rows, "items_of", None)
    assert len(load(source)) == len(load(source).lengths) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"template": TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n")},
        {"data": DataConfig(template="plain")},
        {"data": DataConfig(template="chat", instruction="Think.")},
        {"data": DataConfig(template="chat", think_prefill=True)},
    ],
    ids=["chat template", "template", "instruction", "prefill"],
)
def test_another_template_makes_another_cache_and_the_old_one_goes(tmp_path, change):
    source, changed = reading(tmp_path, 20), reading(tmp_path, 20, **change)
    load(source)
    (old,) = source.path.with_suffix(".tokens").iterdir()
    assert_same(load(changed), direct(changed))
    (new,) = source.path.with_suffix(".tokens").iterdir()
    assert new != old and not old.exists()


def test_other_rows_or_another_tokenizer_make_another_cache(tmp_path):
    source = reading(tmp_path, 20)
    load(source)
    jsonl.write(source.path, map(row, range(1, 21)))
    assert_same(load(source), direct(source))
    words_of_another = words()
    words_of_another.backend._inner.add_special_tokens(["What"])
    changed = RowReading(source.path, source.stage, source.data, words_of_another)
    assert_same(load(changed), direct(changed))
    assert len(list(source.path.with_suffix(".tokens").iterdir())) == 1
    assert token_cache.tokenizer_digest(words()) == token_cache.tokenizer_digest(source.tokenizer)


def test_a_bad_row_is_named_by_its_line_whoever_reads_it(tmp_path):
    source = reading(tmp_path, 40)
    with source.path.open("a") as file:
        file.write('{"prompt": \n')
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"examples.jsonl, line 41: malformed JSON"):
            load(source, workers, 1000)


def test_a_full_disk_is_one_line_and_the_finished_blocks_stay(tmp_path, monkeypatch):
    source, save, room = reading(tmp_path, 40), token_cache._save, iter(range(5))

    def saved(path, array) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, array)

    monkeypatch.setattr(token_cache, "_save", saved)
    with pytest.raises(ValueError, match=r"the disk is full; .* as examples.jsonl, 0.0 GB; finished blocks are kept"):
        load(source, 1, 1000)
    assert len(blocks(source)) == 2
    monkeypatch.undo()
    assert_same(load(source, 1, 1000), direct(source))


def test_the_processes_of_a_run_divide_the_blocks(tmp_path, monkeypatch):
    source = reading(tmp_path, 60)
    monkeypatch.setattr(hosts, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "process_index", lambda: 1)
    monkeypatch.setattr(token_cache, "_finish", lambda folder, count: None)
    with pytest.raises(FileNotFoundError):  # the other process has not made its blocks
        load(source, 1, 1000)
    assert {int(name[:5]) % 2 for name in blocks(source)} == {1}
    monkeypatch.undo()
    assert_same(load(source, 1, 1000), direct(source))


@pytest.mark.parametrize("end", [b"\n", b""])
def test_parts_hold_every_line_once_with_its_number(tmp_path, end, monkeypatch):
    monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 64)
    path, lines = tmp_path / "rows.jsonl", [b'{"n": %d}' % number + b" " * (number % 5) for number in range(50)]
    lines.insert(20, b"")
    path.write_bytes(b"\n".join(lines) + end)
    for least in (1, 9, 30, 64, 65, 200, 10_000):
        _, parts = jsonl.parts(path, least)
        assert [part.line for part in parts] == [1 + sum(p.lines for p in parts[:n]) for n in range(len(parts))]
        assert sum(part.lines for part in parts) == len(lines) and parts[-1].end == path.stat().st_size
        assert all(part.end - part.start >= least for part in parts[:-1])
        assert [row["n"] for part in parts for row in jsonl.read_part(path, part)] == list(range(50))


def test_a_process_reads_the_examples_of_its_rows_alone_and_knows_the_others_by_their_lengths(tmp_path, monkeypatch):
    cache, size = load(reading(tmp_path, 40), 1, 1000), PackConfig(row_tokens=256, rows_per_micro_batch=4)
    chosen = cache.only(np.asarray([17, 3, 29, 11, 5, 30, 44, 9, 21, 2]))
    whole, filled, inverse = fine_tuning.read_batch(chosen, size, 2, 2, np.ones(4, bool))
    direct_arrays, *rest = sft.make_batch([chosen[place] for place in range(10)], size, 2, shards=2)
    assert [filled, inverse] == rest and all(np.array_equal(whole[name], direct_arrays[name]) for name in whole)
    read, get = set(), TokenCache.__getitem__
    monkeypatch.setattr(TokenCache, "__getitem__", lambda self, place: (read.add(place), get(self, place))[1])
    for local in (np.asarray([True, True, False, False]), np.asarray([False, False, True, True])):
        part, *others = fine_tuning.read_batch(chosen, size, 2, 2, local)
        assert others == [filled, inverse] and step.work(part) == step.work(whole)
        for name, array in whole.items():
            np.testing.assert_array_equal(part[name][:, local], array[:, local])
        assert not part["tokens"][:, ~local].any() and 0 < len(read) < 10
        read.clear()


def test_one_process_has_devices_for_every_row():
    assert sharding.local_rows(4, sharding.make_mesh(MeshConfig())).tolist() == [True] * 4
