"""The checkout as an archive: the files that git tracks, as they are now, and those that the run needs besides."""

import os
import pathlib
import subprocess
import tarfile
from collections.abc import Iterable

from r1jax.pod.remedies import PodError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write(path: pathlib.Path, extra: Iterable[str], root: pathlib.Path = ROOT) -> int:
    """Writes the archive, and returns how many files it has; raises PodError where git does not know the checkout.

    A link stays a link. What `extra` names outside the checkout is put beside setup.py.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        raise PodError(f"{root} is no checkout of git: run launch/tpu_pod.py from one, made by git clone") from None
    names = {name: root / name for name in listed.split("\0") if name}
    for text in extra:
        names |= _named(pathlib.Path(os.path.abspath(pathlib.Path(text).expanduser())), root)
    present = {name: source for name, source in names.items() if source.is_symlink() or source.is_file()}
    with tarfile.open(path, "w:gz") as archive:
        for name, source in sorted(present.items()):
            archive.add(source, name, recursive=False)
    return len(present)


def _named(path: pathlib.Path, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns {name in the archive: file} of a file, or of all files below a folder."""
    if not path.exists():
        raise PodError(f"--with_file={path}: there is no such file")
    base = root if path.is_relative_to(root) else path.parent
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(base).as_posix(): file for file in files}
