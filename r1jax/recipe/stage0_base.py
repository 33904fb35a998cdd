"""Stage 0: pretrain a tiny base model on the tiny world's corpus."""

import dataclasses
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts, rng, sharding, tree
from r1jax.data import corpus, tasks
from r1jax.data.hashing import hash64
from r1jax.data.packing import PackItem, pack
from r1jax.data.prompts import keyed_permutation
from r1jax.models import decoder
from r1jax.recipe import common, training
from r1jax.schema import AuxiliaryConfig, Config, MeshConfig, ModelConfig, PackConfig, PretrainConfig, replace
from r1jax.train import sft, step

FOURIER_PERIODS = (2, 3, 5, 7, 9, 10, 20, 50, 100, 200)


def run(config: Config, workdir: Path) -> dict:
    """Pretrains, resuming from the newest checkpoint, and returns the final loss and the seconds spent.

    With config.output the finished base is also written there as one file; the shipped bases are made in this way.
    """
    output, config = config.output, replace(config, output="")
    figures = pretrain(config, workdir)
    if output:
        write_asset(config, workdir, Path(output))
    return figures


def pretrain(config: Config, workdir: Path) -> dict:
    """Returns the figures of the base in `workdir/stage0_base`, which is trained first unless it is finished."""
    folder = common.StageFolder(config, workdir)
    if (figures := folder.finished({})) is not None:
        return figures
    hosts.require_one(f"pretraining {config.stage}")
    config, tokenizer, mesh = common.prepare(config)
    folder.start({})
    trainer = step.Trainer(
        config.network, config.optimizer, mesh, sft.make_loss(config.network), total_updates=config.pretrain.updates
    )
    rows, items = packed_corpus(config.seed, config.pretrain, config.pack.row_tokens, tokenizer)
    started, total = time.monotonic(), config.pretrain.updates
    params, loss = training.fit(
        folder,
        trainer,
        initial_params(config.seed, config.model, config.pretrain, mesh),
        lambda update: batch_at(update, rows, items, config.seed, config.mesh, config.pack, config.pretrain),
        total,
        config.stage,
        log_every=10,
    )
    figures = {"loss": loss, "updates": total, "seconds": round(time.monotonic() - started, 1)}
    return folder.finish(figures, {}, tree.digest(params))


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
    pretrain: PretrainConfig,
):
    """Returns the batch of one update: the next rows of a keyed order that changes every epoch."""
    size, chosen, packed = pretrain.rows_per_update, [], []
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


def initial_params(seed: int, model: ModelConfig, pretrain: PretrainConfig, mesh: Mesh) -> decoder.Params:
    """Returns random weights; with config.pretrain.fourier_numbers number tokens start from sines of the number."""
    params = sharding.initialize(decoder.specs(model), rng.key(seed, "stage0_base", "init"), jnp.float32, mesh)
    if pretrain.fourier_numbers:
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


def base_key(config: Config) -> str:
    """Returns a hash of what a shipped base depends on: shape, corpus, optimiser, packing and auxiliary losses."""
    auxiliary = [config.auxiliary] if config.auxiliary != AuxiliaryConfig() else []
    return common.shape_hash(config.model, config.pretrain, config.optimizer, config.pack, *auxiliary)


def asset_path(preset: str) -> Path:
    return common.ASSETS / f"base_{preset}.safetensors"


def base_params(config: Config, base: Config, mesh: Mesh, workdir: Path) -> decoder.Params:
    """Returns the base model: the shipped one if it fits `base` (the stage0_base config), else a newly trained one."""
    path = asset_path(config.preset)
    if not config.rebuild_base and path.exists() and common.asset_metadata(path).get("key") == base_key(base):
        return common.load_asset(path, config.model, mesh)
    folder = Path(workdir) / f"base_{config.preset}"  # teacher and student have different bases
    pretrain(base, folder)
    return common.load_weights(config.model, mesh, str(folder / base.stage))


def write_asset(config: Config, workdir: Path, path: Path) -> None:
    """Writes the finished base of `workdir` as one safetensors file with the key of its config."""
    config, _, mesh = common.prepare(config)
    params = common.load_weights(config.model, mesh, str(Path(workdir) / config.stage))
    common.save_asset(path, params, {"key": base_key(config), "preset": config.preset})
