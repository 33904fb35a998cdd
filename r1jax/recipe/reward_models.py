"""What both reward model stages do: make examples, train a scalar head on the start's weights, evaluate; and `load`."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer, from_folder
from r1jax.core import checkpoint, hosts, sharding, tree
from r1jax.core.say import say
from r1jax.data import jsonl, preferences, reward_examples
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.evals import preference
from r1jax.models import decoder
from r1jax.recipe import common, lineage, parts, prompts, stage_report, tiny_preferences, training
from r1jax.recipe.parts import TrainingParts
from r1jax.recipe.progress import Progress
from r1jax.report import table
from r1jax.rewards.models import reward_model
from r1jax.rewards.models.reward_model import Kind, RewardModel, TextFormat
from r1jax.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    ModelConfig,
    Network,
    PackConfig,
    RewardModelConfig,
    parts_of,
)
from r1jax.train import epochs, frozen, reward, step
from r1jax.train.reward import Unit

WHOLE = "whole"  # folder of the whole model, if a part of it was frozen in training
NOTHING, TOO_LONG = "with nothing to judge", "longer than pack allows"  # why an example is left out
CENTER_UNITS = 256  # training pairs whose mean score is the center of a helpful model
COLUMNS = (
    "model",
    "examples",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "auc",
    "auc_se",
    "ece",
    "length_correlation",
)


def run(config: Config, workdir: Path) -> dict:
    """Trains, resuming a stopped run, and returns the figures; `held_out` are those on prompts never trained on.

    Raises ValueError, before anything is written, for bad data or an impossible number of frozen blocks.
    """
    kind = lineage.REWARD_MODELS[config.stage].kind
    folder = common.StageFolder(config, workdir)
    folder.check()
    inputs = lineage.inputs(config, workdir, compared=False)
    if (figures := folder.finished(inputs)) is not None:
        show({config.stage: figures["held_out"]})
        return figures
    resolved, tokenizer, mesh = common.prepare(config, lineage.start_folder(config, workdir))
    network = reward_model.architecture(resolved.network)
    text_format = reading_of(kind, resolved.stage, resolved.data, resolved.reward_model, tokenizer)
    path, rows = folder.path / common.EXAMPLES, []
    exists = hosts.decide(path.exists, name=str(path))
    if not exists and not _generates_examples(resolved.data):
        rows = file_rows(resolved.stage, resolved.preset, resolved.data, kind)
    if blocks := config.reward_model.frozen_blocks:
        frozen.shapes(network, blocks)
    started, weights = time.monotonic(), functools.partial(lineage.start_weights, resolved, mesh, workdir)
    if exists:
        rows = jsonl.read(path)
    else:
        if not rows:
            folder.hold()
            rows = tiny_preferences.examples(
                kind,
                parts_of(parts.SamplingParts, resolved),
                resolved.reward_model,
                tokenizer,
                mesh,
                weights(),
                lineage.base(resolved, mesh, workdir),
            )
        rows = chosen_examples(rows, kind, resolved.stage, resolved.data, resolved.reward_model)
    units = [_unit(row, kind, text_format, tokenizer) for row in rows]
    fitting = [unit is not None and reward.fits(unit, config.pack) for unit in units]
    sides = [[i for i in range(len(rows)) if fitting[i] and rows[i]["held_out"] == held] for held in (False, True)]
    if not all(sides):
        raise ValueError(
            f"{config.stage}: {len(sides[0])} examples to train on and {len(sides[1])} held out, "
            f"{fitting.count(False)} of {len(rows)} do not fit {config.pack.rows_per_micro_batch} rows of "
            f"config.pack.row_tokens={config.pack.row_tokens} tokens; give more, or raise it or "
            "config.data.holdout_fraction"
        )
    left_out = {NOTHING: units.count(None), TOO_LONG: fitting.count(False) - units.count(None)}
    if any(left_out.values()):
        listed = ", ".join(f"{count} {why}" for why, count in left_out.items())
        say(f"{config.stage}: of {len(rows)} examples left out: {listed}")
    folder.start(inputs)
    common.write_model(folder.path, resolved.model, resolved.data, tokenizer, text_format.template)
    if not exists:
        hosts.decide(jsonl.write, path, rows, name=str(path))
    train, held_out = ([unit for i in side if (unit := units[i]) is not None] for side in sides)
    start = lambda: reward_model.from_decoder(weights(), network.model)  # noqa: E731
    name, settings = lineage.result_name(config.stage), parts_of(parts.TrainingParts, resolved)
    with stage_report.while_working(folder.path, name, resolved.watch.report_every_s) as work:
        trained, loss = fit(settings, resolved.reward_model, mesh, kind, train, start, folder, work)
        work.updates = None
        scorer = make_scorer(trained, network, mesh, text_format, tokenizer, config.pack)
        figures: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
        figures |= {"examples": len(train), "loss": loss, "left_out": left_out}
        figures["held_out"] = evaluate(scorer, held_out, [rows[i] for i in sides[1]])
        center_indices = keyed_permutation(len(train), hash64(config.stage, config.seed, "center"))[:CENTER_UNITS]
        center = _center(scorer, [train[i] for i in center_indices]) if kind == "helpful" else 0.0
        write_record(folder.path, kind, network, text_format, config.reward_model, center)
        checkpoint.write_json(folder.path / "figures.json", figures)
        digest = tree.digest(trained)
    models = {config.stage: figures["held_out"]}
    stage_report.write_final(
        folder.path, name, {"checkpoints": {}, "reward_models": models, "wall_s": figures["seconds"]}
    )
    show(models)
    return folder.finish(figures, inputs, digest)


def _generates_examples(data: DataConfig) -> bool:
    """Returns whether the stage samples and ranks its examples itself, as in the tiny world."""
    return data.world == "tiny" and not data.path


def file_rows(stage: str, preset: str, data: DataConfig, kind: Kind) -> list[dict]:
    """Returns the rows of config.data.path and prints notes on how they were read."""
    rows, notes = reward_examples.read(require_path(stage, preset, data), kind)
    say(*(f"{data.path}: {note}" for note in notes))
    return rows


def require_path(stage: str, preset: str, data: DataConfig) -> str:
    """Returns config.data.path. Raises ValueError if it is empty."""
    if not data.path:
        raise ValueError(
            f"{stage}: config.data.path is empty, and {stage}:{preset} has no examples of "
            "its own; give some with --config.data.path=FILE.jsonl (rows with prompt and chosen, rejected or a label)"
        )
    return data.path


def reading_of(
    kind: Kind, stage: str, data: DataConfig, settings: RewardModelConfig, tokenizer: Tokenizer
) -> TextFormat:
    """Returns how the model of this run reads its texts."""
    template = prompts.template(stage, data, tokenizer)
    return TextFormat(kind, template, data.instruction, settings.prompt_tokens, settings.response_tokens)


def chosen_examples(
    rows: list[dict], kind: Kind, stage: str, data: DataConfig, settings: RewardModelConfig
) -> list[dict]:
    """Returns the rows that are used, in order, each with `held_out`; pairs of either side are balanced by length."""
    if data.max_rows:
        order = keyed_permutation(len(rows), hash64(stage, "rows"))
        rows = [rows[i] for i in sorted(order[: data.max_rows])]
    sides = reward_examples.split(rows, data.holdout_fraction)
    if kind == "helpful" and settings.balance_lengths:
        sides = tuple(map(preferences.balance_lengths, sides))
    held_out = {row["id"]: held for held, side in zip((False, True), sides, strict=True) for row in side}
    return [row | {"held_out": held_out[row["id"]]} for row in rows if row["id"] in held_out]


def _unit(row: dict, kind: Kind, text_format: TextFormat, tokenizer: Tokenizer) -> Unit | None:
    """Returns the unit that the loss reads for a row, None if a response of it has nothing to judge."""
    names = ("chosen", "rejected") if kind == "helpful" else ("response",)
    read = (text_format.ids(row["prompt"], row[name], tokenizer) for name in names)
    sequences = tuple(ids for ids in read if ids is not None)
    if len(sequences) < len(names):
        return None
    return Unit(sequences, (True, False) if kind == "helpful" else (row["safe"],))


def fit(
    settings: TrainingParts,
    tuning: RewardModelConfig,
    mesh: Mesh,
    kind: Kind,
    units: list[Unit],
    start: Callable[[], decoder.Params],
    folder: common.StageFolder,
    work: stage_report.StageWork | None = None,
) -> tuple[decoder.Params, float]:
    """Returns (weights of the whole model, last loss) after the configured epochs, from the weights of `start`.

    `work` is what the stage's page shows.
    """
    network, pack, stage = reward_model.architecture(settings.network), settings.pack, settings.stage
    lower = None
    if tuning.frozen_blocks:
        lower, upper = frozen.cut(start(), network.model, tuning.frozen_blocks)
        start = lambda: upper  # noqa: E731
        lower_network, network = frozen.shapes(network, tuning.frozen_blocks)
    chosen = epochs.examples_of_updates(len(units), tuning.epochs, tuning.examples_per_update, stage, settings.seed)
    room = max(len(reward.micro_batches([units[i] for i in some], pack)) for some in chosen)
    shards = sharding.row_shards(pack.rows_per_micro_batch, settings.mesh)
    trainer = step.Trainer(network, settings.optimizer, mesh, reward.make_loss(network, kind), len(chosen))
    if lower is not None and folder.newest_checkpoint() != len(chosen):
        units = _with_features(units, lower, lower_network, stage, pack, mesh)

    def batch_at(update: int):
        return reward.make_batch([units[i] for i in chosen[update]], pack, room, shards)

    trained, loss = training.fit(folder, trainer, start, batch_at, len(chosen), stage, read=reward.UNIT, work=work)
    if lower is not None:
        trained = frozen.join(lower, trained)
        with contextlib.closing(checkpoint.CheckpointStore(folder.path / WHOLE, keep=1)) as whole:
            if whole.latest() != len(chosen):
                whole.save(len(chosen), {"params": trained}, {})
    return trained, loss


def _with_features(
    units: list[Unit], lower: decoder.Params, network: Network, stage: str, pack: PackConfig, mesh: Mesh
) -> list[Unit]:
    """Returns the units with the outputs of the frozen blocks."""
    flat = [ids for unit in units for ids in unit.sequences]
    params = tree.cast(lower, jnp.dtype(network.compute.compute_dtype))
    with Progress(f"{stage} features", len(flat)) as progress:
        outputs = iter(frozen.features(params, network, flat, pack, mesh, progress.update))
    return [dataclasses.replace(unit, features=tuple(next(outputs) for _ in unit.sequences)) for unit in units]


def evaluate(scorer: RewardModel, units: list[Unit], rows: Sequence[dict]) -> dict:
    """Returns the figures of held-out units, and those of each source if the rows name several."""
    ends = [0]
    for unit in units:
        ends.append(ends[-1] + len(unit.sequences))
    scores = scorer.scores([ids for unit in units for ids in unit.sequences])

    def figures(indices: list[int]) -> dict:
        prompts_of = [rows[i]["prompt"] or rows[i]["response"] for i in indices]
        lengths = [[len(ids) for ids in units[i].sequences] for i in indices]
        if scorer.text_format.kind == "helpful":
            pair_scores = [scores[ends[i] : ends[i] + 2] for i in indices]
            return preference.of_pairs(*zip(*pair_scores, strict=True), *zip(*lengths, strict=True), prompts_of)
        label_scores = [scores[ends[i]] for i in indices]
        return preference.of_labels(
            label_scores, [units[i].positive[0] for i in indices], [n for (n,) in lengths], prompts_of
        )

    result = figures(list(range(len(units))))
    sources = sorted({row["source"] for row in rows})
    if len(sources) > 1:
        result["sources"] = {
            name: figures([i for i, row in enumerate(rows) if row["source"] == name]) for name in sources
        }
    return result


def _center(scorer: RewardModel, units: list[Unit]) -> float:
    return float(scorer.scores([ids for unit in units for ids in unit.sequences]).mean())


def show(models: Mapping[str, dict]) -> None:
    """Prints the held-out figures of reward models by name (process 0 only)."""
    rows = [
        {"model": name, "examples": figures.get("pairs", figures.get("responses")), **figures}
        for name, figures in models.items()
    ]
    if rows and hosts.is_writer():
        table.render(rows, COLUMNS, "reward models on held-out prompts")


def make_scorer(
    params: decoder.Params,
    network: Network,
    mesh: Mesh,
    text_format: TextFormat,
    tokenizer: Tokenizer,
    size: PackConfig,
    center: float = 0.0,
) -> RewardModel:
    """Returns the reward model with these weights, copied in the compute dtype."""
    specs = decoder.specs(network.model, network.scalar_head)
    copy = tree.copier(network.compute.compute_dtype, sharding.spec_shardings(specs, mesh))
    rows, tokens = size.rows_per_micro_batch, size.row_tokens
    return RewardModel(copy(params), network, mesh, text_format, tokenizer, rows, tokens, center)


def write_record(
    folder: Path, kind: Kind, network: Network, text_format: TextFormat, settings: RewardModelConfig, center: float
) -> None:
    """Writes the settings that `load` reads besides the weights."""
    record: dict[str, Any] = {"kind": kind, "reading": dataclasses.asdict(text_format)}
    record |= {"model": dataclasses.asdict(network.model), "compute": dataclasses.asdict(network.compute)}
    record |= {"weights": WHOLE if settings.frozen_blocks else "checkpoints", "center": center}
    checkpoint.write_json(folder / common.REWARD_MODEL, record)


def load(
    folder: Path, kind: Kind, tokenizer: Tokenizer, mesh: Mesh, size: PackConfig, policy: ModelConfig
) -> RewardModel:
    """Returns the finished reward model of a stage's folder, which uses the tokenizer of the policy.

    Raises ValueError if the folder has none, one of the other kind, or one whose tokens differ from the policy's.
    """
    record = hosts.decide(_record, Path(folder), kind, name=f"the reward model of {folder}")
    model = common.model_of(record["model"])
    compute = common.known_fields(ComputeConfig, record["model"] | record.get("compute", {}))  # once one with the model
    if model.vocab_size != policy.vocab_size:
        raise ValueError(
            f"{folder}: a reward model of {model.vocab_size} tokens cannot read a policy of {policy.vocab_size}; train "
            "it from a checkpoint with the policy's tokenizer"
        )
    if (model_folder := Path(folder) / common.MODEL).is_dir() and (
        token := _first_different_token(model_folder, tokenizer)
    ) is not None:
        raise ValueError(
            f"{folder}: id {token} is another token to this reward model than to the policy; train it from a "
            "checkpoint with the policy's tokenizer"
        )
    target = sharding.abstract(decoder.specs(model, scalar_head=True), jnp.float32, mesh)
    params = checkpoint.load(Path(folder) / record["weights"], "params", target)
    network = Network(model, compute, scalar_head=True)
    return make_scorer(params, network, mesh, TextFormat(**record["reading"]), tokenizer, size, record["center"])


def _first_different_token(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Returns the first id that a folder's tokenizer decodes to another text than `tokenizer` does, or None."""
    folder_tokenizer = from_folder(folder)
    size = max(folder_tokenizer.vocab_size, tokenizer.vocab_size)
    texts = (
        [words.decode([index]) if index < words.vocab_size else None for index in range(size)]
        for words in (folder_tokenizer, tokenizer)
    )
    return next((index for index, (one, other) in enumerate(zip(*texts, strict=True)) if one != other), None)


def _record(folder: Path, kind: Kind) -> dict:
    if not (folder / common.DONE).exists() or not (folder / common.REWARD_MODEL).exists():
        raise ValueError(f"{folder} holds no finished reward model; run --config=reward_{kind} to its end first")
    record = json.loads((folder / common.REWARD_MODEL).read_text())
    if record["kind"] != kind:
        raise ValueError(f"{folder} holds a reward model of kind {record['kind']}, needs {kind}")
    return record
