"""Measure the loss's memory and time, in tiles and with whole logits: on this machine, and as compiled for a TPU."""

import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from r1jax.bench import measure
from r1jax.core import sharding
from r1jax.core.say import say
from r1jax.models.logprobs import token_logprobs
from r1jax.plan.compile import LoweredProgram, compile_program
from r1jax.report import table
from r1jax.schema import Config, MeshConfig

FORMS = ("whole", "tiled")
IMPLEMENTATIONS = {"tiled": "xla", "auto": "auto", "kernels": "pallas"}  # of config.compute.logprob_implementation
TPU_FORMS = ("whole", *IMPLEMENTATIONS)
REPEATS = 5
SETTLE_S = 1.0  # the runtime frees the memory used to make the inputs a little later
TOPOLOGY = "v5p:1x1x1"
MODULE = "r1jax.bench.loss"


@dataclass(frozen=True)
class LossShape:
    """The sizes of the loss's inputs: hidden states [rows, row_tokens, width] and a matrix [width, vocab]."""

    rows: int
    row_tokens: int
    width: int
    vocab: int
    dtype: str


# DeepSeek-V3's width and vocabulary.
V3 = LossShape(rows=2, row_tokens=4096, width=7168, vocab=129280, dtype="bfloat16")


def run(config: Config, workdir: Path) -> dict:
    """Returns the figures of both forms, and the ratios of tiled to whole.

    `cpu` is for config.pack's tokens at config.model's width and vocabulary in config.compute.compute_dtype: the
    compiled program's temporaries, the peak of resident memory above inputs and runtime, and the median wall and
    processor time of a call. `tpu` is for 8,192 tokens at V3's sizes by the TPU compiler, with two more forms, `auto`
    (the kernel in the forward pass) and `kernels` (in both passes); it is absent without libtpu. Outputs (both
    gradients) do not count as temporaries. Raises ValueError on a system without memory figures of a process, or when
    the measuring process fails.
    """
    measure.require_memory_figures("bench_loss")
    pack, model, dtype = config.pack, config.model, config.compute.compute_dtype
    shape = LossShape(pack.rows_per_micro_batch, pack.row_tokens, model.hidden_size, model.vocab_size, dtype)
    figures = {"cpu": _compared(lambda form: _measured(form, shape), shape)}
    _show(
        "this machine", figures["cpu"], ("temporary_bytes", "output_bytes", "extra_rss_bytes", "call_s", "processor_s")
    )
    if importlib.util.find_spec("libtpu") is None:
        say("bench_loss: no libtpu, so no figures for TPU; pip install 'r1jax[plan]'")
        return figures
    figures["tpu"] = {"topology": TOPOLOGY} | _compared(_planned, V3, TPU_FORMS)
    _show(TOPOLOGY, figures["tpu"], ("temporary_bytes", "output_bytes"))
    return figures


def loss(form: str) -> Callable:
    """Returns the function (hidden, matrix, targets, weights, temperature) -> (loss, entropy) of a form.

    The loss is minus the weighted sum of log-probabilities; the entropy's sum is reported.
    """
    implementation = IMPLEMENTATIONS.get(form)
    score = functools.partial(token_logprobs, implementation=implementation) if implementation else whole_logprobs

    def weighted(hidden, matrix, targets, weights, temperature):
        logp, entropy = score(hidden, matrix, targets, temperature)
        return -jnp.sum(weights * logp), jnp.sum(jax.lax.stop_gradient(entropy))

    return weighted


def whole_logprobs(hidden, matrix, targets, temperature):
    """Returns (log p(target), entropy) from whole logits [B, T, V], with JAX's own gradient: the baseline for tiles."""
    logits = jnp.einsum("BTD,DV->BTV", hidden, matrix, preferred_element_type=jnp.float32) / temperature
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    probs_logits = jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1)
    return picked - norm, norm - probs_logits


def lowered(form: str, shape: LossShape, place=None) -> jax.stages.Lowered:
    """Returns loss and gradients of hidden states and matrix, lowered from shapes."""
    dtype, rows = jnp.dtype(shape.dtype), (shape.rows, shape.row_tokens)
    array = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss(form), (0, 1), has_aux=True)).lower(
        array((*rows, shape.width), dtype),
        array((shape.width, shape.vocab), dtype),
        array(rows, jnp.int32),
        array(rows, jnp.float32),
        array((), jnp.float32),
    )


def program(devices: list, form: str, **shape) -> LoweredProgram:
    """Returns the lowered program for one device of a TPU topology."""
    mesh = sharding.make_mesh(MeshConfig(), devices)
    with sharding.use_mesh(mesh), jax.default_device(devices[0]):
        return LoweredProgram(lowered(form, LossShape(**shape), sharding.replicated(mesh)), mesh)


def call_figures(form: str, shape: LossShape) -> dict[str, float]:
    """Returns memory and time of the form in this process."""
    compiled = lowered(form, shape).compile()
    sizes = compiled.memory_analysis()
    assert sizes is not None
    before = measure.resident()
    arguments = _arguments(shape)
    before += sum(array.nbytes for array in arguments)
    time.sleep(SETTLE_S)
    measure.restart_peak()
    calls, processor = [], []
    for _ in range(REPEATS):
        start, used = time.perf_counter(), time.process_time()
        (value, _), _ = jax.block_until_ready(compiled(*arguments))
        calls.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "temporary_bytes": sizes.temp_size_in_bytes,
        "output_bytes": sizes.output_size_in_bytes,
        "extra_rss_bytes": measure.peak() - before,
        "call_s": statistics.median(calls),
        "processor_s": statistics.median(processor),
        "loss": float(value),
    }


def _arguments(shape: LossShape) -> tuple[jax.Array, ...]:
    rows = (shape.rows, shape.row_tokens)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (*rows, shape.width), shape.dtype)
    matrix = jax.random.normal(keys[1], (shape.width, shape.vocab), shape.dtype) * shape.width**-0.5
    targets = jax.random.randint(keys[2], rows, 0, shape.vocab)
    weights = jnp.full(rows, 1 / (shape.rows * shape.row_tokens), jnp.float32)
    return jax.block_until_ready((hidden, matrix.astype(shape.dtype), targets, weights, jnp.float32(1.0)))


def _measured(form: str, shape: LossShape) -> dict[str, float]:
    return measure.in_own_process(MODULE, form, json.dumps(vars(shape)), what="the measurement")


def _planned(form: str) -> dict[str, float]:
    memory = compile_program(TOPOLOGY, f"{MODULE}:program", {"form": form, **vars(V3)}).memory
    return {"temporary_bytes": memory.temporaries, "output_bytes": memory.outputs}


def _compared(figures_of: Callable[[str], dict[str, float]], shape: LossShape, forms: tuple[str, ...] = FORMS) -> dict:
    by_form = {form: figures_of(form) for form in forms}
    whole, tiled = (by_form[form] for form in FORMS)
    ratio = {name: tiled[name] / whole[name] for name in whole if name != "loss"}
    return {"shape": vars(shape), **by_form, "tiled_over_whole": ratio}


def _show(where: str, figures: dict, names: tuple[str, ...]) -> None:
    shape = LossShape(**figures["shape"])
    forms = [form for form in (*TPU_FORMS, "tiled_over_whole") if form in figures]
    rows = [{"": form} | figures[form] for form in forms]
    title = f"{where}: {shape.rows * shape.row_tokens} tokens of {shape.width}, {shape.vocab} words, {shape.dtype}"
    table.render(rows, ("", *names), title)


if __name__ == "__main__":
    print(json.dumps(call_figures(sys.argv[1], LossShape(**json.loads(sys.argv[2])))))
