"""A local folder kept in step with one at a URL, which is whole at every moment, whenever a push ends. No JAX.

Object stores neither append nor rename, so a run works in a local folder, and its files are copied under the same names.
What counts at the URL is a manifest, `.r1jax/manifest-N.json`: {name: [bytes, where it is]}. A push changes nothing that
the newest manifest names before the next manifest is there, as one object:

    1. the names of files that are new there go to push-N.json, so that a later start can remove what a killed push left
    2. new files go to their names, and files that replace others to .r1jax/new-N/
    3. manifest N names them all: from here on the new state counts
    4. replaced files go to their names, files that vanished are removed, manifest N + 1 names the usual places

Files that no manifest names are left alone.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1jax.core import errors, urls

INSIDE = ".r1jax"  # the folder at a URL with what this module keeps there
COPIED_BYTES = 1 << 24  # files up to this size are copied for a push, larger ones linked: they are written once
FAILURES = 3  # pushes in a row that may fail before the run ends
READINGS = 5  # of a folder whose manifests are replaced while they are read
STAGE_SIGN, BEST = "inputs.json", "best"  # the file by which a folder is a stage's, and its folder of best weights
_MANIFEST = re.compile(re.escape(INSIDE) + r"/manifest-(\d+)\.json")
_PUSH = re.compile(re.escape(INSIDE) + r"/push-\d+\.json")
_OF_PUSH = re.compile(re.escape(INSIDE) + r"/(?:push|new)-(\d+)[./]")
_IN_WORK = re.compile(r"\..*\.(tmp|lock)|.*\.orbax-checkpoint-tmp.*|" + re.escape(INSIDE))  # files and folders
UNKNOWN = -1  # bytes of a file whose size its server does not say
Entries = dict[str, tuple[int, str]]  # name -> (bytes, name of the object that holds it)


@dataclass
class Manifest:
    """The state of a folder at a URL."""

    number: int = 0
    files: Entries = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)  # that are empty
    vanished: list[str] = field(default_factory=list)  # objects to be removed
    writer: str = ""  # the process that wrote it

    @property
    def settled(self) -> bool:
        """Whether every file is at its usual place and nothing is left to be removed."""
        return not self.vanished and all(name == at for name, (_, at) in self.files.items())

    def encode(self) -> bytes:
        return json.dumps({name: value for name, value in vars(self).items() if name != "number"}).encode()

    def below(self, prefix: str) -> Entries:
        """Returns the files below a folder, by their names relative to it."""
        return {name.removeprefix(prefix): entry for name, entry in self.files.items() if name.startswith(prefix)}


def newest_manifest(folder: urls.RemoteFolder) -> Manifest | None:
    """Returns the newest whole manifest at a URL, None where there is none.

    Raises ChangedError where every one that is listed is replaced before it is read.
    """
    for _ in range(READINGS):
        names = {int(match[1]): name for name in folder.listing(INSIDE) if (match := _MANIFEST.fullmatch(name))}
        replaced = False
        for number in sorted(names, reverse=True):
            try:
                record = _read_json(folder, names[number])
            except FileNotFoundError:
                replaced = True
                continue
            if record is not None:
                entries = {name: (size, at) for name, (size, at) in record.pop("files").items()}
                return Manifest(number, entries, **record)
        if not replaced:
            return None
    raise urls.ChangedError(f"{folder.url} changes faster than it can be read; give the same command again")


def _read_json(folder: urls.RemoteFolder, name: str) -> Any:
    """Returns what a JSON object at a URL holds, None for one that a kill cut off.

    Not every file system writes objects whole. Raises FileNotFoundError where there is none.
    """
    content = folder.read(name)
    try:
        return json.loads(content)
    except ValueError:
        return None


def begun(folder: urls.RemoteFolder, listed: Collection[str]) -> set[str]:
    """Returns the names of the files that pushes were to add; `listed` are the names that INSIDE holds.

    Of a push that was killed they may be half-written, unless a manifest names them.
    """
    names: set[str] = set()
    for name in filter(_PUSH.fullmatch, listed):
        with contextlib.suppress(FileNotFoundError):
            names |= set(_read_json(folder, name) or ())
    return names


def as_listed(folder: urls.RemoteFolder) -> Manifest:
    """Returns the state of a folder without a manifest, as when its files were copied there by hand.

    Folders below that have a manifest of their own are left out.
    """
    listed = folder.listing()
    others = {name[: match.start()] for name in listed if (match := re.search(rf"(?:^|/){re.escape(INSIDE)}/", name))}
    prefixes = tuple(f"{other}/" for other in others if other)
    kept = {name: info for name, info in listed.items() if name and not name.startswith((f"{INSIDE}/", *prefixes))}
    return Manifest(files={name: (size_of(info), name) for name, info in kept.items()})


def size_of(info: Mapping[str, Any]) -> int:
    """Returns the bytes of a file by what the file system knows of it, UNKNOWN where it does not say."""
    return UNKNOWN if info["size"] is None else int(info["size"])


class Mirror:
    """A local folder, empty at first, and the folder at a URL that it is kept in step with. One process has it."""

    def __init__(
        self,
        url: str,
        local: Path,
        check: Callable[[], None] = lambda: None,
        may_write: Callable[[], None] = lambda: None,
    ):
        """`check` is called before each step of a push, and `may_write` before every try to change something; they raise
        RemoteError if this process may not do so."""
        self.url, self.local, self._check = url, Path(local), check
        self._remote, self._writer = urls.RemoteFolder(url, may_write), secrets.token_hex(8)
        self._manifest, self._table = Manifest(), {}
        self._begun: set[str] = set()  # names that a push which failed may have written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failures = 0

    def pull(self) -> int:
        """Fetches the folder and returns its bytes. What a killed push left at the URL is removed, or brought to its end."""
        manifest = newest_manifest(self._remote)
        if manifest is None:
            manifest = as_listed(self._remote)
            manifest.number, manifest.writer = 1, self._writer
            self._check()
            self._write(manifest)
        self._manifest = manifest
        fetch(self._remote, manifest.files, self.local)
        for name in manifest.folders:
            (self.local / name).mkdir(parents=True, exist_ok=True)
        self._table = _scan(self.local)
        self._check()
        self._settle(self.local)
        self._clear(killed=True)
        return sum(path.stat().st_size for path in map(self.local.joinpath, manifest.files))

    def holds(self, name: str) -> bool:
        """Returns whether the state at the URL has a file or folder of this name."""
        return any(f"{known}/".startswith(f"{name}/") for known in self._manifest.files)

    def offer(self) -> bool:
        """Begins a push in a thread unless one is at work, and returns whether it did; to be called between two writes.

        What the folder holds now is pushed, whatever is written while the thread works. A push that fails prints a
        warning and is made up for by the next one; when FAILURES fail one after another, this raises their error.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        self._begin()
        return True

    def push(self) -> None:
        """Brings the URL up to date and returns then. Raises RemoteError, naming the URL, if that fails."""
        self._ended()  # this one makes up for one that failed
        self._begin()
        if (error := self._ended()) is not None:
            raise error

    def _ended(self) -> BaseException | None:
        """Returns, when no push is at work, the error of the last one."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def wait(self) -> None:
        """Returns when no push is at work. Raises the error of a push when FAILURES failed one after another, and
        InUseError at once."""
        if self._thread is None:
            return
        error = self._ended()
        self._failures = self._failures + 1 if error is not None else 0
        if error is None:
            return
        passing = isinstance(error, urls.RemoteError) and not isinstance(error, urls.InUseError)
        if self._failures >= FAILURES or not passing:
            raise error
        urls.print_line(f"warning: {errors.one_line(error)}; the next checkpoint tries again")

    def _begin(self) -> None:
        snapshot, table = self._snapshot()
        self._thread = threading.Thread(target=self._run, args=(snapshot, table), name="push", daemon=True)
        self._thread.start()

    def _run(self, snapshot: Path, table: dict[str, tuple]) -> None:
        try:
            self._push(snapshot, table)
        except BaseException as error:
            self._error = error
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _snapshot(self) -> tuple[Path, dict[str, tuple]]:
        """Returns (a folder beside the local one with what changed in it since the last push, the table of all files)."""
        folder = Path(tempfile.mkdtemp(prefix=f".{self.local.name}.push-", dir=self.local.parent))
        table = _scan(self.local)
        for name in [name for name, entry in table.items() if entry and self._table.get(name) != entry]:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            size, changed_at, inode = table[name]
            try:
                kept, inode_kept = _keep(self.local / name, target, size)
            except FileNotFoundError:  # removed since the scan
                del table[name]
                continue
            if kept < size or inode_kept != inode:  # written anew since the scan: whole as it is, and pushed again
                table[name] = (kept, changed_at, inode)
        return folder, table

    def _push(self, snapshot: Path, table: dict[str, tuple]) -> None:
        self._refuse_other_writers()
        files = {name: entry for name, entry in table.items() if entry}
        changed = {name: entry[0] for name, entry in files.items() if self._table.get(name) != entry}
        before, number = self._manifest, self._manifest.number + 1
        vanished = sorted((before.files.keys() | set(before.vanished) | self._begun) - files.keys())
        folders = [name for name, entry in table.items() if not entry]
        if not changed and not vanished and folders == before.folders:
            return
        self._check()
        fresh = [name for name in changed if name not in before.files]
        self._begun |= set(fresh)
        self._remote.write(f"{INSIDE}/push-{number:08d}.json", json.dumps(sorted(self._begun)).encode())
        places = {name: name if name in fresh else f"{INSIDE}/new-{number:08d}/{name}" for name in changed}

        def upload(name: str) -> None:
            self._remote.upload(snapshot / name, places[name], changed[name])

        urls.move(f"{self.url}: written", changed, upload)
        self._check()
        entries = {name: (entry[0], places.get(name, name)) for name, entry in files.items()}
        self._write(Manifest(number, entries, folders, vanished, self._writer))
        self._table = {name: entry for name, entry in table.items() if places.get(name, name) == name}
        self._check()
        self._settle(snapshot)
        self._table = table  # else the next push writes the files again that are not at their names yet
        self._check()
        self._clear(killed=False)

    def _write(self, manifest: Manifest) -> None:
        self._remote.write(f"{INSIDE}/manifest-{manifest.number:08d}.json", manifest.encode())
        self._manifest = manifest
        self._begun -= manifest.files.keys() | set(manifest.vanished)

    def _settle(self, source: Path) -> None:
        """Brings replaced files to their names, from their copies in `source`, and removes what vanished."""
        manifest = self._manifest
        if manifest.settled:
            return
        moved = {name: size for name, (size, at) in manifest.files.items() if name != at}
        urls.in_threads(lambda name: self._remote.upload(source / name, name, moved[name]), moved)
        urls.in_threads(self._remote.remove, manifest.vanished)
        entries = {name: (size, name) for name, (size, _) in manifest.files.items()}
        self._write(Manifest(manifest.number + 1, entries, manifest.folders, [], self._writer))

    def _clear(self, killed: bool) -> None:
        """Removes older manifests, and what pushes left that no manifest names: this one's, with `killed` any other's.

        What a later run began stays.
        """
        manifest, listed = self._manifest, self._remote.listing(INSIDE)
        of_push = {name: int(match[1]) for name in listed if (match := _OF_PUSH.match(name))}
        inside = [name for name, push in of_push.items() if killed or push <= manifest.number]
        urls.in_threads(self._remote.remove, begun(self._remote, inside) - manifest.files.keys())
        older = [name for name in listed if (match := _MANIFEST.fullmatch(name)) and int(match[1]) < manifest.number]
        urls.in_threads(self._remote.remove, [*inside, *older])

    def _refuse_other_writers(self) -> None:
        """Takes over a manifest that this process wrote without hearing of it. Raises RemoteError for one of another."""
        newest = newest_manifest(self._remote)
        number = 0 if newest is None else newest.number
        if number == self._manifest.number:
            return
        if newest is None or newest.writer != self._writer:
            raise urls.InUseError(
                f"{self.url}: another run has written there meanwhile; stop one of them, or choose another --workdir"
            )
        self._manifest = newest
        self._begun -= newest.files.keys() | set(newest.vanished)


def fetch(remote: urls.RemoteFolder, files: Entries, target: Path) -> None:
    """Fetches {name: (bytes, where it is)} into a local folder.

    Raises ChangedError for a file that is not there, or of another size.
    """

    def one(name: str) -> None:
        size, at = files[name]
        try:
            remote.download(at, target / name)
        except FileNotFoundError:
            raise urls.ChangedError(f"{urls.join(remote.url, at)} is not there any more; bring it back") from None
        if (fetched := (target / name).stat().st_size) != size != UNKNOWN:
            raise urls.ChangedError(
                f"{urls.join(remote.url, at)} has {fetched} bytes, {size} were written; bring it back"
            )

    target.mkdir(parents=True, exist_ok=True)
    urls.move(f"{remote.url}: fetched", {name: size for name, (size, _) in files.items()}, one)


def _scan(folder: Path) -> dict[str, tuple]:
    """Returns {name: (bytes, time of change, inode)} of the files below a folder, () for an empty folder.

    Files and folders that are being written are left out.
    """
    table: dict[str, tuple] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _IN_WORK.fullmatch(name))
        inside = os.path.relpath(place, folder)
        if not folders and not names and inside != ".":
            table[inside] = ()
        for name in sorted(names):
            if _IN_WORK.fullmatch(name):
                continue
            path = Path(place, name)
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                table[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return table


def _keep(source: Path, target: Path, size: int) -> tuple[int, int]:
    """Makes `target` the file's content as it is now, a copy or a link to a large one, and returns (bytes, inode)."""
    if size > COPIED_BYTES:
        try:
            os.link(source, target)
            status = target.stat()
            return status.st_size, status.st_ino
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            pass
    with source.open("rb") as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        return os.fstat(copy.fileno()).st_size, os.fstat(file.fileno()).st_ino


def stages_in(names: Iterable[str]) -> set[str]:
    """Returns what comes before the name of a file in each stage's folder among them: "" or "STAGE/"."""
    return {name.removesuffix(STAGE_SIGN) for name in names if f"/{name}".endswith(f"/{STAGE_SIGN}")}


def read_to_start(names: Collection[str]) -> set[str]:
    """Returns the names of a stage's or a work folder's files that are read to start from it: of the checkpoints of each
    folder the newest alone, and nothing of a stage's best weights and of Weights & Biases."""
    stages = stages_in(names)
    aside = tuple(f"{stage}{folder}/" for stage in stages for folder in (BEST, "wandb"))
    names = {name for name in names if not name.startswith(aside)}
    newest: dict[str, int] = {}
    numbered = {name: match for name in names if (match := re.match(r"((?:.*/)?checkpoints/)(\d+)/", name))}
    for match in numbered.values():
        newest[match[1]] = max(int(match[2]), newest.get(match[1], 0))
    return {name for name in names if name not in numbered or int(numbered[name][2]) == newest[numbered[name][1]]}
