"""Compiles a program for a TPU topology with libtpu, without a TPU, and reads the compiler's decisions.

libtpu runs in a separate process with a deadline: it may abort, it holds a lock as long as its process lives, and in
fast mode it is stopped as soon as memory is laid out, before it emits code. All figures are the compiler's.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from r1jax.core import files
from r1jax.plan import hlo

GIB = 2**30
# HBM left for programs on one device of each generation, by libtpu 0.0.52; v4 and tpu7x have two devices per chip.
HBM_GIB = {"v4": 15.25, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
DEADLINE_S = 180.0
SETTLED_S = 0.5  # a dump that has not changed for this long is complete
# Avoids requests to a metadata server, warnings about a missing worker list, and failures on libtpu's lock file.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-128",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_REMATERIALIZED = re.compile(r"Involuntary full rematerialization.*")
Mode = Literal["fast", "full"]
Part = tuple[tuple[int, ...], tuple[int, ...]]  # a device's part of an array, the whole array


@dataclass(frozen=True)
class LoweredProgram:
    """The result of a builder: a program lowered for a mesh of the topology's devices."""

    lowered: jax.stages.Lowered
    mesh: Mesh
    weights: Mapping[str, Part] = field(default_factory=dict)  # weights whose collectives `Plan.gathered` lists


@dataclass(frozen=True)
class Plan:
    """The compiler's decisions on one program and one topology."""

    topology: str
    program: str
    mode: Mode
    mesh: Mapping[str, int]
    memory: hlo.Memory  # of one device
    available: int  # bytes of HBM of one device, 0 where unknown
    collectives: tuple[hlo.Collective, ...]
    rematerialized: tuple[str, ...]  # arrays that the partitioner replicated because it had no better way
    kernels: Mapping[str, int]  # Pallas kernels by name, and their runs per call; loops as in `by_axes`
    gathered: tuple[hlo.Collective, ...]  # collectives that give a device more of a weight than it holds
    libtpu: str
    lower_s: float  # wall time of tracing and lowering
    compile_s: float  # wall time until memory was laid out (fast) or code was emitted (full)

    @property
    def fits(self) -> bool:
        return not self.available or self.memory.total <= self.available

    def require_fit(self) -> None:
        """Raises ValueError with needed and available memory when the program does not fit."""
        if not self.fits:
            raise ValueError(
                f"plan: {self.program} needs {self.memory.total / GIB:.1f} GiB of HBM a device on {self.topology}, "
                f"{self.available / GIB:.1f} GiB are there (arguments {self.memory.arguments / GIB:.1f}, temporaries "
                f"{self.memory.temporaries / GIB:.1f}); take more devices, other axes in config.mesh, or smaller "
                "config.pack and config.sampler"
            )

    def by_axes(self) -> dict[str, dict[str, int]]:
        """Returns the collectives by kind and mesh axes: how many, their runs per call, and bytes of their results.

        Runs and bytes are per device; a loop of unknown length is counted once.
        """
        count, runs, sizes = Counter(), Counter(), Counter()
        for one in self.collectives:
            axes = "+".join(one.axes) or f"groups of {one.group_size}"
            key = f"{one.kind} over {axes}"
            count[key] += 1
            runs[key] += one.runs
            sizes[key] += one.runs * one.bytes
        return {key: {"count": count[key], "runs": runs[key], "bytes": sizes[key]} for key in sorted(count)}

    def figures(self) -> dict[str, Any]:
        """Returns everything above as JSON values, sizes in bytes."""
        memory = {name: getattr(self.memory, name) for name in (*self.memory.__dataclass_fields__, "total")}
        return {
            "topology": self.topology,
            "mode": self.mode,
            "libtpu": self.libtpu,
            "mesh": {name: size for name, size in self.mesh.items() if size > 1},
            "hbm_bytes": memory,
            "hbm_available_bytes": self.available,
            "fits": self.fits,
            "collectives": self.by_axes(),
            "involuntary_rematerializations": len(self.rematerialized),
            "weight_gathers": len(self.gathered),
            "kernels": dict(self.kernels),
            "lower_s": round(self.lower_s, 1),
            "compile_s": round(self.compile_s, 1),
        }


def compile_program(
    topology: str,
    builder: str,
    arguments: Mapping[str, Any] | None = None,
    mode: Mode = "fast",
    slices: int = 1,
    deadline_s: float = DEADLINE_S,
    keep: str | os.PathLike | None = None,
    bundles: bool = False,
) -> Plan:
    """Returns the plan of the program that `builder` makes for `slices` slices of `topology`, such as "v5p:4x4x4".

    `builder` is "package.module:function" or "path/to/file.py:function". A separate process calls it as
    function(devices, **arguments), with JSON values, and it returns a `LoweredProgram`. `keep` is a folder for the
    compiler's dump and logs (the module's text among them), which are otherwise removed. With `bundles` (mode full)
    the folder's `bundles` holds the files that `plan.bundles` reads. Raises ValueError where libtpu is absent, the
    topology unknown or the program refused, and TimeoutError after `deadline_s`. A program that does not fit gives a
    plan as well: see `Plan.require_fit`.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("plan: libtpu is not installed; it comes with the extra [plan]: pip install 'r1jax[plan]'")
    with tempfile.TemporaryDirectory(prefix="r1jax-plan-") as scratch:
        folder = pathlib.Path(keep or scratch)
        (folder / "dump").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        ours = [folder / name for name in ("lowered.json", "ended.json")]
        for stale in (*folder.glob("dump/*"), *folder.glob("logs/*"), *ours):
            if not stale.is_dir():
                stale.unlink(missing_ok=True)
        request = {"topology": topology, "slices": slices, "builder": builder, "arguments": dict(arguments or {})}
        (folder / "request.json").write_text(json.dumps(request))
        _run(folder, mode, deadline_s, bundles)
        return _read(folder, f"{slices} x {topology}" if slices > 1 else topology, builder, mode)


def devices(topology: str, slices: int = 1) -> list:
    """Returns the devices of `slices` slices of a topology, without a TPU; this process then computes on the CPU.

    Raises ValueError for a topology that libtpu does not know.
    """
    os.environ.update(_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except Exception as error:  # the plugin's errors have no common class
        reason = re.sub(r"^[A-Z_]+: ", "", _first_line(error))
        raise ValueError(f"topology {topology!r} is not one: {reason}; give one such as v5p:4x4x4") from None


def _run(folder: pathlib.Path, mode: Mode, deadline_s: float, bundles: bool) -> None:
    """Runs the compiler's process until it ends, memory is laid out (fast) or the deadline has passed."""
    environment = {
        **os.environ,
        **_ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(path for path in (os.getcwd(), *sys.path) if path),
        "XLA_FLAGS": f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text",
        "TPU_LOG_DIR": str(folder / "logs"),
    }
    if bundles:
        (folder / "bundles").mkdir(exist_ok=True)
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder / 'bundles'} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-c", "from r1jax.plan.compile import _child; _child()", str(folder)]
    limit = time.monotonic() + deadline_s
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            while process.poll() is None and not (mode == "fast" and _laid_out(folder)):
                if time.monotonic() > limit:
                    raise TimeoutError(
                        f"plan: the compiler did not {'lay out memory' if mode == 'fast' else 'end'} in "
                        f"{deadline_s:g} s"
                    )
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _dumped(folder: pathlib.Path, ending: str) -> pathlib.Path | None:
    """Returns the newest dump, with this ending, of the program's module; other modules dump to the same folder."""
    module = _json(folder / "lowered.json").get("module")
    dumps = sorted((folder / "dump").glob(f"*.{module}.*{ending}")) if module else []
    return dumps[-1] if dumps else None


def _laid_out(folder: pathlib.Path) -> bool:
    """Returns whether the file of the memory layout is complete: it ends in a line break and has stopped growing."""
    path = _dumped(folder, ".after_optimizations-buffer-assignment.txt")
    if path is None or time.time() - path.stat().st_mtime < SETTLED_S:
        return False
    return path.read_bytes().endswith(b"\n")


def _read(folder: pathlib.Path, topology: str, builder: str, mode: Mode) -> Plan:
    """Returns the plan from the files of an ended process. Raises ValueError with its error when there is none."""
    lowered, ended = _json(folder / "lowered.json"), _json(folder / "ended.json")
    assignment = _dumped(folder, ".after_optimizations-buffer-assignment.txt")
    module = _dumped(folder, ".after_optimizations_before_buffer_assignment.txt")
    error = ended.get("error", "")
    if assignment is None or module is None or (error and "Ran out of memory on HBM" not in error):
        if not error:
            lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
            error = f"the compiler's process ended: {lines[-1] if lines else 'without a word'}"
        raise ValueError(f"plan: {error}")
    text = module.read_text()
    collectives = hlo.collectives(text, lowered["mesh"])
    log = folder / "logs" / "tpu_driver.WARNING"
    warnings = log.read_text(errors="replace") if log.exists() else ""
    warnings += (folder / "output.txt").read_text(errors="replace")
    weights = [tuple(map(tuple, pair)) for pair in lowered["weights"].values()]
    generation = re.split(r"[:=_]", topology.rpartition(" ")[2])[0]
    return Plan(
        topology=topology,
        program=builder.rpartition(":")[2],
        mode=mode,
        mesh=lowered["mesh"],
        memory=hlo.Memory(**ended["memory"]) if "memory" in ended else hlo.memory(assignment.read_text()),
        available=int(HBM_GIB.get(generation, 0) * GIB),
        collectives=collectives,
        rematerialized=tuple(dict.fromkeys(_REMATERIALIZED.findall(warnings))),
        kernels=hlo.kernels(text),
        gathered=tuple(hlo.gathered(collectives, weights)),
        libtpu=importlib.metadata.version("libtpu"),
        lower_s=lowered["lower_s"],
        compile_s=ended.get("compile_s", assignment.stat().st_mtime - lowered["at"]),
    )


def _builder(name: str):
    """Returns the function of "module:function" or "file.py:function"."""
    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        return runpy.run_path(place)[function]
    return getattr(importlib.import_module(place), function)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _child() -> None:
    """Lowers and compiles the program of request.json in the folder of argv; writes lowered.json and ended.json."""
    folder = pathlib.Path(sys.argv[1])
    request, ended = _json(folder / "request.json"), {}
    try:
        slice_devices = devices(request["topology"], request["slices"])
    except ValueError as error:
        ended = {"error": str(error)}
    else:
        try:
            ended = _compile(folder, request, slice_devices)
        except Exception as error:
            print(repr(error), file=sys.stderr)
            ended = {"error": f"{request['builder'].rpartition(':')[2]}: {_first_line(error)}"}
    files.write_text(folder / "ended.json", json.dumps(ended))


def _compile(folder: pathlib.Path, request: dict, devices: list) -> dict:
    start = time.monotonic()
    program = _builder(request["builder"])(devices, **request["arguments"])
    module = program.lowered.compiler_ir().operation.attributes["sym_name"].value
    lowered = {
        "module": module,
        "mesh": dict(program.mesh.shape),
        "weights": dict(program.weights),
        "lower_s": time.monotonic() - start,
        "at": time.time(),
    }
    files.write_text(folder / "lowered.json", json.dumps(lowered))
    start = time.monotonic()
    sizes = program.lowered.compile().memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "constants": 0,  # the executable counts them as code
    }
    return {"compile_s": time.monotonic() - start, "memory": memory}
