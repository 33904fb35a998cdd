"""Says before a stage is run on a TPU slice whether it fits, how long it takes and what it costs: `--plan`.

Every program of the stage is compiled by libtpu to its memory layout. Then the memory is added up over time: what is on
a device in each phase of the run, and what the largest program of the phase needs besides. Times are bounds from
datasheet figures (plan.roofline), and what is expected of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from r1jax import config as configs
from r1jax.core import sharding, tree
from r1jax.core import slices as tpu_slices
from r1jax.core.say import say
from r1jax.core.slices import Slice
from r1jax.plan import chips, meshes, stage_time
from r1jax.plan import compile as compiler
from r1jax.plan.compile import GIB, Plan
from r1jax.plan.lengths import LengthLaw
from r1jax.plan.roofline import EFFICIENCY, Placed
from r1jax.plan.stage_time import StageTime
from r1jax.recipe import programs
from r1jax.recipe.programs import Phase, StageProgram
from r1jax.report import table
from r1jax.rewards.models import reward_model
from r1jax.rl import settings
from r1jax.schema import Config, MeshConfig, replace

COMPILERS = 2  # processes that compile at a time
DEADLINE_S = 600.0  # of one program
# Examples of the paper (P2 B.3, B.4), where a config does not say how many there are.
EXAMPLES = {"stage1_coldstart": 5_000, "stage3_rejection_sft": 804_745, "distill": 800_000} | {
    "reward_helpful": 66_000,
    "reward_safety": 106_000,
}
SHORTEST = 256  # tokens of an output below which no length is proposed
TRIED = 2  # meshes of a slice that a search compiles, best first
# Activations of one block in an update, in hidden vectors a token, and those of each expert that it is sent to: fitted
# to compiled updates of DeepSeek-V3 (docs/plan.md). They choose a mesh; a plan's own figures are compiled.
BLOCK_WIDTHS, ROUTED_WIDTHS = 40, 10


@dataclass(frozen=True)
class Where:
    """The TPU that a stage is planned for."""

    whole: Slice
    slices: int
    devices: Sequence

    @property
    def name(self) -> str:
        return f"{self.slices} x {self.whole.topology}" if self.slices > 1 else self.whole.topology

    @property
    def chips(self) -> int:
        return self.slices * self.whole.chips

    @property
    def room(self) -> int:
        """Bytes of HBM on a device that are left to programs."""
        return int(chips.GENERATIONS[self.whole.generation].device_gib * GIB)


@dataclass(frozen=True)
class Assumed:
    """What a plan cannot know: lengths in tokens, and the price of a chip's hour."""

    response_tokens: str = ""  # MEAN:P99
    price: float | None = None

    def law(self, longest: int) -> LengthLaw:
        """Returns the law of lengths up to `longest`; by default a third of it on average, and 99% within it.

        Raises ValueError for a text that is not MEAN:P99.
        """
        if not self.response_tokens:
            return LengthLaw(max(longest / 3, 1), max(longest, 1), longest)
        mean, _, p99 = self.response_tokens.partition(":")
        try:
            return LengthLaw(float(mean), float(p99 or mean), longest)
        except ValueError as error:
            raise ValueError(
                f"--response_tokens={self.response_tokens}: give MEAN:P99, such as 8000:30000 ({error})"
            ) from None


@dataclass(frozen=True)
class Peak:
    """The memory of one phase on a device, in bytes."""

    phase: str
    arrays: Mapping[str, int]  # that are there while its programs run
    program: str  # the one that needs most, "" for a phase without programs
    needed: int  # by that program besides the arrays

    @property
    def total(self) -> int:
        return sum(self.arrays.values()) + self.needed

    def figures(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {"phase": self.phase, "arrays": dict(self.arrays), "program": self.program} | {
            "program_bytes": self.needed,
            "total_bytes": self.total,
        }


def run(
    config: Config,
    spec: str,
    overrides: Sequence[tuple[str, str]],
    topology: str,
    slices: int = 1,
    search: bool = False,
    response_tokens: str = "",
    price: float | None = None,
) -> dict[str, Any]:
    """Prints and returns the plan of a stage, `config` being `spec` with `overrides`; key `fits` says the outcome.

    Where the mesh of the config does not fill the slice, one that does is chosen by an estimate; rows and slots follow
    it. With `search` the smallest slice of the topology's generation that fits is looked for, from `topology` on where
    it names a shape. `response_tokens` is MEAN:P99, `price` that of a chip's hour. Raises ValueError for a stage
    without programs, a bad topology, or where nothing fits.
    """
    assumed = Assumed(response_tokens, price)
    assumed.law(config.sampler.max_new_tokens)
    if search and config.mode == "disaggregated":
        raise ValueError(
            "--plan=search chooses one mesh; plan config.mode=disaggregated with --plan and both meshes set"
        )
    if search:
        return _search(config, spec, overrides, topology, slices, assumed)
    where = _where(tpu_slices.parse(topology), slices)
    if _devices(config) == len(where.devices):
        return _show(_planned(config, spec, overrides, where, assumed))
    if config.mode == "disaggregated":
        raise ValueError(
            f"--plan: config.mesh and config.sampler_mesh use {_devices(config)} devices, {where.name} has "
            f"{len(where.devices)}; set both to use all"
        )
    every = options(config, where)
    if not (fitting := quickest(every, where, assumed)):
        return _show(_refused(config, spec, where, every))
    return _show(_planned(fitting[0], spec, overrides, where, assumed))


def peaks(phases: Sequence[Phase], plans: Mapping[str, Plan]) -> list[Peak]:
    """Returns the memory of each phase, from the plans of its programs by name."""
    return [_peak(phase, plans) for phase in phases]


def compiled(where: Where, spec: str, overrides: Sequence[tuple[str, str]], phases: Sequence[Phase]) -> dict[str, Plan]:
    """Returns the plan of each program by name; programs that are lowered by the same function are compiled once.

    Prints a line a program. Raises ValueError and TimeoutError as `plan.compile.compile_program`.
    """
    every = {name: program for phase in phases for name, program in phase.programs.items()}
    first: dict[Callable, str] = {}
    for name, program in every.items():
        first.setdefault(program.lower, name)

    def one(name: str) -> Plan:
        arguments = {"spec": spec, "overrides": [list(pair) for pair in overrides], "name": name}
        plan = compiler.compile_program(
            where.whole.topology,
            "r1jax.recipe.programs:build",
            arguments,
            slices=where.slices,
            deadline_s=DEADLINE_S,
        )
        say(f"{name}: {plan.memory.total / GIB:.1f} GiB, compiled in {plan.lower_s + plan.compile_s:.0f} s")
        return plan

    with ThreadPoolExecutor(COMPILERS) as pool:
        plans = dict(zip(first.values(), pool.map(one, first.values()), strict=True))
    return {name: plans[first[program.lower]] for name, program in every.items()}


def placed(config: Config, mesh: MeshConfig) -> Config:
    """Returns the config on another mesh, with rows and slots that it divides: as many as before, or a few more."""
    per_device = max(config.pack.rows_per_micro_batch // config.mesh.row_devices, 1)
    pack = replace(config.pack, rows_per_micro_batch=per_device * mesh.row_devices)
    slots = -(-config.sampler.slots // mesh.slot_devices) * mesh.slot_devices
    return replace(config, mesh=mesh, pack=pack, sampler=replace(config.sampler, slots=slots))


@dataclass(frozen=True)
class Option:
    """A config on one mesh of the slices, with what it needs on a device by the estimate."""

    config: Config
    phase: str  # that needs most
    size: int  # bytes


def options(config: Config, where: Where) -> list[Option]:
    """Returns the config on each mesh of the slices that divides its model."""
    every = []
    for mesh in meshes.divisions(config.model, len(where.devices) // where.slices, config.pack.row_tokens):
        one = placed(config, replace(mesh, slice=where.slices))
        size, phase = max((estimate(phase, one), phase.name) for phase in programs.phases(one, where.devices))
        every.append(Option(one, phase, size))
    return every


def quickest(every: Sequence[Option], where: Where, assumed: Assumed) -> list[Config]:
    """Returns the options that fit a device by the estimate, the one with the shortest bound of a round first."""
    fitting = [one.config for one in every if one.size <= where.room]
    return sorted(fitting, key=lambda config: times(config, where, assumed).round_s())


def estimate(phase: Phase, config: Config) -> int:
    """Returns about how many bytes a phase needs on a device, without compiling: its arrays and a rule of thumb.

    For an update that is gradients, a copy of the weights, the inputs of recomputed blocks and the activations of one
    block; for another program its result.
    """
    arrays = sum(phase.resident.values())
    results = [tree.bytes_per_device(one.gives) for one in phase.programs.values() if one.gives is not None]
    if "update" not in phase.programs:
        return arrays + max(results, default=0)
    model, pack = config.model, config.pack
    weights = tree.bytes_per_device(phase.arrays["state"].params)
    tokens = pack.rows_per_micro_batch * pack.row_tokens // config.mesh.slot_devices
    layers = model.num_hidden_layers * (1 if config.compute.remat else 8)
    widths = BLOCK_WIDTHS + ROUTED_WIDTHS * model.num_experts_per_tok * bool(model.n_routed_experts)
    return arrays + 2 * weights + 2 * tokens * model.hidden_size * (layers + widths)


def times(config: Config, where: Where, assumed: Assumed) -> StageTime:
    """Returns the time of a stage, from datasheet figures and the law of lengths."""
    sampler, tokens = config.sampler, config.sampler.max_new_tokens
    on = Placed(config.network, config.mesh, chips.generation(where.whole.topology))
    prompt = _prompt_tokens(config)
    if config.stage in programs.RL:
        apart = dataclasses.replace(on, mesh=config.sampler_mesh) if config.mode == "disaggregated" else None
        return _reinforced(config, on, assumed, prompt, apart)
    if config.stage in programs.SAMPLING:
        return stage_time.sampled(on, sampler, assumed.law(tokens), prompt, 1000, config.evaluation.samples_per_problem)
    law, size, epochs = assumed.law(config.pack.row_tokens), config.sft.examples_per_update, config.sft.epochs
    responses = 1
    if config.stage in programs.REWARD_MODELS:
        on = dataclasses.replace(on, network=reward_model.architecture(config.network))
        size, epochs = config.reward_model.examples_per_update, config.reward_model.epochs
        responses = 2 if config.stage == "reward_helpful" else 1
    updates = -(-EXAMPLES.get(config.stage, size) * epochs // size)
    return stage_time.fine_tuned(on, config.pack, config.optimizer, law, responses * size, updates)


def _reinforced(config: Config, on: Placed, assumed: Assumed, prompt: float, sampler: Placed | None) -> StageTime:
    """Returns the time of an RL stage: of its last part, after those with other lengths of a schedule."""
    parts, phases = [], settings.length_phases(settings.of_config(config))
    ends = [*(start for start, _ in phases[1:]), config.grpo.updates]
    for (start, one), end in zip(phases, ends, strict=True):
        grpo, law = replace(one.grpo, updates=end - start), assumed.law(one.sampler.max_new_tokens)
        parts.append(stage_time.reinforced(on, one.sampler, grpo, one.pack, one.optimizer, law, prompt, sampler))
    return dataclasses.replace(parts[-1], before=tuple(parts[:-1]))


def _prompt_tokens(config: Config) -> int:
    """Returns the tokens of a prompt that are assumed: an eighth of what the sampler takes."""
    return max(config.sampler.max_prompt_tokens // 8, 1)


def _where(whole: Slice, slices: int) -> Where:
    return Where(whole, slices, compiler.devices(whole.topology, slices))


def _devices(config: Config) -> int:
    """Returns how many devices a config's run uses."""
    meshes = [config.mesh, *([config.sampler_mesh] if config.mode == "disaggregated" else [])]
    return sum(math.prod(mesh.shape) for mesh in meshes)


def _changes(config: Config, before: Config) -> list[tuple[str, str]]:
    """Returns the overrides (field, text) that turn the config `before` into `config`."""
    old = configs.flatten(before)
    return [(name, str(value)) for name, value in configs.flatten(config).items() if value != old[name]]


def _peak(phase: Phase, plans: Mapping[str, Plan]) -> Peak:
    resident, worst = phase.resident, None
    for name, program in phase.programs.items():
        arrays = {key: size for key, size in resident.items() if _shares(phase.arrays[key], program)}
        read = sum(tree.bytes_per_device(phase.arrays[x] if isinstance(x, str) else x) for x in program.reads)
        one = Peak(phase.name, arrays, name, max(plans[name].memory.total - read, 0))
        worst = one if worst is None or one.total > worst.total else worst
    return worst or Peak(phase.name, resident, "", 0)


def _shares(array: Any, program: StageProgram) -> bool:
    """Returns whether an array is on devices of the program."""
    return bool(jax.tree.leaves(array)[0].sharding.device_set & set(program.mesh.devices.flat))


def _planned(
    config: Config, spec: str, overrides: Sequence[tuple[str, str]], where: Where, assumed: Assumed
) -> dict[str, Any]:
    """Returns the plan of a config whose mesh fills the slice."""
    phases = programs.phases(config, where.devices)
    if max(sum(phase.resident.values()) for phase in phases) > where.room:
        return _refused(config, spec, where, options(config, where))
    changes = _changes(config, configs.load(spec, overrides))
    plans = compiled(where, spec, [*overrides, *changes], phases)
    every = peaks(phases, plans)
    peak = max(one.total for one in every)
    figures = {
        "config": spec,
        "overrides": {name: text for name, text in (*overrides, *changes)},
        "topology": where.name,
        "chips": where.chips,
        "devices": len(where.devices),
        "mesh": _mesh(config.mesh),
        "libtpu": next(iter(plans.values())).libtpu,
        "available_bytes": where.room,
        "peak_bytes": peak,
        "fits": peak <= where.room,
        "phases": [one.figures() for one in every],
        "programs": {name: plan.figures() for name, plan in plans.items()},
        "time": times(config, where, assumed).figures(EFFICIENCY, assumed.price or 0.0),
    }
    return figures if figures["fits"] else figures | nearest(config, where)


def _mesh(mesh: MeshConfig) -> dict[str, int]:
    return {name: size for name, size in zip(sharding.AXES, mesh.shape, strict=True) if size > 1}


def _refused(config: Config, spec: str, where: Where, every: Sequence[Option]) -> dict[str, Any]:
    """Returns the outcome for a slice on which none of the options fits. Raises ValueError where there is none."""
    if not every:
        raise ValueError(
            f"--plan: no mesh of {len(where.devices)} devices divides the model of {spec}; take another slice"
        )
    best = min(every, key=lambda one: one.size)
    needed = f"phase {best.phase} needs about {best.size / GIB:.0f} GiB a device (an estimate)"
    return {
        "config": spec,
        "topology": where.name,
        "chips": where.chips,
        "devices": len(where.devices),
        "mesh": _mesh(best.config.mesh),
        "available_bytes": where.room,
        "peak_bytes": best.size,
        "fits": False,
        "reason": f"{needed}, {where.room / GIB:.1f} are there",
    } | nearest(config, where)


def nearest(config: Config, where: Where) -> dict[str, Any]:
    """Returns what would fit by the estimate: `nearest_topology`, and `nearest_max_new_tokens` on this slice; or {}."""
    advice: dict[str, Any] = {}
    for whole in tpu_slices.larger(where.whole):
        if _fits(config, other := _where(whole, where.slices)):
            advice["nearest_topology"] = other.name
            break
    if config.stage in programs.RL and _fits(_shorter(config, SHORTEST), where):
        length = config.sampler.max_new_tokens // 2
        while not _fits(_shorter(config, length), where):
            length //= 2
        advice["nearest_max_new_tokens"] = length
    return advice


def _fits(config: Config, where: Where) -> bool:
    return any(one.size <= where.room for one in options(config, where))


def _shorter(config: Config, length: int) -> Config:
    """Returns the config of an RL stage with outputs, and rows, of at most so many tokens."""
    sampler = replace(config.sampler, max_new_tokens=length, max_new_tokens_schedule=())
    pack = replace(config.pack, row_tokens=config.sampler.max_prompt_tokens + length)
    return replace(config, sampler=sampler, pack=pack)


def _search(
    config: Config, spec: str, overrides: Sequence[tuple[str, str]], topology: str, slices: int, assumed: Assumed
) -> dict[str, Any]:
    """Returns and prints the plan of the smallest slice on which the stage fits. Raises ValueError if there is none."""
    generation, _, shape = topology.partition(":")
    first = tpu_slices.parse(f"{generation}:{shape or tpu_slices.smallest(generation)}")
    for whole in (first, *tpu_slices.larger(first)):
        where = _where(whole, slices)
        for one in quickest(options(config, where), where, assumed)[:TRIED]:
            say(f"{where.name}: compiling for mesh {_mesh(one.mesh)}")
            figures = _planned(one, spec, overrides, where, assumed)
            if figures["fits"]:
                return _show(figures)
        say(f"{where.name}: does not fit")
    raise ValueError(f"--plan=search: {spec} fits no slice of {generation}; take shorter rows or optimizer.offload")


def _show(figures: dict[str, Any]) -> dict[str, Any]:
    """Prints a plan and returns it."""
    title = f"{figures['config']} on {figures['topology']}, {figures['chips']} chips, mesh {figures['mesh']}"
    if "phases" not in figures:
        say(f"{title}: does not fit: {figures['reason']}{_advice(figures)}")
        return figures
    rows = [
        {
            "phase": one["phase"],
            **{f"{name} GiB": size / GIB for name, size in one["arrays"].items()},
            "largest program": one["program"],
            "program GiB": one["program_bytes"] / GIB,
            "together GiB": one["total_bytes"] / GIB,
        }
        for one in figures["phases"]
    ]
    arrays = dict.fromkeys(f"{name} GiB" for one in figures["phases"] for name in one["arrays"])
    table.render(rows, ("phase", *arrays, "largest program", "program GiB", "together GiB"), title)
    peak, room = figures["peak_bytes"] / GIB, figures["available_bytes"] / GIB
    print(
        f"peak {peak:.1f} GiB of {room:.1f} a device: {'fits' if figures['fits'] else 'does not fit'}{_advice(figures)}"
    )
    _show_time(figures["time"])
    return figures


def _advice(figures: Mapping[str, Any]) -> str:
    """Returns what would fit, in words."""
    parts = [f"; by the estimate {figures['nearest_topology']} would do"] if "nearest_topology" in figures else []
    if "nearest_max_new_tokens" in figures:
        parts.append(f"; here config.sampler.max_new_tokens={figures['nearest_max_new_tokens']} would")
    return "".join(parts)


def _show_time(figures: Mapping[str, Any]) -> None:
    """Prints the seconds of a round by program, and what the stage takes: bounds, and what is expected."""
    rows = [
        {"program": name, "runs": one["runs"], "limit": one["limit"]}
        | {f"{kind} s": figures[kind]["seconds"][name] for kind in ("bound", "expected")}
        for name, one in figures["programs"].items()
    ]
    table.render(
        rows, ("program", "runs", "limit", "bound s", "expected s"), "seconds of a round, from datasheet figures"
    )
    if len(figures["phases"]) > 1:
        rows = [
            {"outputs": one["max_new_tokens"], "rounds": one["rounds"]}
            | {f"{kind} s": seconds for kind, seconds in one["round_s"].items()}
            for one in figures["phases"]
        ]
        table.render(rows, ("outputs", "rounds", "bound s", "expected s"), "seconds of a round by longest output")
    keys = ("round_s", "update_s", "tokens_per_s", "tokens_per_s_chip", "mfu", "hours", "chip_hours", "cost")
    sums = [{"time": kind, **{key: figures[kind][key] for key in keys}} for kind in ("bound", "expected")]
    table.render(sums, ("time", *keys), f"the stage: {figures['rounds']:.0f} rounds; nothing was measured")
