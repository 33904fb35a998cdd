"""Stage 0: pretrain a tiny base model on the tiny world's corpus."""

import dataclasses
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import rng, sharding, tree
from r1jax.data import corpus, tasks
from r1jax.data.hashing import hash64
from r1jax.data.packing import PackItem, pack
from r1jax.data.prompts import keyed_permutation
from r1jax.models import decoder
from r1jax.recipe import common, parts, stage_report, training
from r1jax.recipe.parts import TrainingParts
from r1jax.schema import (
    AuxiliaryConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PretrainConfig,
    parts_of,
    replace,
)
from r1jax.train import sft, step

FOURIER_PERIODS = (2, 3, 5, 7, 9, 10, 20, 50, 100, 200)


def run(config: Config, workdir: Path) -> dict:
    """Pretrains, resuming from the newest checkpoint, and returns the final loss and the seconds spent.

    With config.output the finished base is also written there as one file; the shipped bases are made in this way.
    """
    output, config = config.output, replace(config, output="")
    folder = common.StageFolder(config, workdir)
    figures = folder.finished({})
    if figures is not None and not output:
        return figures
    config, tokenizer, mesh = common.prepare(config)
    if figures is None:
        figures = pretrain(parts_of(parts.TrainingParts, config), config.pretrain, tokenizer, mesh, folder)
    if output:
        params = common.load_weights(config.model, mesh, str(folder.path))
        key = base_key(config.model, config.pretrain, config.optimizer, config.pack, config.auxiliary)
        common.save_asset(Path(output), params, {"key": key, "preset": config.preset})
    return figures


def pretrain(
    settings: TrainingParts,
    pretraining: PretrainConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    folder: common.StageFolder,
) -> dict:
    """Trains the base in its folder, from the newest checkpoint there, and returns the figures."""
    folder.start({})
    network, seed, pack = settings.network, settings.seed, settings.pack
    trainer = step.Trainer(network, settings.optimizer, mesh, sft.make_loss(network), total_updates=pretraining.updates)
    rows, items = packed_corpus(seed, pretraining, pack.row_tokens, tokenizer)
    started, total = time.monotonic(), pretraining.updates
    with stage_report.while_working(folder.path, settings.stage, folder.config.watch.report_every_s) as work:
        params, loss = training.fit(
            folder,
            trainer,
            lambda: initial_params(seed, network.model, pretraining, mesh),
            lambda update: batch_at(update, rows, items, seed, settings.mesh, pack, pretraining),
            total,
            settings.stage,
            log_every=10,
            work=work,
        )
        digest = tree.digest(params)
    figures = {"loss": loss, "updates": total, "seconds": round(time.monotonic() - started, 1)}
    stage_report.write_final(folder.path, settings.stage, {"checkpoints": {}, "wall_s": figures["seconds"]})
    return folder.finish(figures, {}, digest)


def packed_corpus(
    seed: int, settings: PretrainConfig, row_tokens: int, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[PackItem]]:
    """Returns (rows of item numbers, items): the whole corpus, packed once so that rows do not change."""
    texts = corpus.documents(settings.corpus_documents, seed, settings.drill_fraction)
    items = []
    for text in texts:
        ids = np.asarray([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
        mask = np.ones(len(ids), np.float32)
        mask[0] = 0
        items.append(PackItem(ids, mask))
    return pack([len(item.tokens) for item in items], row_tokens), items


def batch_at(
    update: int,
    rows: list[list[int]],
    items: list[PackItem],
    seed: int,
    mesh: MeshConfig,
    pack: PackConfig,
    pretraining: PretrainConfig,
):
    """Returns the batch of one update: the next rows of a keyed order that changes every epoch."""
    size, chosen, packed = pretraining.rows_per_update, [], []
    for place in range(update * size, (update + 1) * size):
        epoch, index = divmod(place, len(rows))
        row = rows[_order(seed, epoch, len(rows))[index]]
        packed.append(list(range(len(chosen), len(chosen) + len(row))))
        chosen += row
    micro_batches = -(-size // pack.rows_per_micro_batch)
    shards = sharding.row_shards(pack.rows_per_micro_batch, mesh)
    return sft.make_batch([items[i] for i in chosen], pack, micro_batches, packed, shards)


_orders: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    key = (seed, epoch, size)
    if key not in _orders:
        _orders.clear()
        _orders[key] = keyed_permutation(size, hash64("stage0_base", seed, epoch))
    return _orders[key]


def initial_params(seed: int, model: ModelConfig, pretraining: PretrainConfig, mesh: Mesh) -> decoder.Params:
    """Returns random weights; with config.pretrain.fourier_numbers number tokens start from sines of the number."""
    params = sharding.initialize(decoder.specs(model), rng.key(seed, "stage0_base", "init"), jnp.float32, mesh)
    if pretraining.fourier_numbers:
        params = with_fourier_numbers(params, model)
    return params


def with_fourier_numbers(params: decoder.Params, model: ModelConfig) -> decoder.Params:
    """Returns the parameters with number embeddings and output columns that encode the numbers' order and residues."""
    vocabulary = tasks.vocabulary()
    first, count = vocabulary.index("0"), tasks.MAX_NUMBER + 1
    angle = 2 * np.pi * np.arange(count)[:, None] / np.asarray(FOURIER_PERIODS)
    waves = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * model.initializer_range * 2
    table = np.zeros((count, model.hidden_size), np.float32)
    width = min(waves.shape[1], model.hidden_size)
    table[:, :width] = waves[:, :width]
    embedding = params.embedding.at[first : first + count].add(table)
    output = params.unembedding
    if output is not None:
        output = output.at[:, first : first + count].add(table.T)
    return dataclasses.replace(params, embedding=embedding, unembedding=output)


def base_key(
    model: ModelConfig,
    pretraining: PretrainConfig,
    optimizer: OptimizerConfig,
    pack: PackConfig,
    auxiliary: AuxiliaryConfig,
) -> str:
    """Returns a hash of what a shipped base depends on: shape, corpus, optimiser, packing and auxiliary losses."""
    losses = [auxiliary] if auxiliary != AuxiliaryConfig() else []
    return common.shape_hash(model, pretraining, optimizer, pack, *losses)


def asset_path(preset: str) -> Path:
    return common.ASSETS / f"base_{preset}.safetensors"
