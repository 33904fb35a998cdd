"""Where a run meets URLs: local copies of what it reads there, and its work folder there. Imports no JAX.

Stages work on local paths alone. What a URL names is fetched into the cache folder, under a name that changes with its
content, and whatever is written down or printed has the URL again (`shown`), so that a run leaves the same records as
one on local paths.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Generator
from pathlib import Path

from r1jax.core import errors, files, mirror, preempt, url_lock, urls

TRIES = 5  # at a folder that a run writes to while it is fetched
LEFT_S = 3600.0  # what a dead process was fetching is removed when nothing of it has changed for so long
RECORDS = (mirror.STAGE_SIGN, "config.json", "DONE", "figures.json")  # of a stage, or of each stage one folder below
_NAMED = re.compile(r"(?:[^/]+/)?(?:checkpoints/\d+/.*|journal/[^/]+|examples\.jsonl)")  # signs of work in a stage
WITH_WEIGHTS = (  # what is read with a file of weights, from its folder
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
_WEIGHTS = re.compile(r"\.safetensors$|(?:^|/)checkpoints/")
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

    Of a stage's folder the newest checkpoint alone is fetched, with what is read beside it; of STAGE/best the best
    weights. Raises RemoteError where there is nothing, and for what cannot be read.
    """
    text = _plain(text)
    path = known(text)
    if not urls.is_url(text) or os.path.exists(path):
        return path
    if _work is not None and text.startswith(f"{_work.url}/") and _work.holds(text.removeprefix(f"{_work.url}/")):
        return path  # the run has removed it since
    if _refusal:
        raise urls.RemoteError(f"{text}: {_refusal}")
    try:
        fetched = _fetched(text)
    except urls.MissingError:
        if path == text:
            raise
        return path  # in the work folder, where the run may make it
    _local_of[text] = path = str(fetched)
    _note(path, text)
    return path


def _plain(text: str) -> str:
    """Returns a path without `file://`, or a URL without a slash at its end."""
    return text.rstrip("/") if urls.is_url(text) else urls.plain(text)


def local_if_any(text: str) -> str:
    """Returns the same as `local`, but a URL as it is where there is nothing."""
    try:
        return local(text)
    except urls.MissingError:
        return text


def records(text: str, required: bool = False) -> Path:
    """Returns a folder with the records (RECORDS) of the stage at a path or URL, of each stage at that of a work folder.

    Of a URL's checkpoints and examples there are empty files alone. Where there is none, the folder does not exist, or
    with `required` RemoteError is raised.
    """
    text = _plain(text)
    path = known(text)
    if urls.is_url(path):
        try:
            path = str(_fetched(text, only_records=True))
        except urls.MissingError:
            if required:
                raise
        else:
            _note(path, text)
    return Path(path)


def looked_at(text: str) -> str:
    """Returns the same as `local`, for a run that only looks: of stages the records alone, of other models the URL."""
    text = _plain(text)
    path = known(text)
    if not urls.is_url(path):
        return path
    remote = urls.RemoteFolder(text)
    names = remote.listing() if remote.kind() == "folder" else {text: {}}
    stages = mirror.stages_in(names)
    if ("" in stages and "DONE" in names) or ("" not in stages and stages):
        _local_of[text] = path = str(records(text, required=True))
        return path
    return text if any(_WEIGHTS.search(name) for name in names) else local(text)


def beside(folder: Path) -> str:
    """Returns the path or URL of the folder that holds this one."""
    text = shown(str(folder))
    return text.rpartition("/")[0] if urls.is_url(text) else str(folder.absolute().parent)


def _note(path: str, url: str) -> None:
    """Notes the URL of a local path; with the best weights of a stage the stage is there too."""
    _url_of[path] = url
    if url.endswith(f"/{mirror.BEST}"):
        _url_of[path.removesuffix(f"/{mirror.BEST}")] = url.removesuffix(f"/{mirror.BEST}")


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


def _fetched(url: str, only_records: bool = False) -> Path:
    """Returns the local path of the file or folder at a URL, whose content it holds as it is now."""
    remote = urls.RemoteFolder(url)
    for left in reversed(range(TRIES)):
        kind = remote.kind()
        if not kind or (only_records and kind == "file"):
            raise urls.MissingError(f"no such file or folder: {url}")
        try:
            if only_records:
                return _fetch_folder(url, _of_records, _NAMED.fullmatch)
            return _fetch_file(url) if kind == "file" else _fetch_best(url) or _fetch_folder(url)
        except urls.ChangedError:  # a push of a run replaced or removed a file
            if not left:
                raise
    raise AssertionError


def _fetch_file(url: str) -> Path:
    """Returns the local path of the file at a URL, where its newest whole state is; weights with what belongs to them."""
    folder, _, name = url.rpartition("/")
    source, start, manifest = urls.RemoteFolder(folder), "", None
    with contextlib.suppress(urls.RefusedError):  # a folder that may not be listed
        source, start = _manifest_of(folder)
        manifest = mirror.newest_manifest(source)

    def look() -> tuple[mirror.Entries, list[dict]]:
        entries, stamps = {}, []
        for wanted in (name, *(WITH_WEIGHTS if name.endswith(".safetensors") else ())):
            inside = f"{start}/{wanted}" if start else wanted
            size, at = manifest.files.get(inside, (None, inside)) if manifest else (None, inside)
            if manifest and size is None and inside in mirror.begun(source, source.listing(mirror.INSIDE)):
                if wanted == name:
                    raise urls.MissingError(f"no such file or folder: {url}")
                continue  # a push had begun to write it
            try:
                info = source.info(at)
            except (FileNotFoundError, urls.RefusedError) as error:
                if wanted != name:
                    continue
                if isinstance(error, urls.RefusedError):
                    raise
                raise urls.ChangedError(f"{url} is not there any more; bring it back") from None
            entries[wanted] = (mirror.size_of(info) if size is None else size, at)
            stamps.append(info)
        return entries, stamps

    entries, stamps = look()

    def finish(folder: Path) -> None:
        if look() != (entries, stamps):
            raise urls.ChangedError(f"{url} changed while it was fetched; give the same command again")

    return _kept("files", _key(url, stamps), source, entries, name, finish)


def _fetch_best(url: str) -> Path | None:
    """Returns the local path of a stage's best weights, with what is read beside them above; None for anything else."""
    above, _, name = url.rpartition("/")
    if name != mirror.BEST or not urls.is_url(above):
        return None
    entries = _listed(above)[2]
    if mirror.STAGE_SIGN not in entries or not any(inside.startswith(f"{name}/checkpoints/") for inside in entries):
        return None
    return _fetch_folder(above, _of_best) / name


def _of_best(names: Collection[str]) -> Collection[str]:
    return [name for name in names if name in RECORDS or name.startswith((f"{mirror.BEST}/", "model/"))]


def _of_records(names: Collection[str]) -> Collection[str]:
    return [name for name in names if name.count("/") < 2 and name.rpartition("/")[2] in RECORDS]


def _fetch_folder(
    url: str,
    choose: Callable[[Collection[str]], Collection[str]] = mirror.read_to_start,
    is_named: Callable[[str], object] = lambda name: False,
) -> Path:
    """Returns the local path of the folder at a URL with the files that `choose` chooses, and those that `is_named` as
    empty files. Raises ChangedError if they are others by the end."""
    name = url.rpartition("/")[2]

    def look() -> tuple[urls.RemoteFolder, mirror.Entries, list[str], list[tuple]]:
        source, start, entries = _listed(url)
        chosen = {inside: entries[inside] for inside in sorted(choose(entries))}
        empty = [inside for inside in sorted(entries) if is_named(inside) and inside not in chosen]
        infos = source.listing(start)
        if start and any(at.startswith(f"{mirror.INSIDE}/") for _, at in chosen.values()):
            infos |= source.listing(mirror.INSIDE)
        stamps = [(inside, size, at, infos.get(at)) for inside, (size, at) in chosen.items()]
        return source, chosen, empty, stamps

    source, chosen, empty, stamps = look()
    if not chosen:
        raise urls.MissingError(f"{url} holds no files")

    def finish(folder: Path) -> None:
        for place in (folder / name / inside for inside in empty):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        if look()[2:] != (empty, stamps):
            raise urls.ChangedError(f"{url} changed while it was fetched; give the same command again")

    within = {f"{name}/{inside}": entry for inside, entry in chosen.items()}
    return _kept("folders", _key(url, [stamps, empty]), source, within, name, finish)


def _listed(url: str) -> tuple[urls.RemoteFolder, str, mirror.Entries]:
    """Returns (folder with a manifest, name of the URL in it, the files there by their names below the URL).

    What no manifest names is taken as it is, but for what a push had begun to write.
    """
    source, start = _manifest_of(url)
    manifest = mirror.newest_manifest(source)
    if manifest is None:
        return source, start, mirror.as_listed(source).below(f"{start}/" if start else "")
    if not start or (entries := manifest.below(f"{start}/")):
        return source, start, entries if start else manifest.files
    if any(name.startswith(f"{start}/") for name in mirror.begun(source, source.listing(mirror.INSIDE))):
        return source, start, {}
    source = urls.RemoteFolder(url)
    return source, "", mirror.as_listed(source).files


def _manifest_of(url: str) -> tuple[urls.RemoteFolder, str]:
    """Returns (the folder at or above a URL that has a manifest, else that of the URL; the name of the URL in it)."""
    protocol, _, path = url.partition("://")
    parts = path.split("/")
    for length in range(len(parts), 0, -1):
        above = urls.RemoteFolder(f"{protocol}://{'/'.join(parts[:length])}")
        try:
            if parts[length - 1] and above.listing(mirror.INSIDE):
                return above, "/".join(parts[length:])
        except urls.RefusedError:  # one above may not be listed
            if length == len(parts):
                raise
    return urls.RemoteFolder(url), ""


def _kept(
    kind: str,
    key: str,
    remote: urls.RemoteFolder,
    entries: mirror.Entries,
    name: str,
    finish: Callable[[Path], None],
) -> Path:
    """Returns the place in the cache of the file or folder `name`, whose files are fetched where they are missing.

    `finish` is called with what was fetched.
    """
    folder = cache() / kind / key
    if not folder.exists():
        _remove_left(folder.parent)
        try:
            with files.replacing(folder) as temporary:
                mirror.fetch(remote, entries, temporary)
                finish(temporary)
        except OSError:
            if not folder.exists():  # else another process has just fetched the same
                raise
    return folder / name


def _remove_left(folder: Path) -> None:
    """Removes what killed processes were fetching into a folder of the cache, which machines may share."""
    for left in folder.glob(".*.[0-9]*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            changed = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if time.time() - changed > LEFT_S and not url_lock.is_alive(int(left.name.split(".")[-2])):
                shutil.rmtree(left, ignore_errors=True)


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
        work = mirror.Mirror(url, folder, held.check, held.hold)
        try:
            fetched = work.pull()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if fetched:
            urls.print_line(f"{url}: fetched {fetched / 1e6:.1f} MB to {folder}")
        _work, _saved = work, None
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(preempt.Preempted), preempt.deferred():  # the first error counts
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
    try:
        yield path
        with preempt.deferred():
            try:
                _copy(path, url.rstrip("/"))
            except Exception as error:
                _kept_mark(folder).touch()
                _url_of.pop(str(path))
                raise urls.RemoteError(f"{errors.one_line(error)}; it is in {path}") from error
    finally:
        if not _kept_mark(folder).exists():
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
        urls.print_line(f"error: {text}")
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
