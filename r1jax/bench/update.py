"""Measure the policy's update, GRPO and SFT: packed, with shared prompts, padded, and in other libraries."""

import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.bench import measure
from r1jax.checkpoints import hf, hf_config
from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import rng, sharding
from r1jax.core.metrics import read_timing
from r1jax.core.say import say
from r1jax.data.packing import PackItem, pack, pack_batch, share_prompts, unpack
from r1jax.data.problems import Problem
from r1jax.models import decoder
from r1jax.recipe import common, compute, policy
from r1jax.report import table
from r1jax.report.phases import seconds_by_phase
from r1jax.rl import losses
from r1jax.rl.logprobs import Scorer
from r1jax.rl.rollout import EncodedPrompt
from r1jax.rl.settings import RunSettings, of_config
from r1jax.schema import (
    BenchConfig,
    Config,
    GRPOConfig,
    MeshConfig,
    ModelConfig,
    Network,
    OptimizerConfig,
    PackConfig,
    parts_of,
    replace,
)
from r1jax.train import sft, step

MODULE = "r1jax.bench.update"
PEERS = Path(__file__).parent / "peers"
PEAK_SIDE, PEAK_CALLS = 2048, 8  # of the matrix product that measures the machine's peak
NOISE = 0.05  # nats between the policy's log-probs and those of sampler and reference
P99_NORMAL = 2.3263478740408408  # 99th percentile of the standard normal distribution


@dataclass(frozen=True)
class System:
    """One measured system: a library, its loss, the form of its batches, and how it is started."""

    name: str
    loss: str
    form: str
    python: str = ""  # a peer's interpreter; "" is r1jax
    script: str = ""
    micro_batch: int = 0

    @property
    def key(self) -> str:
        return f"{self.name}.{self.loss}.{self.form}"


@dataclass(frozen=True)
class UpdateParts:
    """What one measured update depends on; `stage` and `seed` key the samples and the random weights."""

    stage: str
    seed: int
    network: Network
    grpo: GRPOConfig
    pack: PackConfig
    optimizer: OptimizerConfig
    bench: BenchConfig


def run(config: Config, workdir: Path) -> dict:
    """Returns `systems.<name>.<loss>.<form>`: tokens_per_s, memory and other figures of one update of each system.

    A useful token is a trained response token. Every run is a separate process, limited to config.bench.threads
    processors; the systems run in turn, config.bench.repeats times, and figures are medians. `ratios.<packed|shared>`
    are each system's time over ours, medians over the turns. Without a checkpoint the weights are random and there are
    no peers. Raises ValueError on a system without memory figures of a process, for an interpreter that does not
    exist, or when a measurement fails.
    """
    measure.require_memory_figures("bench_update")
    systems = systems_of(config.model, config.bench)
    settings = parts_of(UpdateParts, config)
    folder = Path(workdir) / config.stage
    folder.mkdir(parents=True, exist_ok=True)
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[: config.bench.threads])
    try:
        (folder / "config.pickle").write_bytes(pickle.dumps(config))
        np.savez(folder / "samples.npz", **draw(settings))
        scoring = _in_own_process(folder, "prepare", what="scoring the samples")
        runs_of_system: dict[str, list[dict]] = {system.key: [] for system in systems}
        for turn in range(config.bench.repeats):
            for system in systems:
                figures = _run(system, config.model, config.bench, folder)
                runs_of_system[system.key].append(figures)
                say(f"turn {turn + 1}: {system.key} {figures['seconds']:.1f} s")
        split = _in_own_process(folder, "split", what="the GRPO steps") if config.bench.split_updates else {}
    finally:
        os.sched_setaffinity(0, allowed)
    return report(settings, systems, runs_of_system, scoring) | ({"split": split} if split else {})


def systems_of(model: ModelConfig, bench: BenchConfig) -> list[System]:
    """Returns the systems to measure, in the order of a turn; ValueError for an interpreter that does not exist."""
    systems = []
    for loss in bench.losses:
        if loss not in ("grpo", "sft"):
            raise ValueError(f"bench_update: config.bench.losses has '{loss}', which is neither grpo nor sft")
        forms = ("packed", "shared", "padded") if loss == "grpo" else ("packed", "padded")
        systems += [System("r1jax", loss, form) for form in forms]
    peers = [
        System("trl", "grpo", "padded", bench.trl_python, "trl_update.py", bench.peer_micro_batch),
        System("transformers", "sft", "padded", bench.trl_python, "transformers_update.py", bench.peer_micro_batch),
        System("tunix", "grpo", "padded", bench.tunix_python, "tunix_update.py", bench.tunix_micro_batch),
    ]
    for peer in peers:
        if peer.loss not in bench.losses:
            continue
        field = "tunix_python" if peer.name == "tunix" else "trl_python"
        if not peer.python or not model.checkpoint:
            why = f"config.bench.{field} is empty" if not peer.python else "config.model.checkpoint is empty"
            say(f"bench_update: {why}, so {peer.key} is left out")
            continue
        if shutil.which(peer.python) is None:
            raise ValueError(
                f"bench_update: config.bench.{field}={peer.python} is no interpreter; give VENV/bin/python"
            )
        if bench.samples % peer.micro_batch:
            raise ValueError(
                f"bench_update: config.bench.samples={bench.samples} does not split into {peer.name}'s micro-batches "
                f"of {peer.micro_batch}"
            )
        systems.append(peer)
    return systems


def draw(settings: UpdateParts) -> dict[str, Any]:
    """Returns prompts [N, P], responses [N, longest], lengths [N], advantages [N]; they depend on seed and stage."""
    bench, grpo, key = settings.bench, settings.grpo, [settings.seed, zlib.crc32(settings.stage.encode())]
    sigma = math.log(bench.p99_tokens / bench.median_tokens) / P99_NORMAL
    normals = np.random.default_rng(key).standard_normal(bench.samples)
    lengths = np.clip(np.rint(bench.median_tokens * np.exp(sigma * normals)), 1, bench.longest_tokens).astype(np.int64)
    generator, size, group = np.random.default_rng([*key, 1]), settings.network.model.vocab_size, grpo.group_size
    prompts = generator.integers(3, size, (-(-bench.samples // group), bench.prompt_tokens))
    responses = generator.integers(3, size, (bench.samples, lengths.max()))
    responses *= np.arange(lengths.max()) < lengths[:, None]
    return {
        "prompt_ids": np.repeat(prompts, group, axis=0)[: bench.samples].astype(np.int32),
        "response_ids": responses.astype(np.int32),
        "lengths": lengths,
        "advantages": generator.standard_normal(bench.samples).astype(np.float32),
        "group_size": np.int64(group),
        "kl_coef": np.float64(grpo.kl_coef),
        "clip_ratio": np.float64(grpo.clip_ratio),
        "learning_rate": np.float64(settings.optimizer.learning_rate),
        "clip_norm": np.float64(settings.optimizer.clip_norm),
    }


def items_of(samples: dict[str, np.ndarray], grpo: GRPOConfig, bench: BenchConfig, loss: str) -> list[PackItem]:
    """Returns the samples for packing, with the per-token values of the loss; missing log-probs are 0."""
    lengths = samples["lengths"]
    weights = losses.token_weights(lengths, grpo, bench.longest_tokens)
    zeros = np.zeros(samples["response_ids"].shape, np.float32)
    items = []
    for index, length in enumerate(lengths):
        item = sft.example(samples["prompt_ids"][index], samples["response_ids"][index, :length])
        values = {
            "advantage": item.loss_mask * samples["advantages"][index],
            "weight": item.loss_mask * weights[index],
        }
        for name in ("behaviour_logp", "reference_logp"):
            values[name] = np.zeros_like(item.loss_mask)
            values[name][-length:] = samples.get(f"{name}s", zeros)[index, :length]
        items.append(replace(item, values=values if loss == "grpo" else {}))
    return items


def arrays_of(
    items: list[PackItem], size: PackConfig, prompt_tokens: int, form: str
) -> tuple[dict[str, np.ndarray], int, PackConfig]:
    """Returns (arrays [M, R, T], filled micro-batches, their shape), in one of three forms.

    packed: rows filled by `pack`; shared: the samples of a prompt in a row share it; padded: one sample a row, rows as
    long as the longest sample, and as many in a micro-batch as have about the tokens of a packed one.
    """
    lengths = [len(item.tokens) for item in items]
    if form == "shared":
        items, rows = share_prompts(items, [prompt_tokens] * len(items), size.row_tokens)
    elif form == "packed":
        rows = pack(lengths, size.row_tokens)
    else:
        longest = max(lengths)
        at_once = max(size.row_tokens * size.rows_per_micro_batch // longest, 1)
        size = replace(size, row_tokens=longest, rows_per_micro_batch=at_once)
        rows = [[index] for index in np.argsort([-length for length in lengths], kind="stable").tolist()]
    micro_batches = -(-len(rows) // size.rows_per_micro_batch)
    batch = pack_batch(items, size.row_tokens, micro_batches * size.rows_per_micro_batch, rows)
    arrays = step.batch_arrays(batch, size, micro_batches, tuple(batch.values))
    return arrays, step.filled_micro_batches(batch, size), size


def start_weights(stage: str, seed: int, network: Network) -> tuple[Network, Mesh, decoder.Params]:
    """Returns (network with the checkpoint's shape, mesh, float32 weights); random weights without a checkpoint."""
    mesh, folder = sharding.make_mesh(MeshConfig()), network.model.checkpoint
    if not folder:
        key = rng.key(seed, stage, "init")
        return network, mesh, sharding.initialize(decoder.specs(network.model), key, jnp.float32, mesh)
    network = replace(network, model=replace(hf_config.model_config(Path(folder)), checkpoint=folder))
    return network, mesh, hf.load(Path(folder), network.model, mesh, jnp.float32)


def update_figures(settings: UpdateParts, samples: dict[str, np.ndarray], loss: str, form: str) -> dict[str, float]:
    """Returns the time of one update in this process, its loss and gradient norm, and the process's peak memory."""
    network, mesh, params = start_weights(settings.stage, settings.seed, settings.network)
    arrays, num_filled, size = arrays_of(
        items_of(samples, settings.grpo, settings.bench, loss), settings.pack, settings.bench.prompt_tokens, form
    )
    chunk = size.trained_chunk
    if loss == "grpo":
        function = losses.make_loss(network, settings.grpo, trained_chunk=chunk)
        arguments = losses.arguments(settings.grpo, settings.grpo.kl_coef, 1.0)
    else:
        function, arguments = sft.make_loss(network, chunk), np.float32(1 / samples["lengths"].sum())
    trainer = step.Trainer(network, settings.optimizer, mesh, function, total_updates=2)
    state = trainer.init(params)
    del params
    blank = {name: np.zeros_like(array) for name, array in arrays.items()}
    state, _ = jax.block_until_ready(trainer.update(state, blank, 1, arguments))  # without a gradient, so no change
    start, used = time.perf_counter(), time.process_time()
    state, stats = jax.block_until_ready(trainer.update(state, arrays, num_filled, arguments))
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    return {
        "seconds": seconds,
        "processor_s": processor,
        "loss": float(stats["loss"]),
        "grad_norm": float(stats["grad_norm"]),
        "rows": num_filled * size.rows_per_micro_batch,
        "row_tokens": size.row_tokens,
        "peak_rss_bytes": measure.peak(),
    }


def prepare_figures(settings: UpdateParts, path: Path) -> dict[str, float]:
    """Adds log-probs of sampler and reference to the samples; returns the time of scoring and the machine's peak.

    Both are the policy's log-probs with keyed noise, so that ratios and the KL term are not trivial.
    """
    samples = dict(np.load(path))
    network, mesh, params = start_weights(settings.stage, settings.seed, settings.network)
    items = items_of(samples, settings.grpo, settings.bench, "grpo")
    arrays, num_filled, size = arrays_of(items, settings.pack, settings.bench.prompt_tokens, "packed")
    scorer = Scorer(network, mesh)
    scorer(params, arrays, 1, 1.0)
    start = time.perf_counter()
    logps = scorer(params, arrays, num_filled, 1.0)
    seconds = time.perf_counter() - start
    rows = num_filled * size.rows_per_micro_batch
    packed = pack_batch(items, size.row_tokens, rows)
    generator = np.random.default_rng([settings.seed, 2])
    policy = np.zeros(samples["response_ids"].shape, np.float32)
    for index, values in enumerate(unpack(logps.reshape(-1, size.row_tokens)[:rows], packed)):
        policy[index, : samples["lengths"][index]] = values[-samples["lengths"][index] :]
    for name in ("behaviour_logps", "reference_logps"):
        samples[name] = policy + (NOISE * generator.standard_normal(policy.shape)).astype(np.float32)
    np.savez(path, **samples)
    return {"reference_s": seconds, "peak_flops_per_s": matmul_peak()}


def matmul_peak() -> float:
    """Returns the floating-point operations per second of the fastest float32 matrix product, by NumPy or by XLA."""
    a = np.random.default_rng(0).standard_normal((PEAK_SIDE, PEAK_SIDE), np.float32)
    on_device, product = jnp.asarray(a), jax.jit(lambda a: a @ a)
    best = math.inf
    for call in (lambda: a @ a, lambda: product(on_device).block_until_ready()):
        call()
        for _ in range(PEAK_CALLS):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return 2 * PEAK_SIDE**3 / best


def useful_flops(network: Network, totals: np.ndarray, trained: int) -> float:
    """Returns the operations of an update, forward and backward, without padding and without recomputation.

    6 per weight and token, for the unembedding of the trained tokens alone, and causal attention within each sample;
    `totals` are the samples' tokens, prompts included.
    """
    model = network.model
    tables = 1 if model.tie_word_embeddings else 2
    inside = compute.active_parameters(network) - tables * model.vocab_size * model.hidden_size
    width = model.num_attention_heads * model.head_dim
    attention = 6.0 * model.num_hidden_layers * width * float(np.square(totals, dtype=np.float64).sum())
    return 6.0 * (inside * float(totals.sum()) + model.vocab_size * model.hidden_size * trained) + attention


def split_figures(settings: RunSettings, tokenizer: Tokenizer, updates: int, folder: Path) -> dict[str, float]:
    """Returns the shares of a GRPO step's time in a run of `updates` without its first step; idle is outside all
    phases."""
    settings = replace(
        settings,
        grpo=replace(settings.grpo, updates=updates),
        checkpointing=replace(settings.checkpointing, every_updates=updates + 1),
    )
    grpo = settings.grpo
    _, mesh, params = start_weights(settings.stage, settings.seed, settings.network)
    encoded = []
    for number in range(10 * grpo.prompts_per_update):
        text = f"Question: what is {3 * number + 7} plus {5 * number + 2}?\nAnswer:"
        ids = np.asarray(tokenizer.encode(text), np.int32)[: settings.sampler.max_prompt_tokens]
        encoded.append(EncodedPrompt(Problem(f"sum/{number}", "math", text, str(8 * number + 9)), ids))
    ends, lengths = [], []

    def on_update(update, row, timing) -> None:
        ends.append(time.perf_counter())
        lengths.append(row["length"])

    shutil.rmtree(folder, ignore_errors=True)
    policy.make_training(settings, tokenizer, mesh, encoded, params, folder, on_update=on_update).train()
    rows, wall = read_timing(folder)[1:], ends[-1] - ends[0]
    sums = seconds_by_phase(rows)
    shutil.rmtree(folder, ignore_errors=True)
    shares = {name: seconds / wall for name, seconds in sums.items()}
    return shares | {
        "idle": 1 - sum(shares.values()),
        "step_s": wall / max(len(rows), 1),
        "samples": grpo.prompts_per_update * grpo.group_size,
        "mean_response_tokens": statistics.mean(lengths[1:] or [0.0]),
    }


def report(
    settings: UpdateParts, systems: list[System], runs_of_system: dict[str, list[dict]], scoring: dict[str, float]
) -> dict:
    """Returns the figures by system, with ratios over the turns, and prints a table."""
    network, bench = settings.network, settings.bench
    if folder := network.model.checkpoint:
        network = replace(network, model=hf_config.model_config(Path(folder)))
    lengths = draw(settings)["lengths"]
    trained, flops = int(lengths.sum()), useful_flops(network, lengths + bench.prompt_tokens, int(lengths.sum()))
    out: dict = {"systems": {}, "ratios": {}}
    for system in systems:
        runs = runs_of_system[system.key]
        figures = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        seconds = figures.pop("seconds")
        figures |= {"tokens_per_s": trained / seconds, "seconds": [run["seconds"] for run in runs]}
        figures["utilisation"] = flops / seconds / scoring["peak_flops_per_s"]
        figures["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in runs)
        out["systems"].setdefault(system.name, {}).setdefault(system.loss, {})[system.form] = figures
        for form in ("packed", "shared"):
            ours = runs_of_system.get(f"r1jax.{system.loss}.{form}", runs)
            if ours is not runs:
                pairs = [
                    their_run["seconds"] / our_run["seconds"] for their_run, our_run in zip(runs, ours, strict=True)
                ]
                out["ratios"].setdefault(form, {})[system.key] = statistics.median(pairs)
    out["samples"] = {
        "samples": len(lengths),
        "prompt_tokens": len(lengths) * bench.prompt_tokens,
        "trained_tokens": trained,
        "longest": int(lengths.max()),
    }
    out |= {"useful_flops": flops, "peak_flops_per_s": scoring["peak_flops_per_s"], "threads": bench.threads}
    out["reference"] = {"seconds": scoring["reference_s"], "tokens_per_s": trained / scoring["reference_s"]}
    columns = ("tokens_per_s", "utilisation", "peak_rss_bytes", "processor_s", "loss", "grad_norm")
    rows = [{"system": system.key} | out["systems"][system.name][system.loss][system.form] for system in systems]
    table.render(
        [row | {f"over {form}": of.get(row["system"]) for form, of in out["ratios"].items()} for row in rows],
        ("system", *columns, *(f"over {form}" for form in out["ratios"])),
        f"{trained} trained tokens of {len(lengths)} samples, medians of {bench.repeats}",
    )
    return out


def _in_own_process(folder: Path, *arguments: str, what: str) -> dict:
    return measure.in_own_process(MODULE, str(folder), *arguments, what=what)


def _run(system: System, model: ModelConfig, bench: BenchConfig, folder: Path) -> dict[str, float]:
    """Returns the figures of one run of a system."""
    if not system.python:
        return _in_own_process(folder, "update", system.loss, system.form, what=system.key)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": str(bench.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [system.python, str(PEERS / system.script), str(folder / "samples.npz"), model.checkpoint]
    command += [str(system.micro_batch), str(bench.threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"bench_update: {system.key}: {(done.stderr.strip() or 'was killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, action: str, *arguments: str) -> None:
    """Prints the figures of one measurement in this process."""
    common.runtime.setup()
    place = Path(folder)
    config: Config = pickle.loads((place / "config.pickle").read_bytes())
    samples = place / "samples.npz"
    if action == "prepare":
        figures = prepare_figures(parts_of(UpdateParts, config), samples)
    elif action == "split":
        resolved, tokenizer, _ = common.prepare(config)
        figures = split_figures(of_config(resolved), tokenizer, config.bench.split_updates, place / "steps")
    else:
        figures = update_figures(parts_of(UpdateParts, config), dict(np.load(samples)), *arguments)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
