"""What stages share: their folder and its state, the tokenizer and the starting weights."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from safetensors import safe_open

from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.checkpoints.tensor_file import TensorWriter
from r1jax.config import flatten
from r1jax.core import checkpoint, files, hosts, lock, remote, runtime, sharding
from r1jax.core.say import say
from r1jax.models import decoder
from r1jax.recipe import identity
from r1jax.rl.journal import Journal
from r1jax.schema import ComputeConfig, Config, DataConfig, ModelConfig, RopeScaling, replace
from r1jax.train import evaluations

ASSETS = Path(__file__).resolve().parents[1] / "assets"
DONE = "DONE"
INPUTS = "inputs.json"
CHANGES = "config_changes.jsonl"
DIGEST_THREADS = 8
SLOW_DIGEST_BYTES = 8 << 30  # size of a checkpoint above which the run prints that its digest takes a while
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
EXAMPLES, CHECKPOINTS = "examples.jsonl", "checkpoints"
REWARD_MODEL = "reward_model.json"  # the settings that a reward model is used with
# In a stage's folder: the folder with shape and tokenizer, and two of its files.
MODEL, SHAPE, GENERATION = "model", "shape.json", "generation_config.json"


class StageFolder:
    """`workdir/STAGE/`: config.json, checkpoints, metrics and, when finished, a DONE marker with the figures."""

    def __init__(self, config: Config, workdir: Path, name: str | None = None):
        self.path = Path(workdir) / (name or config.stage)
        self.config = config

    @property
    def hash(self) -> str:
        """The digest of the identity of a run of this config."""
        return identity.digest(self._fields(), json_fields(Config()))

    def state(self, inputs: dict[str, str]) -> str:
        """Returns missing, stopped, done, or stale (finished with another config or from other inputs).

        A finished run that the config makes longer is stopped.
        """
        marker = self.path / DONE
        if not marker.exists():
            return "stopped" if self._holds_work() else "missing"
        if json.loads(marker.read_text())["inputs"] != _recorded(inputs) or self._refusal():
            return "stale"
        return "stopped" if self._lengthened() else "done"

    def finished(self, inputs: dict[str, str]) -> dict | None:
        """Returns the figures if the stage is finished with this config and these inputs, else None.

        Raises ValueError, naming the changed input, when the folder's content, finished or not, was made from others.
        """
        return hosts.decide(self._finished, inputs, name=f"what is in {self.path}")

    def _finished(self, inputs: dict[str, str]) -> dict | None:
        marker = self.path / (DONE if (self.path / DONE).exists() else INPUTS)
        if not marker.exists() or not self._holds_work():
            return None
        record, inputs = json.loads(marker.read_text()), _recorded(inputs)
        changed = [name for name in {**inputs, **record["inputs"]} if inputs.get(name) != record["inputs"].get(name)]
        if changed:
            raise ValueError(
                f"{self.path} is stale: its input {changed[0]} has changed since; remove that folder, or run the graph "
                f"again with --config.from={self.config.stage}"
            )
        return record["figures"] if marker.name == DONE and not (self._refusal() or self._lengthened()) else None

    def check(self) -> None:
        """Raises ValueError when this folder holds a run with another config, whose fields `identity` compares."""
        hosts.decide(self._check, name=f"what is in {self.path}")

    def _check(self) -> None:
        if self._holds_work() and (refusal := self._refusal()):
            raise ValueError(
                f"{self.path} holds a run with another config ({refusal}); give the value there, choose another "
                "--workdir or remove that folder"
            )

    def _changed(self) -> list[identity.Difference]:
        """Returns the fields of the run in this folder that have other values now; [] without a run."""
        path = self.path / "config.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        return identity.differences(before, self._fields(), json_fields(Config())) if before else []

    def _refusal(self) -> str:
        return identity.refusal(self._changed(), self._fields(), self._reached())

    def _lengthened(self) -> list[identity.Difference]:
        return list(filter(identity.lengthens, self._changed()))

    def _reached(self) -> identity.Reached:
        """Returns how far the run in this folder has come, by its files alone."""
        numbers = checkpoint.numbers(self.path / CHECKPOINTS)
        path = self.path / "figures.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        return identity.Reached(max(numbers, default=0), figures.get("examples"))

    def _note_changes(self) -> None:
        """Appends the changed fields of a run that goes on to CHANGES; a longer one is no longer finished."""
        changed = self._changed() if self._holds_work() else []
        if not changed:
            return
        rows = [{"update": self._reached().update, **dataclasses.asdict(difference)} for difference in changed]
        noted = self.changes()
        if noted[-len(rows) :] != rows:  # else a run was stopped before it wrote config.json
            files.write_text(self.path / CHANGES, "".join(f"{json.dumps(row)}\n" for row in [*noted, *rows]))
        for length in self._lengthened():
            if length.name == "grpo.updates":  # a short last rollout that was not trained on is drawn anew, whole
                Journal(self.path / "journal").drop(identity.last_rollout(length.before, self._fields()))
            (self.path / DONE).unlink(missing_ok=True)

    def changes(self) -> list[dict]:
        """Returns what changed when the run went on: {update, name, before, after} of each field, in order."""
        return files.read_jsonl(self.path / CHANGES)

    def hold(self) -> None:
        """Keeps other runs out of this folder until `finish` or the end of the process; process 0 does it for all.

        To be called before anything is written. Raises ValueError, naming the process, if another run is at work there.
        """
        hold(self.path)

    def start(self, inputs: dict[str, str]) -> None:
        """Makes the folder and writes config.json, with the newest values, and the digests of the inputs.

        Raises ValueError as in `hold` and `check`, and when one of several processes does not see the files of process 0.
        """
        self.hold()
        self.check()
        if hosts.is_writer():
            files.remove_unfinished(self.path)
            self._note_changes()
        checkpoint.write_json(self.path / "config.json", self._fields())
        checkpoint.write_json(self.path / INPUTS, {"inputs": inputs})
        hosts.barrier(f"{self.path}/{INPUTS}")
        seen = hosts.gather((self.path / INPUTS).exists(), f"{self.path}/{INPUTS} in every process")
        hosts.decide(self._require_shared, seen, name=f"{self.path}/{INPUTS} in every process")

    def _require_shared(self, seen: list[bool]) -> None:
        if not all(seen):
            raise ValueError(
                f"{self.path / INPUTS} is not seen by process {seen.index(False)}; give a --workdir that all processes "
                "share"
            )

    def _fields(self) -> dict:
        return json_fields(self.config)

    def _holds_work(self) -> bool:
        signs = (self.path / DONE, self.path / EXAMPLES, *self.path.glob("journal/*.npz"))
        return bool(checkpoint.numbers(self.path / CHECKPOINTS)) or any(path.exists() for path in signs)

    def finish(self, figures: dict, inputs: dict[str, str], output: str) -> dict:
        """Writes the DONE marker, with the digests of inputs and output, and returns the figures read back from it."""
        checkpoint.write_json(self.path / DONE, {"inputs": inputs, "output": output, "figures": figures})
        done = hosts.decide(lambda: json.loads((self.path / DONE).read_text())["figures"], name=f"{self.path}/{DONE}")
        release(self.path)
        remote.stage_finished()
        return done

    def checkpoints(self) -> checkpoint.CheckpointStore:
        kept = self.config.checkpointing
        return checkpoint.CheckpointStore(self.path / CHECKPOINTS, kept.keep, kept.keep_every)

    def newest_checkpoint(self) -> int | None:
        """Returns the number of the newest complete checkpoint, None without one."""
        return hosts.decide(self._newest, name=f"the checkpoints of {self.path}")

    def _newest(self) -> int | None:
        return max(checkpoint.numbers(self.path / CHECKPOINTS), default=None)


def hold(folder: Path) -> None:
    """Keeps other runs out of a folder until `release` or the end of the process; process 0 does it for all.

    Raises ValueError, naming the process, if another run is at work there.
    """
    hosts.decide(lock.hold, _lock(folder), name=f"the lock of {folder}")


def release(folder: Path) -> None:
    """Lets other runs into a folder that this process holds."""
    lock.release(_lock(folder))


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")  # beside it: it may be removed and made anew


def json_fields(config: Config) -> dict:
    """Returns the flat fields of a config as they are in config.json."""
    return json.loads(remote.shown(json.dumps(flatten(config), default=str)))


def _recorded(inputs: dict[str, str]) -> dict[str, str]:
    """Returns {input: digest} with the names that are written down."""
    return {remote.shown(name): digest for name, digest in inputs.items()}


def read_folder(
    folder: str | Path, shape: ModelConfig, data: DataConfig
) -> tuple[ModelConfig, DataConfig, tokenizers.Tokenizer]:
    """Returns (shape, data, tokenizer) of a Hugging Face folder or file, or of a stage's folder.

    A stage's folder may record no shape: then it is `shape`. The data are `data`, with what the folder records on its
    prompts if data.template is auto.
    """
    if is_hugging_face(folder):
        shape, tokenizer = read_hugging_face(folder)
        return shape, data, tokenizer
    shape, tokenizer, template = read_model(Path(folder), shape)
    return shape, replace(data, **template) if data.template == "auto" and template else data, tokenizer


def prepare(config: Config, start: Path | None = None) -> tuple[Config, tokenizers.Tokenizer, Mesh]:
    """Sets JAX up and returns (config with the shape of the weights it starts from, tokenizer, mesh).

    Shape, tokenizer and, with config.data.template=auto, the template come from `start` (a stage's folder), else from
    config.model.checkpoint (a Hugging Face folder or file, or a stage's folder), else from the preset and the tiny
    world. Raises ValueError for a tokenizer that does not fit the model or the problems.
    """
    runtime.setup()
    mesh = sharding.make_mesh(config.mesh)
    folder = start or config.model.checkpoint
    if folder:
        shape, data, tokenizer = read_folder(folder, config.model, config.data)
    else:
        shape, data, tokenizer = config.model, config.data, tokenizers.tiny()
    if not folder and tokenizer.vocab_size != shape.vocab_size:
        raise ValueError(
            f"{config.stage}:{config.preset} brings no weights and no tokenizer; give a Hugging Face folder, or a "
            "stage's, with --config.model.checkpoint=DIR"
        )
    compute, tokenizer = fit_to_tokenizer(config.compute, shape, tokenizer, config.sampler.stop_ids)
    shape = replace(shape, checkpoint=config.model.checkpoint)
    return replace(config, model=shape, data=data, compute=compute), tokenizer, mesh


def fit_to_tokenizer(
    compute: ComputeConfig, shape: ModelConfig, tokenizer: tokenizers.Tokenizer, stop_ids: Sequence[int]
) -> tuple[ComputeConfig, tokenizers.Tokenizer]:
    """Returns (`compute` with the rows of the vocabulary in use, the tokenizer that also stops at `stop_ids`)."""
    tokenizer = tokenizer.stopping_at(stop_ids)
    return replace(compute, vocab_used=tokenizers.vocab_used(shape, tokenizer)), tokenizer


def read_hugging_face(folder: str | Path) -> tuple[ModelConfig, tokenizers.Tokenizer]:
    """Returns (shape, tokenizer) of a Hugging Face folder, or of a file in one."""
    from r1jax.checkpoints import hf_config

    directory = Path(folder).parent if Path(folder).is_file() else Path(folder)
    return hf_config.model_config(directory), tokenizers.from_folder(directory)


def write_model(
    folder: Path, model: ModelConfig, data: DataConfig, tokenizer: tokenizers.Tokenizer, template: str
) -> None:
    """Writes into a stage's folder what is needed to use its weights: shape, tokenizer and settings of the prompts."""
    if not hosts.is_writer():
        return
    target = folder / MODEL
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(target)
    prompt_fields = {"template": template, "instruction": data.instruction, "think_prefill": data.think_prefill}
    ends, pad = token_ids(tokenizer)
    checkpoint.write_json(target / GENERATION, {"eos_token_id": ends, "pad_token_id": pad})
    record = {"model": dataclasses.asdict(replace(model, checkpoint="")), "data": prompt_fields}
    checkpoint.write_json(target / SHAPE, record)


def token_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], int]:
    """Returns (ids that end a response, padding id): those in the tokenizer's folder, then the tokenizer's own."""
    from r1jax.checkpoints import hf_config

    folder = Path(tokenizer.source)
    ends, pad = hf_config.token_ids(folder) if folder.is_dir() else ([], None)
    return list(dict.fromkeys([*ends, *tokenizer.stop_ids])), tokenizer.pad_id if pad is None else pad


def read_model(folder: Path, preset: ModelConfig) -> tuple[ModelConfig, tokenizers.Tokenizer, dict]:
    """Returns (shape, tokenizer, fields of config.data) of a stage's folder; without a record the shape is `preset`.

    Raises ValueError for a folder without them.
    """
    folder = run_folder(folder)
    path = folder / MODEL / SHAPE
    if not path.exists():
        return _model_of_run(folder, preset)
    record = hosts.decide(lambda: json.loads(path.read_text(encoding="utf-8")), name=str(path))
    return model_of(record["model"]), tokenizers.from_folder(folder / MODEL), record["data"]


def _model_of_run(folder: Path, preset: ModelConfig) -> tuple[ModelConfig, tokenizers.Tokenizer, dict]:
    """Returns the same for a folder without the record: from the config.json of its run, else from the preset.

    The tokenizer is in the run's Hugging Face folder; `preset.checkpoint` names that folder if it has moved.
    """
    path = folder / "config.json"
    fields = hosts.decide(lambda: json.loads(path.read_text()) if path.exists() else {}, name=str(path))
    if not fields:
        return preset, tokenizers.tiny(), {}
    moved = preset.checkpoint if preset.checkpoint and Path(preset.checkpoint) != folder else ""
    if base := remote.local_if_any(moved or fields.get("model.checkpoint", "")):
        if not Path(base).exists():
            raise ValueError(
                f"{folder} was trained from {base}, which holds its tokenizer and is not there; name that folder with "
                "--config.model.checkpoint=DIR"
            )
        shape, tokenizer = read_hugging_face(base)
    else:
        nested: dict = {"rope_scaling": {}}
        for name, value in fields.items():
            if name.startswith("model.rope_scaling."):
                nested["rope_scaling"][name.removeprefix("model.rope_scaling.")] = value
            elif name.startswith("model."):
                nested[name.removeprefix("model.")] = value
        shape, tokenizer = model_of(nested), tokenizers.tiny()
    return shape, tokenizer, {}


def model_of(record: dict) -> ModelConfig:
    """Returns a recorded shape; recorded fields that ModelConfig no longer has are ignored."""
    scaling = RopeScaling(**record["rope_scaling"])
    return known_fields(ModelConfig, record | {"rope_scaling": scaling, "checkpoint": ""})


def known_fields(kind: type[Any], record: dict):
    """Returns a config of class `kind` from the recorded fields that the class has."""
    return kind(**{field.name: record[field.name] for field in dataclasses.fields(kind) if field.name in record})


def run_folder(folder: Path) -> Path:
    """Returns the folder of the run whose weights a folder holds: the one above the best weights, else itself."""
    kept = folder.name == evaluations.BEST and (folder / CHECKPOINTS).is_dir()
    return folder.parent if kept and (folder.parent / INPUTS).is_file() else folder


def is_hugging_face(folder: str | Path) -> bool:
    """Returns whether a folder is a Hugging Face checkpoint, or a safetensors file of one beside its config.json.

    Raises ValueError when there is no such folder.
    """
    path = Path(folder)
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"no such checkpoint folder: {folder}; give a Hugging Face folder or a stage's folder")
    if (path / INPUTS).is_file():
        return False  # a stage's folder, perhaps stopped before its first checkpoint
    if (path / "checkpoints").is_dir():
        return _names_its_family(path / "config.json")
    if not (path / "config.json").exists():
        raise ValueError(f"{folder} is no checkpoint: it has neither config.json nor a checkpoints folder")
    return True


def _names_its_family(path: Path) -> bool:
    """Returns whether a config.json is Hugging Face's, which has a model_type."""
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load_weights(model: ModelConfig, mesh: Mesh, source: str) -> decoder.Params:
    """Returns float32 parameters of a Hugging Face folder or a stage's newest checkpoint."""
    if is_hugging_face(source):
        from r1jax.checkpoints import hf

        return hf.load(source, model, mesh, jnp.float32)
    if (Path(source) / REWARD_MODEL).exists():
        raise ValueError(
            f"{source} holds a reward model, which gives scores and no text; give the folder of another stage"
        )
    target = sharding.abstract(decoder.specs(model), jnp.float32, mesh)
    return checkpoint.load(Path(source) / CHECKPOINTS, "params", target)


def file_digest(path: str) -> str:
    """Returns the sha256 of a file's content. Raises ValueError when there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_digest(source: str | Path) -> str:
    """Returns a digest of a checkpoint: of the weights, config and tokenizer files of a Hugging Face folder (or of a
    file in one), or of the result of a stage's folder. One process computes it.

    Raises ValueError when there is no checkpoint.
    """
    return hosts.decide(_checkpoint_digest, Path(source), name=f"the digest of {source}")


def replaceable(source: str | Path) -> bool:
    """Returns whether a run may be at work that replaces the weights of a folder: one of a stage, not marked as done."""
    folder = Path(source)
    return hosts.decide(
        lambda: not (is_hugging_face(folder) or (folder / DONE).exists()), name=f"the state of {folder}"
    )


def _checkpoint_digest(source: Path) -> str:
    if not is_hugging_face(source):
        marker = source / DONE
        if marker.exists():
            return json.loads(marker.read_text())["output"]
        if not (numbers := checkpoint.numbers(source / CHECKPOINTS)):
            raise ValueError(f"{source} holds no finished checkpoint; run that stage to its end first")
        files = sorted(path for path in (source / CHECKPOINTS / str(numbers[-1])).rglob("*") if path.is_file())
    else:
        folder = source.parent if source.is_file() else source
        names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        files = [*_weight_files(source), *(folder / name for name in names if (folder / name).exists())]
    size = sum(path.stat().st_size for path in files)
    if size > SLOW_DIGEST_BYTES:
        say(f"{source}: reading {size / 1e9:.0f} GB once, to know these weights again")
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = zip((path.name for path in files), pool.map(lambda path: file_digest(str(path)), files), strict=True)
        return hashlib.sha256(repr(list(digests)).encode()).hexdigest()


def _weight_files(source: Path) -> list[Path]:
    """Returns the weight files of a Hugging Face folder and their index; for a file, that file."""
    from r1jax.checkpoints import hf

    if source.is_file():
        return [source]
    files, weight_map = hf.weight_files(source)
    return [*files, *([source / hf.INDEX_FILE] if weight_map else [])]


def shape_hash(model: ModelConfig, *more) -> str:
    """Returns a hash of the config that determines a model's parameters, and of the configs in `more`.

    Only fields that differ from their default count, so that a field added later does not change the hash.
    """
    text = repr([_non_defaults(part) for part in (replace(model, checkpoint=""), *more)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _non_defaults(part) -> list[tuple]:
    """Returns (field, value) of the fields that differ from their default, nested ones likewise."""
    default, fields = type(part)(), []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value != getattr(default, field.name):
            fields.append((field.name, _non_defaults(value) if dataclasses.is_dataclass(value) else value))
    return fields


def _named(tree) -> dict[str, jax.Array]:
    return {checkpoint._key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_asset(path: Path, params: decoder.Params, metadata: dict[str, str]) -> None:
    """Writes parameters as one safetensors file, atomically; of several processes process 0 writes it."""
    leaves = {name: sharding.to_host(leaf) for name, leaf in _named(params).items()}
    if hosts.is_writer():
        tensors = [(name, leaf.dtype, leaf.shape) for name, leaf in leaves.items()]
        with files.replacing(path) as temporary, TensorWriter(temporary, tensors, metadata) as writer:
            for name, leaf in leaves.items():
                writer.put(name, leaf)


def load_asset(path: Path, model: ModelConfig, mesh: Mesh) -> decoder.Params:
    """Returns the parameters of a safetensors file. Raises ValueError when they do not fit the model."""
    specs = decoder.specs(model)
    target = sharding.abstract(specs, jnp.float32)
    with safe_open(path, framework="numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = {name: tuple(leaf.shape) for name, leaf in _named(target).items()}
        if problems := checkpoint.shape_problems(stored, expected):
            raise ValueError(f"{path} does not fit the model: {problems}")
        leaves = [file.get_tensor(name) for name in expected]
    params = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return jax.tree.map(sharding.place, params, sharding.spec_shardings(specs, mesh))


def asset_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}
