"""Where a run meets URLs: local copies of what it reads there, and its work folder there. Imports no JAX.

Stages work on local paths alone. What a URL names is fetched into the cache folder, under a name that changes with its
content, and whatever is written down or printed has the URL again (`shown`), so that a run leaves the same records as
one on local paths.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from r1jax.core import errors, files, mirror, preempt, url_lock, urls

TRIES = 3  # at a folder that a run writes to while it is fetched
_local_of: dict[str, str] = {}  # URL -> local path
_url_of: dict[str, str] = {}  # local path -> URL, also of folders that are gone
_work: mirror.Mirror | None = None  # of the run of this process
_refusal = ""  # why this process fetches nothing
_saved: Callable[[], bool] | None = None  # whether the checkpoint that is being written, or was, is on disk


def cache() -> Path:
    """Returns the folder for what is fetched and for work folders: R1JAX_URL_CACHE, else in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("R1JAX_URL_CACHE", Path(home) / "r1jax" / "urls")).absolute()


def known(text: str) -> str:
    """Returns the local path of a URL that this process has fetched or works in; any other text as it is."""
    for url in sorted(_local_of, key=len, reverse=True):
        if text == url or text.startswith(f"{url}/"):
            return _local_of[url] + text.removeprefix(url)
    return text


def local(text: str) -> str:
    """Returns the local path of a path or URL; what is at a URL is fetched the first time.

    Of a stage's folder the newest checkpoint alone is fetched. Raises RemoteError where there is nothing, and for what
    cannot be read.
    """
    text = known(urls.plain(text).rstrip("/") if urls.is_url(text) else urls.plain(text))
    if not urls.is_url(text):
        return text
    if _refusal:
        raise urls.RemoteError(f"{text}: {_refusal}")
    _local_of[text] = path = str(_fetched(text))
    _url_of[path] = text
    return path


def refuse(why: str) -> None:
    """Makes `local` raise RemoteError with this reason for every URL, until it is called with an empty one."""
    global _refusal
    _refusal = why


def forget() -> None:
    """Makes `local` look again at what is at each URL."""
    _local_of.clear()


def shown(text: str) -> str:
    """Returns a text, which may be JSON, with URLs in place of their local paths."""
    for path in sorted(_url_of, key=len, reverse=True):
        text = text.replace(path, _url_of[path]).replace(_as_json(path), _as_json(_url_of[path]))
    return text


def _as_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _fetched(url: str) -> Path:
    """Returns the local path of the file or folder at a URL, whose content it holds as it is now."""
    remote = urls.RemoteFolder(url)
    for left in reversed(range(TRIES)):
        kind = remote.kind()
        if not kind:
            raise urls.RemoteError(f"no such file or folder: {url}")
        try:
            return _fetch_file(url) if kind == "file" else _fetch_folder(url)
        except urls.ChangedError:  # a push of a run replaced or removed a file
            if not left:
                raise
    raise AssertionError


def _fetch_file(url: str) -> Path:
    folder, _, name = url.rpartition("/")
    remote = urls.RemoteFolder(folder)
    info = remote.info(name)
    return _kept("files", _key(url, info), remote, {name: (int(info["size"] or 0), name)}, name)


def _fetch_folder(url: str) -> Path:
    source, start = _manifest_of(url)
    manifest = mirror.newest_manifest(source) or mirror.as_listed(source)
    entries = manifest.below(f"{start}/" if start else "")
    chosen = {name: entries[name] for name in mirror.read_to_start(entries)}
    if not chosen:
        raise urls.RemoteError(f"{url} holds no files")
    infos = source.listing(start)
    stamps = [(name, *chosen[name], infos.get(chosen[name][1])) for name in sorted(chosen)]
    name = url.rpartition("/")[2]
    within = {f"{name}/{inside}": entry for inside, entry in chosen.items()}
    return _kept("folders", _key(url, stamps), source, within, name)


def _manifest_of(url: str) -> tuple[urls.RemoteFolder, str]:
    """Returns (the folder at or above a URL that has a manifest, else that of the URL; the name of the URL in it)."""
    protocol, _, path = url.partition("://")
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        above = urls.RemoteFolder(f"{protocol}://{'/'.join(parts[:length])}")
        with contextlib.suppress(urls.RemoteError):  # one that may not be listed
            if parts[length - 1] and above.listing(mirror.INSIDE):
                return above, "/".join(parts[length:])
    return urls.RemoteFolder(url), ""


def _kept(kind: str, key: str, remote: urls.RemoteFolder, entries: mirror.Entries, name: str) -> Path:
    """Returns the place in the cache of the file or folder `name`, whose files are fetched where they are missing."""
    folder = cache() / kind / key
    if not folder.exists():
        try:
            with files.replacing(folder) as temporary:
                mirror.fetch(remote, entries, temporary)
        except OSError:
            if not folder.exists():  # else another process has just fetched the same
                raise
    return folder / name


def _key(url: str, content: object) -> str:
    text = json.dumps([url, content], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextlib.contextmanager
def work_folder(url: str) -> Generator[Path]:
    """Yields a local folder with what is at a URL; at the end of the block, however it ends, the URL has what it holds.

    In between, a checkpoint or the end of a stage brings the URL up to date (`moment`). Where that fails at the end,
    the folder stays, and an error names it. Raises RemoteError if another run has the URL.
    """
    global _work, _saved
    url, held = url.rstrip("/"), url_lock.UrlLock(url.rstrip("/"))
    try:
        folder = _new_folder(url)
        _local_of[url], _url_of[str(folder)] = str(folder), url
        work = mirror.Mirror(url, folder, held.check)
        if fetched := work.pull():
            print(f"{url}: fetched {fetched / 1e6:.1f} MB to {folder}", file=sys.stderr, flush=True)
        _work, _saved = work, None
        try:
            yield folder
        except BaseException:
            _last_push(work, folder, raises=False)
            raise
        with preempt.deferred():
            _last_push(work, folder, raises=True)
    finally:
        _work = _saved = None
        _local_of.pop(url, None)
        held.release()


@contextlib.contextmanager
def output(url: str) -> Generator[Path]:
    """Yields a local path for a file or folder that the block makes; at its end that is copied to the URL, whole.

    A folder becomes whole there with its config.json, which is copied last. Nothing is copied if the block raises.
    """
    folder = _new_folder(url)
    path = folder / url.rstrip("/").rpartition("/")[2]
    _url_of[str(path)] = url.rstrip("/")
    yield path
    with preempt.deferred():
        try:
            _copy(path, url.rstrip("/"))
        except urls.RemoteError as error:
            _kept_mark(folder).touch()
            _url_of.pop(str(path))
            raise urls.RemoteError(f"{errors.one_line(error)}; it is in {path}") from error
    shutil.rmtree(folder, ignore_errors=True)


def _copy(path: Path, url: str) -> None:
    if path.is_file():
        folder, _, name = url.rpartition("/")
        urls.RemoteFolder(folder).upload(path, name, path.stat().st_size)
    elif path.is_dir():
        remote = urls.RemoteFolder(url)
        sizes = {p.relative_to(path).as_posix(): p.stat().st_size for p in path.rglob("*") if p.is_file()}
        last = {name: sizes.pop(name) for name in ("config.json",) if name in sizes}
        for part in (sizes, last):
            urls.move(f"{url}: written", part, lambda name, part=part: remote.upload(path / name, name, part[name]))


def _last_push(work: mirror.Mirror, folder: Path, raises: bool) -> None:
    """Brings the URL up to date and removes the local folder, or keeps it where that fails."""
    try:
        work.push()
    except Exception as error:
        _kept_mark(folder).touch()
        _url_of.pop(str(folder))  # the error names the folder itself
        text = f"{errors.one_line(error)}; what this run made since its last push is in {folder}"
        if raises:
            raise urls.RemoteError(text) from error
        print(f"error: {text}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(url: str) -> Path:
    """Returns a new empty folder for a work folder; those that killed runs on this machine left of it are removed."""
    place = cache() / "work" / f"{_key(url, 'work')}-{socket.gethostname()}"
    place.mkdir(parents=True, exist_ok=True)
    for leftover in place.iterdir():
        if leftover.is_dir() and not _kept_mark(leftover).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=place))


def _kept_mark(folder: Path) -> Path:
    """Returns the file whose existence keeps the local folder of a run that could not bring the URL up to date."""
    return folder.with_name(f"{folder.name}.kept")


def saving(finished: Callable[[], bool]) -> None:
    """Notes that a checkpoint is being written; `finished` returns whether it is on disk."""
    global _saved
    if _work is not None:
        _saved = finished


def stage_finished() -> None:
    """Brings the work folder at a URL up to date, now or at the next `moment`; does nothing without one."""
    saving(lambda: True)
    moment()


def moment() -> None:
    """Brings the work folder at a URL up to date if a checkpoint is on disk that is not there.

    To be called in the main thread between two writes: what the folder holds then is what a run could go on from. A
    thread does the work.
    """
    global _saved
    if _work is not None and _saved is not None and _saved() and _work.offer():
        _saved = None


def write(url: str, content: bytes) -> None:
    """Writes a file at a URL."""
    folder, _, name = url.rpartition("/")
    urls.RemoteFolder(folder).write(name, content)
