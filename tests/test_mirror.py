"""Claims about a folder kept in step with a URL: whole there at every moment, whatever fails or is killed."""

import contextlib
import json
import os
import threading
from pathlib import Path

import fsspec
import pytest
from remote_file_system import FailingFileSystem, WalkedFileSystem

from r1jax.core import mirror, remote, urls

URL = "failing://bucket/runs"
FIRST = {"r1_zero/config.json": "1", "r1_zero/metrics.jsonl": "a\n", "r1_zero/checkpoints/1/d/0": "one", "kept": "k"}
# A file that grew, one that was replaced, one that vanished, new ones, and an empty folder.
SECOND = {
    "r1_zero/config.json": "2",
    "r1_zero/metrics.jsonl": "a\nb\n",
    "r1_zero/checkpoints/2/d/0": "two",
    "r1_zero/checkpoints/2/d/1": "",
    "r1_zero/checkpoints/2/empty/": "",
    "kept": "k",
}
THIRD = SECOND | {"r1_zero/checkpoints/1/d/0": "another one", "r1_zero/DONE": "{}"}


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(urls, "THREADS", 1)  # the order of the operations is then the same in every run
    FailingFileSystem.clear()
    yield FailingFileSystem.store
    FailingFileSystem.clear()


def write(folder, content):
    """Makes a folder hold {name: text}, a name that ends in a slash being an empty folder; equal files are not touched."""
    for name in set(read(folder)) - set(content):
        (folder / name).rmdir() if name.endswith("/") else (folder / name).unlink()
    for name, text in content.items():
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def read(folder):
    """Returns {name: text} of a folder, as `write` takes it; folders that only hold empty ones are left out."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    texts = {name: path.read_text() for name, path in files.items() if path.is_file()}
    empty = [name for name, path in files.items() if path.is_dir() and path.name == "empty"]
    return texts | {f"{name}/": "" for name in empty}


def pulled(folder, url=URL):
    copy = mirror.Mirror(url, folder)
    copy.pull()
    return copy


def plain_objects(store):
    """Returns the names of the objects below the URL, and of what the mirror keeps there beside them."""
    names = [name.removeprefix("/bucket/runs/") for name in store]
    inside = [name for name in names if name.startswith(mirror.INSIDE)]
    return {name for name in names if name not in inside}, inside


def files_of(content):
    return {name for name in content if not name.endswith("/")}


def first_push(folder):
    """Returns a mirror that has pushed FIRST, with the changes to SECOND made since."""
    folder.mkdir()
    work = pulled(folder)
    write(folder, FIRST)
    work.push()
    write(folder, SECOND)
    return work


def changes_of_second_push(folder):
    FailingFileSystem.reset(limit=1000)
    work = first_push(folder)
    before = FailingFileSystem.limit
    work.push()
    return before - FailingFileSystem.limit


def killed_push(folder, kill_at):
    """Pushes FIRST, and then SECOND by a push that is killed at one of its operations, whose object is half-written."""
    FailingFileSystem.clear()
    work = first_push(folder)
    FailingFileSystem.reset(limit=kill_at, torn=True)
    with pytest.raises(urls.RemoteError):
        work.push()


def killed_pushes(tmp_path):
    """Yields the number of each operation of a push to SECOND, each time after one that was killed there."""
    for kill_at in range(changes_of_second_push(tmp_path / "measured")):
        killed_push(tmp_path / f"a{kill_at}", kill_at)
        remote.forget()
        yield kill_at


def test_a_folder_comes_back_as_it_was_with_usual_names_and_one_manifest_beside(tmp_path, store):
    work = first_push(tmp_path / "a")
    work.push()
    assert read(tmp_path / "a") == SECOND
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == SECOND
    objects, inside = plain_objects(store)
    assert objects == files_of(SECOND) and len(inside) == 1
    assert store["/bucket/runs/r1_zero/metrics.jsonl"].getvalue() == b"a\nb\n"


@pytest.mark.parametrize("torn", [False, True])
def test_a_push_killed_at_any_operation_leaves_the_state_before_or_after_it(tmp_path, store, torn):
    count, seen = changes_of_second_push(tmp_path / "measured"), []
    for kill_at in range(count + 1):
        FailingFileSystem.clear()
        work = first_push(tmp_path / f"a{kill_at}")
        FailingFileSystem.reset(limit=kill_at, torn=torn)
        if kill_at < count:
            with pytest.raises(urls.RemoteError, match=r"failing://bucket/runs/.*PermissionError.*check that the URL"):
                work.push()
        else:
            work.push()
        FailingFileSystem.reset()
        again = pulled(tmp_path / f"b{kill_at}")
        state = read(tmp_path / f"b{kill_at}")
        assert state in (FIRST, SECOND), kill_at
        seen.append(state == SECOND)
        write(tmp_path / f"b{kill_at}", THIRD)
        again.push()
        objects, inside = plain_objects(store)
        assert objects == files_of(THIRD) and len(inside) == 1, kill_at
    assert seen == sorted(seen) and seen[0] is False and seen[-1] is True
    assert count > 12 and 4 < sum(seen) < count - 4  # both states were seen, often


def test_a_start_that_is_killed_while_it_mends_a_killed_push_changes_nothing(tmp_path):
    count = changes_of_second_push(tmp_path / "measured")
    for kill_at in range(count):
        for second_kill in range(0, 6, 2):
            name = f"{kill_at}_{second_kill}"
            killed_push(tmp_path / f"a{name}", kill_at)
            FailingFileSystem.reset(limit=second_kill, torn=True)
            try:
                pulled(tmp_path / f"b{name}")
            except urls.RemoteError:
                pass
            FailingFileSystem.reset()
            pulled(tmp_path / f"c{name}")
            assert read(tmp_path / f"c{name}") in (FIRST, SECOND)


def of_stage(content):
    """Returns what is read to start from the stage in a work folder: its files, with the newest checkpoint alone."""
    files = {name.removeprefix("r1_zero/"): content[name] for name in files_of(content) if name.startswith("r1_zero/")}
    return {name: files[name] for name in mirror.read_to_start(files)}


def test_a_stage_that_is_read_while_a_push_is_killed_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_URL_CACHE", str(tmp_path / "cache"))
    states = []
    for _ in killed_pushes(tmp_path):
        path = remote.local(f"{URL}/r1_zero")
        states.append(read(Path(path)))
        assert (
            remote.shown(f"{path}/DONE") == f"{URL}/r1_zero/DONE"
            and remote.known(f"{URL}/r1_zero/DONE") == f"{path}/DONE"
        )
        assert remote.local(f"{URL}/r1_zero") == path
    assert of_stage(FIRST) == states[0] and of_stage(SECOND) == states[-1]
    assert all(state in (of_stage(FIRST), of_stage(SECOND)) for state in states)


def test_what_is_at_a_url_is_fetched_once_as_long_as_it_stays_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_URL_CACHE", str(tmp_path / "cache"))
    other, url, places = fsspec.filesystem("failing"), "failing://bucket/données.jsonl", []
    for content in (b"1\n", b"1\n", b"2\n"):
        if not places or content == b"2\n":
            other.pipe_file("/bucket/données.jsonl", content)
        remote.forget()
        places.append(Path(remote.local(url)))
        assert places[-1].read_bytes() == content and places[-1].name == "données.jsonl"
    assert places[0] == places[1] != places[2]
    record = {"data.path": str(places[2]), "line": f"{places[2]}, line 3"}
    assert json.loads(remote.shown(json.dumps(record))) == {"data.path": url, "line": f"{url}, line 3"}
    assert remote.shown(record["line"]) == f"{url}, line 3"


def test_a_file_that_is_read_while_a_push_is_killed_is_that_of_the_state_that_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_URL_CACHE", str(tmp_path / "cache"))
    seen = set()
    for kill_at in killed_pushes(tmp_path):
        text = Path(remote.local(f"{URL}/r1_zero/metrics.jsonl")).read_text()
        FailingFileSystem.reset()
        pulled(tmp_path / f"b{kill_at}")
        assert text == read(tmp_path / f"b{kill_at}")["r1_zero/metrics.jsonl"]
        seen.add(text)
    assert seen == {"a\n", "a\nb\n"}


def test_a_folder_that_changes_while_it_is_fetched_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_URL_CACHE", str(tmp_path / "cache"))
    first_push(tmp_path / "a").push()
    fetch, other = mirror.fetch, fsspec.filesystem("failing")

    def fetch_and_change(*arguments):
        fetch(*arguments)
        monkeypatch.setattr(mirror, "fetch", fetch)
        other.pipe_file("/bucket/runs/r1_zero/checkpoints/2/d/0", b"TWO")

    monkeypatch.setattr(mirror, "fetch", fetch_and_change)
    assert (Path(remote.local(f"{URL}/r1_zero")) / "checkpoints/2/d/0").read_text() == "TWO"


def test_what_no_manifest_names_is_read_as_it_is_unless_a_push_had_begun_to_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("R1JAX_URL_CACHE", str(tmp_path / "cache"))
    first_push(tmp_path / "a").push()
    other = fsspec.filesystem("failing")
    other.pipe_file("/bucket/runs/hf/config.json", b"{}")
    other.pipe_file("/bucket/runs/rows.jsonl", b"1")
    other.pipe_file("/bucket/runs/half/config.json", b"{")
    other.pipe_file("/bucket/runs/.r1jax/push-00000099.json", b'["half/config.json", "half/DONE"]')
    remote.forget()
    assert read(Path(remote.local(f"{URL}/hf"))) == {"config.json": "{}"}
    assert Path(remote.local(f"{URL}/rows.jsonl")).read_text() == "1"
    with pytest.raises(urls.MissingError, match="failing://bucket/runs/half holds no files"):
        remote.local(f"{URL}/half")
    with pytest.raises(urls.MissingError):
        remote.local(f"{URL}/half/config.json")


def test_a_push_that_failed_is_made_up_for_by_the_next_one(tmp_path, store, capsys):
    count = changes_of_second_push(tmp_path / "measured")
    for fail_at in range(count):
        FailingFileSystem.clear()
        work = first_push(tmp_path / f"a{fail_at}")
        FailingFileSystem.reset(limit=fail_at, torn=True)
        assert work.offer()
        work.wait()
        assert "the next checkpoint tries again" in capsys.readouterr().err
        FailingFileSystem.reset()
        write(tmp_path / f"a{fail_at}", THIRD)
        work.push()
        pulled(tmp_path / f"b{fail_at}")
        assert read(tmp_path / f"b{fail_at}") == THIRD
        objects, inside = plain_objects(store)
        assert objects == files_of(THIRD) and len(inside) == 1


def test_a_push_at_the_end_makes_up_for_one_that_failed_just_before(tmp_path):
    work = first_push(tmp_path / "a")
    FailingFileSystem.reset(limit=3)
    assert work.offer()
    while work.offer() is False:
        pass
    FailingFileSystem.reset()
    work.push()
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == SECOND


def test_a_run_ends_when_three_pushes_in_a_row_failed(tmp_path):
    work = first_push(tmp_path / "a")
    FailingFileSystem.reset(limit=0)
    for _ in range(mirror.FAILURES - 1):
        assert work.offer()
        work.wait()
    assert work.offer()
    with pytest.raises(urls.RemoteError, match="failing://bucket/runs"):
        work.wait()


def test_errors_that_pass_are_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(urls, "FIRST_WAIT_S", urls.SHOWN_WAIT_S / 256)
    waits = []
    monkeypatch.setattr(urls.time, "sleep", waits.append)
    work = first_push(tmp_path / "a")
    FailingFileSystem.reset(limit=3, error=ConnectionError, failures=10)
    work.push()
    assert len(waits) == 10 and waits[:3] == [1 / 64, 1 / 32, 1 / 16] and waits == sorted(waits)
    assert capsys.readouterr().err.count("warning: failing://bucket/runs/") == 1
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == SECOND


def test_what_is_pushed_is_the_folder_at_that_moment_whatever_is_written_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "COPIED_BYTES", 8)  # larger files are linked
    folder, may_go = tmp_path / "a", threading.Event()
    folder.mkdir()
    work = pulled(folder)
    before = {"small": "s", "large": "l" * 20, "log": "x" * 20, "gone": "g" * 20}
    write(folder, before)
    monkeypatch.setattr(work, "_check", may_go.wait)
    assert work.offer()
    assert not work.offer()  # one at a time
    with (folder / "log").open("a") as file:
        file.write("more")
    (folder / "small").write_text("another")
    (folder / "gone").unlink()
    (folder / ".large.1.tmp").write_text("new" * 9)
    os.replace(folder / ".large.1.tmp", folder / "large")
    may_go.set()
    work.wait()
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == before
    work.push()
    pulled(tmp_path / "c")
    assert read(tmp_path / "c") == {"small": "another", "large": "new" * 9, "log": "x" * 20 + "more"}


def test_half_written_files_and_locks_are_not_pushed(tmp_path, store):
    (tmp_path / "a").mkdir()
    work = pulled(tmp_path / "a")
    names = (".DONE.12.tmp", ".r1_zero.lock", ".graph.lock", "checkpoints/3.orbax-checkpoint-tmp-0/params/d", "5/x")
    write(tmp_path / "a", dict.fromkeys(names, "x"))
    work.push()
    assert plain_objects(store)[0] == {"5/x"}


def test_files_that_the_run_did_not_write_are_left_alone(tmp_path, store):
    other = fsspec.filesystem("failing")
    work = first_push(tmp_path / "a")
    other.pipe_file("/bucket/runs/notes.txt", b"mine")
    work.push()
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == SECOND and store["/bucket/runs/notes.txt"].getvalue() == b"mine"


def test_a_folder_copied_there_by_hand_is_taken_as_it_is(tmp_path, store):
    other = fsspec.filesystem("failing")
    for name in files_of(FIRST):
        other.pipe_file(f"/bucket/runs/{name}", FIRST[name].encode())
    other.pipe_file("/bucket/runs/another_run/.r1jax/manifest-00000001.json", b"{}")
    other.pipe_file("/bucket/runs/another_run/config.json", b"{}")
    work = pulled(tmp_path / "a")
    assert read(tmp_path / "a") == FIRST
    write(tmp_path / "a", SECOND)
    FailingFileSystem.reset(limit=4)  # the first push is killed
    with pytest.raises(urls.RemoteError):
        work.push()
    FailingFileSystem.reset()
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == FIRST
    assert "/bucket/runs/another_run/config.json" in store


def test_a_run_ends_when_another_one_writes_to_its_folder(tmp_path):
    work, other = first_push(tmp_path / "a"), pulled(tmp_path / "b")
    write(tmp_path / "b", THIRD)
    other.push()
    with pytest.raises(urls.RemoteError, match="failing://bucket/runs: another run has written there meanwhile"):
        work.push()
    pulled(tmp_path / "c")
    assert read(tmp_path / "c") == THIRD


def test_a_push_of_a_run_that_another_one_has_taken_over_ends_the_run_at_once(tmp_path):
    work, other = first_push(tmp_path / "a"), pulled(tmp_path / "b")
    write(tmp_path / "b", THIRD)
    other.push()
    assert work.offer()
    with pytest.raises(urls.InUseError, match="another run has written there meanwhile"):
        work.wait()


@pytest.mark.parametrize(("step", "asked"), [("_settle", True), ("_clear", False)])
def test_a_run_that_stood_still_while_another_one_went_on_leaves_its_state_alone(tmp_path, monkeypatch, step, asked):
    lost = threading.Event()

    def may_write():
        if lost.is_set():
            raise urls.InUseError("another run")

    work = first_push(tmp_path / "a")
    if asked:
        monkeypatch.setattr(work._remote, "_may_write", may_write)
    go_on = getattr(work, step)

    def stand_still(*arguments, **named):
        other = pulled(tmp_path / "b")
        assert read(tmp_path / "b") == SECOND
        write(tmp_path / "b", THIRD)
        other.push()
        fsspec.filesystem("failing").pipe_file("/bucket/runs/.r1jax/push-00000099.json", b"[]")  # and its next push
        fsspec.filesystem("failing").pipe_file("/bucket/runs/.r1jax/new-00000099/kept", b"new")
        lost.set()
        go_on(*arguments, **named)

    monkeypatch.setattr(work, step, stand_still)
    with pytest.raises(urls.InUseError) if asked else contextlib.nullcontext():
        work.push()
    assert "/bucket/runs/.r1jax/new-00000099/kept" in FailingFileSystem.store
    pulled(tmp_path / "c")
    assert read(tmp_path / "c") == THIRD
    assert "/bucket/runs/.r1jax/new-00000099/kept" not in FailingFileSystem.store


def test_whether_this_run_may_write_is_asked_before_every_try(monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    asked = []
    folder = urls.RemoteFolder(URL, lambda: asked.append(FailingFileSystem.failures))
    FailingFileSystem.reset(limit=0, error=ConnectionError, failures=2)
    folder.write("x", b"1")
    assert asked == [2, 2, 1, 0]  # the first to make the folder
    folder.remove("x")
    assert len(asked) == 5 and folder.listing() == {} and len(asked) == 5


@pytest.mark.parametrize("unlisted", [".r1jax", "r1_zero/checkpoints"])
def test_a_listing_that_fails_is_no_empty_folder(tmp_path, store, monkeypatch, unlisted):
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    first_push(tmp_path / "a").push()
    if unlisted != ".r1jax":  # as copied there by hand
        for name in [name for name in store if "/.r1jax/" in name]:
            del store[name]
    before = {name: file.getvalue() for name, file in store.items()}
    monkeypatch.setattr(WalkedFileSystem, "unlisted", unlisted)
    monkeypatch.setattr(WalkedFileSystem, "listing_failures", 1, raising=True)
    with pytest.raises(urls.RemoteError, match="cannot list it .PermissionError"):
        pulled(tmp_path / "b", "walked://bucket/runs")
    assert {name: file.getvalue() for name, file in store.items()} == before
    monkeypatch.setattr(WalkedFileSystem, "error", ConnectionError)
    monkeypatch.setattr(WalkedFileSystem, "listing_failures", 2)
    pulled(tmp_path / "c", "walked://bucket/runs")
    assert read(tmp_path / "c") == (
        SECOND if unlisted == ".r1jax" else {name: SECOND[name] for name in files_of(SECOND)}
    )
    assert urls.RemoteFolder("walked://bucket/nothing").listing() == {}


def test_a_manifest_that_is_replaced_while_it_is_looked_for_is_looked_for_again(tmp_path, monkeypatch):
    first_push(tmp_path / "a").push()
    folder, reads = urls.RemoteFolder(URL), []
    read_object = folder.read

    def replaced(name):
        reads.append(name)
        if len(reads) < 3:
            raise FileNotFoundError(name)
        return read_object(name)

    monkeypatch.setattr(folder, "read", replaced)
    assert set(mirror.newest_manifest(folder).files) == files_of(SECOND)
    monkeypatch.setattr(folder, "read", lambda name: (_ for _ in ()).throw(FileNotFoundError(name)))
    with pytest.raises(urls.ChangedError, match="changes faster than it can be read"):
        mirror.newest_manifest(folder)


def test_a_file_that_grows_while_it_is_copied_has_the_bytes_of_the_manifest(tmp_path, monkeypatch, store):
    put = FailingFileSystem.put_file

    def grow_and_put(self, lpath, rpath, **kwargs):
        with open(lpath, "a") as file:
            file.write("more")
        put(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(FailingFileSystem, "put_file", grow_and_put)
    (tmp_path / "log").write_text("x" * 20)
    urls.RemoteFolder(URL).upload(tmp_path / "log", "log", 20)
    assert store["/bucket/runs/log"].getvalue() == b"x" * 20
    with pytest.raises(urls.RemoteError, match="became shorter"):
        urls.RemoteFolder(URL).upload(tmp_path / "log", "log", 100)


@pytest.mark.parametrize("limit", [8, 1000])  # bytes above which files are linked
def test_a_file_that_is_written_anew_during_a_snapshot_is_pushed_whole(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(mirror, "COPIED_BYTES", limit)
    folder, scan = tmp_path / "a", mirror._scan
    folder.mkdir()
    work = pulled(folder)
    write(
        folder,
        {"report.html": "a" * 20, "longer.html": "a" * 20, "phase": "rollout 12\n", "log": "x" * 20, "gone": "g"},
    )

    def scan_and_change(place):
        table = scan(place)
        for name, text in (("report.html", "b" * 10), ("longer.html", "b" * 30)):
            (folder / "new").write_text(text)
            os.replace(folder / "new", folder / name)
        (folder / "phase").write_text("done\n")
        with (folder / "log").open("a") as file:
            file.write("y")
        (folder / "gone").unlink()
        return table

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_scan", scan_and_change)
        work.push()
    whole = {"report.html": "b" * 10, "longer.html": "b" * 30, "phase": "done\n"}
    pulled(tmp_path / "b")
    assert read(tmp_path / "b") == whole | {"log": "x" * 20}
    (folder / "phase").write_text("again\n")
    work.push()
    pulled(tmp_path / "c")
    assert read(tmp_path / "c") == whole | {"log": "x" * 20 + "y", "phase": "again\n"}


def test_of_a_stage_the_newest_checkpoint_alone_is_read_to_start_from_it():
    names = ["a/checkpoints/9/x", "a/checkpoints/10/x", "b/checkpoints/2/x", "checkpoints/1/x", "a/DONE"]
    assert mirror.read_to_start(names) == {*names} - {"a/checkpoints/9/x"}
    aside = {"a/best/checkpoints/2/x", "a/best/checkpoints/3/x", "a/wandb/run/x"}
    names += ["a/inputs.json", "best/x", *aside]  # `best` here is no stage's
    assert mirror.read_to_start(names) == {*names} - aside - {"a/checkpoints/9/x"}


def test_a_manifest_names_every_file_with_its_size(tmp_path, store):
    first_push(tmp_path / "a").push()
    (name,) = plain_objects(store)[1]
    record = json.loads(store[f"/bucket/runs/{name}"].getvalue())
    assert record["files"] == {name: [len(SECOND[name]), name] for name in files_of(SECOND)}
    assert "r1_zero/checkpoints/2/empty" in record["folders"] and record["vanished"] == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://bucket/runs", "gs://bucket/runs: needs a package that is not installed: .*gcsfs"),
        ("nosuch://bucket/runs", "nosuch://bucket/runs cannot be opened: Protocol not known: nosuch"),
    ],
)
def test_a_url_that_cannot_be_opened_is_refused_with_the_reason(url, said):
    with pytest.raises(urls.RemoteError, match=said):
        urls.RemoteFolder(url)


def test_urls_are_those_texts_and_no_others():
    assert all(urls.is_url(text) for text in ("gs://b/x", "s3://b", "memory://x", "local:///x", "hdfs+ha://h/x"))
    assert not any(
        urls.is_url(text) for text in ("runs", "/runs", "file:///runs", "a:b", "://x", "ORG/NAME:train", "gs://")
    )
    assert urls.plain("file:///runs") == "/runs" and urls.plain("gs://b") == "gs://b"
