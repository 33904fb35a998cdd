"""Rows of metrics for Weights & Biases, where its package is installed and the config names a project.

What its own environment says (WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY, ...) counts.
"""

import importlib.metadata
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1jax.core import errors, files, hosts, remote
from r1jax.core.say import say

Values = Mapping[str, float]
RUN_ID_FILE = "wandb_run_id"
LEAST_VERSION = (0, 31)
LONGEST_NAME = 128  # characters that W&B takes
SETTINGS: Mapping[str, Any] = {  # of W&B; a variable of its environment counts in a setting's place
    "finish_timeout": 120.0,  # seconds that a run waits at its end until its rows are sent
    # By itself W&B also sends what is printed, the load of the machine, its name, the command line, and the packages
    # and the Git state of the folder that the command is started in.
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "host": "",
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}


def require(project: str) -> None:
    """Raises ValueError, with the remedy, where rows are to go to a project and cannot: no package, or no login.

    To be called before any work. Nothing is sent. Of several processes process 0 looks.
    """
    if project:
        hosts.decide(_require, project, name="Weights & Biases")


def _require(project: str) -> None:
    field = f"config.watch.wandb_project={project}"
    if _version() < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"{field} needs the package wandb; pip install 'wandb>={least}', or leave the field out")
    import wandb

    try:
        online = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled")
        known = not online or wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise ValueError(f"{field}: wandb refuses its settings: {errors.one_line(error)}") from None
    if not known:
        raise ValueError(
            f"{field} needs a login: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline to send later"
        )


def _version() -> tuple[int, ...]:
    """Returns the first two numbers of the installed version, (0,) where the package is not installed."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("wandb"))[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0,)


class WandbLog:
    """Sends the rows of one folder's metrics to one run of W&B, the same when the run goes on.

    It begins with the first row, and sends those before it that are missing there. What fails is one line of warning:
    then no more rows are sent, and the run goes on.
    """

    def __init__(self, folder: Path, project: str, rows: Callable[[], Mapping[int, Values]]):
        """`rows` returns the values of all updates whose rows are on disk."""
        self.folder, self.project, self._rows = Path(folder), project, rows
        self._run: Any = None
        self._failed = False

    def write(self, update: int, values: Values) -> None:
        """Sends the values of an update whose row is on disk."""
        self._try(self._write, update, values)

    def close(self) -> None:
        """Ends the run there, once its rows are sent."""
        if self._run is not None:
            self._try(self._run.finish)
            self._run = None

    def _try(self, function, *arguments) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except Exception as error:
            self._failed = True
            say(f"warning: no more rows go to Weights & Biases, and the run goes on: {errors.one_line(error)}")

    def _write(self, update: int, values: Values) -> None:
        if self._run is not None:
            self._run.log(dict(values), step=update)
            return
        self._run = self._begin()
        first = self._run.step  # of a run that goes on over the network: after those that it has
        for number, row in sorted(self._rows().items()):
            if number >= first:
                self._run.log(dict(row), step=number)

    def _begin(self) -> Any:
        import wandb  # slow to import, and only runs that write need it

        path, config = self.folder / RUN_ID_FILE, self.folder / "config.json"
        if not path.exists():
            files.write_text(path, uuid.uuid4().hex[:12])
        return wandb.init(
            project=self.project,
            id=path.read_text().strip(),
            resume="allow",
            reinit="create_new",  # a run that the caller has begun in this process is another one
            name=os.environ.get("WANDB_NAME") or run_name(self.folder),
            dir=os.environ.get("WANDB_DIR") or str(self.folder),
            config=json.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
            settings={name: value for name, value in SETTINGS.items() if _variable(name) not in os.environ},
        )


def _variable(setting: str) -> str:
    """Returns the variable of the environment by which W&B reads a setting; that of x_NAME is WANDB__NAME."""
    return f"WANDB_{setting.removeprefix('x').upper()}"


def run_name(folder: Path) -> str:
    """Returns WORKDIR/STAGE of a stage's folder: the points of a sweep differ in the first."""
    parts = remote.shown(os.path.abspath(folder)).split("/")
    return "/".join(parts[-2:])[-LONGEST_NAME:]
