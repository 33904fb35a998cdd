"""What stages share: their folder, the tokenizer, the starting weights and finished-or-not."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.config import config_hash, flatten
from r1jax.core import checkpoint, distributed, runtime, sharding
from r1jax.models import decoder
from r1jax.schema import Config, GateConfig, ModelConfig, replace

ASSETS = Path(__file__).resolve().parents[1] / "assets"
DONE = "DONE"
INPUTS = "inputs.json"
EXAMPLES = "examples.jsonl"


class StageFolder:
    """`workdir/STAGE/`: config.json, checkpoints, metrics and, when finished, a DONE marker with the figures."""

    def __init__(self, config: Config, workdir: Path, name: str | None = None):
        self.path = Path(workdir) / (name or config.stage)
        self.config = config
        self.hash = config_hash(replace(config, gate=GateConfig()))  # a gate judges the result, it does not make it

    def state(self, inputs: dict[str, str]) -> str:
        """Returns missing, stopped, done, or stale: finished with another config or from other inputs."""
        marker = self.path / DONE
        if not marker.exists():
            return "stopped" if self._holds_work() else "missing"
        record = json.loads(marker.read_text())
        return "done" if (record["config_hash"], record["inputs"]) == (self.hash, inputs) else "stale"

    def finished(self, inputs: dict[str, str]) -> dict | None:
        """Returns the figures when this very config has been run to its end here from the same inputs.

        Raises ValueError, naming what changed, when what is here, finished or not, was made from other inputs.
        """
        return distributed.decide(self._finished, inputs, name=f"what is in {self.path}")

    def _finished(self, inputs: dict[str, str]) -> dict | None:
        marker = self.path / (DONE if (self.path / DONE).exists() else INPUTS)
        if not marker.exists() or not self._holds_work():
            return None
        record = json.loads(marker.read_text())
        changed = [name for name in {**inputs, **record["inputs"]} if inputs.get(name) != record["inputs"].get(name)]
        if changed:
            raise ValueError(
                f"{self.path} is stale: its input {changed[0]} has changed since; remove that folder, or run the graph "
                f"again with --config.from={self.config.stage}"
            )
        return record["figures"] if record.get("config_hash") == self.hash else None

    def check(self) -> None:
        """Raises ValueError when this folder holds work of another config."""
        distributed.decide(self._check, name=f"what is in {self.path}")

    def _check(self) -> None:
        path = self.path / "config.json"
        if not path.exists() or not self._holds_work():
            return
        old, fields, defaults = json.loads(path.read_text()), self._fields(), json_fields(Config())
        for name in (name for name in fields if not name.startswith("gate.")):
            if old.get(name, defaults[name]) != fields[name]:  # a field that is newer than the run had its default
                raise ValueError(
                    f"{self.path} holds a run with another config ({name}: {old.get(name)!r} there, {fields[name]!r} now); "
                    "choose another --workdir or remove that folder"
                )

    def start(self, inputs: dict[str, str]) -> None:
        """Makes the folder and writes config.json and the digests of the inputs; ValueError as in `check`.

        So too when one of several processes does not see what process 0 wrote there.
        """
        self.check()
        checkpoint.write_json(self.path / "config.json", self._fields())
        checkpoint.write_json(self.path / INPUTS, {"inputs": inputs})
        distributed.barrier(f"{self.path}/{INPUTS}")
        seen = distributed.gather((self.path / INPUTS).exists(), f"{self.path}/{INPUTS} in every process")
        distributed.decide(self._require_shared, seen, name=f"{self.path}/{INPUTS} in every process")

    def _require_shared(self, seen: list[bool]) -> None:
        if not all(seen):
            raise ValueError(
                f"{self.path / INPUTS} is not seen by process {seen.index(False)}; give a --workdir that all processes share"
            )

    def _fields(self) -> dict:
        return json_fields(self.config)

    def _holds_work(self) -> bool:
        kept = (
            self.path / DONE,
            self.path / EXAMPLES,
            *self.path.glob("checkpoints/[0-9]*"),
            *self.path.glob("journal/*.npz"),
        )
        return any(path.exists() for path in kept)

    def finish(self, figures: dict, inputs: dict[str, str], output: str) -> dict:
        """Writes the DONE marker, with the digests of inputs and output, and returns the figures as they read back."""
        record = {"config_hash": self.hash, "inputs": inputs, "output": output, "figures": figures}
        checkpoint.write_json(self.path / DONE, record)
        return distributed.decide(
            lambda: json.loads((self.path / DONE).read_text())["figures"], name=f"{self.path}/{DONE}"
        )

    def checkpoints(self) -> checkpoint.CheckpointStore:
        return checkpoint.CheckpointStore(self.path / "checkpoints", self.config.checkpointing.keep)


def json_fields(config: Config) -> dict:
    """Returns the flat fields of a config as its config.json holds them."""
    return json.loads(json.dumps(flatten(config), default=str))


def prepare(config: Config) -> tuple[Config, tokenizers.Tokenizer, Mesh]:
    """Returns (config with the checkpoint's own model shape, tokenizer, mesh) and sets JAX up.

    A Hugging Face folder, or file, in config.model.checkpoint overrides the preset's shape; without one, or with one of our own
    runs, the tiny world's tokenizer applies.
    """
    runtime.setup()
    mesh = sharding.make_mesh(config.mesh)
    folder = config.model.checkpoint
    if folder and is_hugging_face(folder):
        from r1jax.checkpoints import hf_config

        beside = Path(folder).parent if Path(folder).is_file() else Path(folder)
        shape = hf_config.model_config(beside, config.model)
        tokenizer = tokenizers.from_folder(beside).stopping_at(config.sampler.stop_ids)
        return replace(config, model=tokenizers.fitted(shape, tokenizer)), tokenizer, mesh
    tokenizer = tokenizers.tiny().stopping_at(config.sampler.stop_ids)
    if config.model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"config.model.vocab_size={config.model.vocab_size}, but the tiny world has {tokenizer.vocab_size} tokens; "
            "give a Hugging Face folder with --config.model.checkpoint=DIR"
        )
    return config, tokenizer, mesh


def is_hugging_face(folder: str | Path) -> bool:
    """Returns whether a folder is a Hugging Face checkpoint, or a safetensors file of one beside its config.json.

    Raises ValueError when there is no such folder.
    """
    path = Path(folder)
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"no such checkpoint folder: {folder}; give a Hugging Face folder or a stage's folder")
    if (path / "checkpoints").is_dir():
        return False
    if not (path / "config.json").exists():
        raise ValueError(f"{folder} is no checkpoint: it has neither config.json nor a checkpoints folder")
    return True


def load_weights(config: Config, mesh: Mesh, source: str, default: Callable[[], decoder.Params]) -> decoder.Params:
    """Returns float32 parameters of a Hugging Face folder or a stage's newest checkpoint; `default()` without a source."""
    if not source:
        return default()
    if is_hugging_face(source):
        from r1jax.checkpoints import hf

        return hf.load(source, config.model, mesh, jnp.float32)
    store = checkpoint.CheckpointStore(Path(source) / "checkpoints")
    number = store.latest()
    if number is None:
        raise ValueError(f"{source} holds no finished checkpoint; run that stage to its end first")
    target = sharding.abstract(decoder.specs(config.model), jnp.float32, mesh)
    params = store.restore(number, {"params": target})["params"]
    store.close()
    return params


def file_digest(path: str) -> str:
    """Returns the sha256 of a file's content. Raises ValueError when there is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shape_hash(model: ModelConfig, *more) -> str:
    """Returns a hash of what fixes a model's parameters (and of anything else given).

    Only fields that differ from their default count, so a field added later leaves the hash as it was.
    """
    neutral = dict(compute_dtype="float32", scan_layers=True, moe_implementation="auto", checkpoint="")
    neutral |= dict(remat=False, remat_policy="nothing", attention_implementation="auto", attention_block=0)
    neutral |= dict(logprob_implementation="auto", vocab_used=0)
    text = repr([_chosen(config) for config in (replace(model, **neutral), *more)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(config) -> list[tuple]:
    """Returns (field, value) of the fields that differ from their default, nested ones likewise."""
    default, found = type(config)(), []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            found.append((field.name, _chosen(value) if dataclasses.is_dataclass(value) else value))
    return found


def _named(tree) -> dict[str, jax.Array]:
    return {checkpoint._key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_asset(path: Path, params: decoder.Params, metadata: dict[str, str]) -> None:
    """Writes parameters as one safetensors file, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: np.asarray(leaf) for name, leaf in _named(params).items()}, temporary, metadata=metadata)
    temporary.replace(path)


def load_asset(path: Path, model: ModelConfig, mesh: Mesh) -> decoder.Params:
    """Returns the parameters of a safetensors file. Raises ValueError when they do not fit the model."""
    specs = decoder.specs(model)
    target = sharding.abstract(specs, jnp.float32)
    with safe_open(path, framework="numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {name: tuple(leaf.shape) for name, leaf in _named(target).items()}
        if problems := checkpoint.shape_problems(stored, wanted):
            raise ValueError(f"{path} does not fit the model: {problems}")
        leaves = [file.get_tensor(name) for name in wanted]
    params = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return jax.tree.map(distributed.place, params, sharding.spec_shardings(specs, mesh))


def asset_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}
