"""Builders of the programs that tests compile for a TPU: the GRPO update, insert and the decode step, from shapes alone."""

import jax
import jax.numpy as jnp
import small
from jax.sharding import NamedSharding, PartitionSpec

from r1jax.configs import _presets as presets
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.models.moe import MoE
from r1jax.plan.compile import LoweredProgram
from r1jax.rl import losses
from r1jax.sampler.engine import Engine
from r1jax.schema import GRPOConfig, MeshConfig, Network, OptimizerConfig, replace
from r1jax.train import step

BATCH = {"tokens": "int32", "targets": "int32", "positions": "int32", "segments": "int32", "loss_mask": "float32"}


def _network(preset: str, changes: dict) -> Network:
    return small.changed(Network(presets.SIZES[preset].model, presets.SIZES[preset].compute), **changes)


def _placed(shapes, shardings):
    """Returns shape structs with shardings."""
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings)


def expert_weights(network, mesh, rules) -> dict:
    """Returns (a device's part of one layer, the whole) of each expert weight."""
    specs, found = decoder.specs(network.model), {}
    for stack, ffw in {"sparse": specs.sparse, "mtp": specs.mtp and specs.mtp.block}.items():
        ffw = ffw and ffw.ffw
        for name in ("gate", "up", "down") if isinstance(ffw, MoE) else ():
            spec = getattr(ffw, name)
            part = sharding.sharding(mesh, spec.axes, spec.shape, rules).shard_shape(spec.shape)
            found[f"{stack}/{name}"] = (part[1:], spec.shape[1:])
    return found


def update(
    devices,
    preset: str,
    mesh: dict,
    rows: int,
    row_tokens: int,
    model: dict | None = None,
    rules: dict | None = None,
    optimizer: dict | None = None,
):
    """Returns the GRPO update of one micro-batch of `rows` rows; `rules` change those it is traced under, not where weights lie."""
    mesh, network = sharding.make_mesh(MeshConfig(**mesh), devices), _network(preset, model or {})
    trainer = step.Trainer(
        network, OptimizerConfig(**optimizer or {}), mesh, losses.make_loss(network, GRPOConfig()), 100
    )
    shape = (1, rows, row_tokens)
    place = sharding.sharding(mesh, (None, "batch", "sequence"), shape)
    dtypes = BATCH | dict.fromkeys(losses.fields(GRPOConfig()), "float32")
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
    everywhere = sharding.replicated(mesh)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)  # noqa: E731
    arguments = losses.PolicyLossArguments(*[scalar("float32")] * 4)
    changed = {axis: tuple(names) for axis, names in (rules or {}).items()}
    with sharding.use_mesh(mesh, {**sharding.TRAIN, **changed}):
        lowered = trainer._update.lower(trainer.restore_target(), batch, scalar("int32"), arguments)
    return LoweredProgram(lowered, mesh, expert_weights(network, mesh, sharding.TRAIN))


def decode(devices, preset: str, mesh: dict, model: dict | None = None, **sampler):
    """Returns one dispatch of decode steps over all slots of the full window."""
    mesh, network = sharding.make_mesh(MeshConfig(**mesh), devices), _network(preset, model or {})
    settings = replace(presets.SIZES[preset].sampler, **sampler)
    engine = Engine(network, settings, mesh, stop_ids=(1,))
    with sharding.use_mesh(mesh, engine.rules):
        shapes = sharding.abstract(decoder.specs(network.model), jnp.dtype(network.compute.compute_dtype))
        params = _placed(shapes, engine.param_shardings)
        state = _placed(jax.eval_shape(engine._empty_state), engine._state_shardings())
        lowered = engine._decode.lower(params, state, settings.steps_per_dispatch, engine.rows)
    return LoweredProgram(lowered, mesh, expert_weights(network, mesh, engine.rules))


def insert(devices, preset: str, mesh: dict, bucket: int, model: dict | None = None, **sampler):
    """Returns the program that copies the prefix of a prompt of `bucket` tokens into any number of slots."""
    mesh, network = sharding.make_mesh(MeshConfig(**mesh), devices), _network(preset, model or {})
    engine = Engine(network, replace(presets.SIZES[preset].sampler, **sampler), mesh, stop_ids=(1,))
    slots = engine.sampler.slots
    with sharding.use_mesh(mesh, engine.rules):
        specs = sharding.abstract(decoder.specs(network.model), jnp.dtype(network.compute.compute_dtype))
        prompt = jax.ShapeDtypeStruct((bucket,), "int32"), jax.ShapeDtypeStruct((), "int32")
        prefix = jax.eval_shape(lambda params, *prompt: engine._prefill(params, *prompt, None), specs, *prompt)
        given = prefix, jax.ShapeDtypeStruct((slots,), "int32"), engine.default_slot_params(slots)
        everywhere = sharding.replicated(mesh)
        prefix, numbers, slot_params = _placed(given, jax.tree.map(lambda _: everywhere, given))
        state = _placed(jax.eval_shape(engine._empty_state), engine._state_shardings())
        lowered = engine._insert.lower(prefix, state, numbers, slot_params)
    return LoweredProgram(lowered, mesh)


def product(devices, rows: int, inner: int, columns: int, gather: bool = False):
    """Returns (w + 1, x @ tanh(w)) with w's rows over four devices; with `gather` w is put on every device first."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), devices)
    divided, whole = NamedSharding(mesh, PartitionSpec("fsdp", None)), sharding.replicated(mesh)

    def product_step(w, x):
        return w + 1, x @ jnp.tanh(jax.lax.with_sharding_constraint(w, whole) if gather else w)

    jitted = jax.jit(product_step, donate_argnums=0, out_shardings=(divided, whole))
    w = jax.ShapeDtypeStruct((inner, columns), "float32", sharding=divided)
    x = jax.ShapeDtypeStruct((rows, inner), "float32", sharding=whole)
    return LoweredProgram(jitted.lower(w, x), mesh, {"w": ((inner // 4, columns), (inner, columns))})


def reordered(devices):
    """Returns a change of sharding that XLA's partitioner can only make by replicating the array."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2), devices)
    tiles = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("fsdp", "data", "expert"), None))

    def reorder(x):
        y = jax.lax.with_sharding_constraint(jnp.sin(x), tiles)
        return jax.lax.with_sharding_constraint(jnp.tanh(y), rows)

    x = jax.ShapeDtypeStruct((64, 1024), "float32", sharding=sharding.replicated(mesh))
    return LoweredProgram(jax.jit(reorder).lower(x), mesh)
