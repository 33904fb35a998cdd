"""Measurements in a separate process, whose memory is that of one piece of work."""

import json
import os
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def require_memory_figures(who: str) -> None:
    """Raises ValueError on a system without memory figures of a process."""
    if not STATUS.exists():
        raise ValueError(f"{who}: {STATUS} is needed, which only Linux has")


def in_own_process(module: str, *arguments: str, what: str) -> dict:
    """Returns the JSON object that `python -m module arguments` prints last.

    Raises ValueError with its last error line when it fails; `what` names the work in that message.
    """
    environment = dict(os.environ)
    places = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{module.rpartition('.')[2]}: {(done.stderr.strip() or f'{what} was killed').splitlines()[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def restart_peak() -> int:
    """Resets the peak of this process's resident memory and returns the resident memory, in bytes."""
    before = resident()
    try:
        CLEAR.write_text("5")
    except OSError:
        pass  # without permission the peak can only be too large
    return before


def resident() -> int:
    """Returns this process's resident memory, in bytes."""
    return _field("VmRSS")


def peak() -> int:
    """Returns the peak of this process's resident memory, in bytes."""
    return _field("VmHWM")


def _field(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
