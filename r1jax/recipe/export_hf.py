"""Export a stage's result to a Hugging Face folder and check that the folder reads back as the trained model."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints import fp8, hf, hf_config, hf_export
from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.config import flatten, override
from r1jax.core import hosts, tree
from r1jax.core.say import say
from r1jax.core.sharding import replicated, use_mesh
from r1jax.data import templates
from r1jax.models import decoder
from r1jax.recipe import common, lineage, prompts
from r1jax.schema import Config, DataConfig, ModelConfig, Network, replace

# Fields of the run's config.json that an export takes over.
RUN_FIELDS = ("model.", "compute.", "data.", "sampler.stop_ids")
PATHS = ("model.checkpoint", "data.path", "distill.examples", "coldstart.teacher", "inputs", "checkpoint", "output")
# A conversation as templates.flat writes it: system texts, then one turn unchanged, or every turn under its role. A
# last turn of the assistant is left out: it is the answer to such a prompt.
FLAT = (
    "{% set said = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% if said and said[-1]['role'] == 'assistant' %}{% set said = said[:-1] %}{% endif %}"
    "{% for turn in messages if turn['role'] == 'system' %}{{ turn['content'] + '\\n\\n' }}{% endfor %}"
    "{% for turn in said %}{{ turn['content'] if said | length == 1 else (turn['role'] | capitalize) + ': ' + "
    "turn['content'] }}"
    "{{ '' if loop.last else '\\n\\n' }}{% endfor %}"
)
# Puts TEXT before the last message where that is the user's.
INSTRUCTED = (
    "{% if messages[-1]['role'] == 'user' %}{% set messages = messages[:-1] + "
    "[{'role': 'user', 'content': TEXT + messages[-1]['content']}] %}{% endif %}"
)
ASKED = "{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}"  # a turn goes on after a tool's output


def run(config: Config, workdir: Path) -> dict[str, float]:
    """Writes config.output from the stage folder config.checkpoint and verifies it.

    Returns the numbers of tensors, parameters and files, and the logit difference when verified. Raises ValueError
    when a folder is not given, config.output exists, or the folder reads back differently.
    """
    if not config.checkpoint or not config.output:
        raise ValueError("export_hf: give --config.checkpoint=STAGE_FOLDER and --config.output=NEW_FOLDER")
    source, target = Path(config.checkpoint), Path(config.output)
    hf_export.refuse_existing(target)
    if common.is_hugging_face(source):
        raise ValueError(f"{source} is a Hugging Face folder already, or no stage's folder; give a stage's folder")
    fields = run_fields(source)
    resolved, tokenizer, mesh = common.prepare(stage_config(source, fields, config), source)
    hf_export.check_dtype(resolved.model, config.export.dtype)
    ends, pad = common.token_ids(tokenizer)
    tokenizer = Tokenizer(
        tokenizer.backend, tokenizer.config, chat_template(resolved.stage, resolved.data, tokenizer), tokenizer.source
    )
    params, kind = common.load_weights(resolved.model, mesh, str(source)), config.export.dtype
    figures: dict[str, float] = {"parameters": tree.count(params)}
    logits = _logits(params, resolved.network, mesh) if config.export.verify else np.zeros(0)
    leaves = hf_export.Leaves(params)
    del params  # the leaves alone hold it, until they are dropped to read the folder back

    def check(folder: Path) -> None:
        with hf.TensorFiles(folder) as files:
            figures["tensors"] = len(list(files))
        figures["files"] = len(list(folder.glob("*.safetensors")))
        if config.export.verify:
            figures["logit_difference"] = verify(folder, leaves, logits, resolved.network, mesh, kind)

    card_text = card(source, fields, target.name)
    hf_export.save(target, leaves, resolved.model, tokenizer, kind, card_text, check=check, end_ids=ends, pad_id=pad)
    checked = "not read back"
    if config.export.verify:
        moved = figures["logit_difference"]
        checked = f"read back and compared, logits moved by {moved:.2g} of the largest"
    say(f"{target}: {figures['parameters']:,} parameters as {kind}, {checked}")
    return figures


def run_fields(folder: Path) -> dict:
    """Returns the flat config.json of a run's folder. Raises ValueError when there is none."""
    path = common.run_folder(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json; give the folder of a stage")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def stage_config(folder: Path, fields: dict, config: Config) -> Config:
    """Returns `config` with the model and the data of the run in `folder`, whose flat config is `fields`.

    If the tokenizer is in a Hugging Face folder that has moved since, config.model.checkpoint names that folder.
    """
    known = flatten(config)
    overrides = {key: str(value) for key, value in fields.items() if key.startswith(RUN_FIELDS) and key in known}
    if config.model.checkpoint:
        overrides["model.checkpoint"] = config.model.checkpoint
    return override(config, overrides.items())


def chat_template(stage: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Returns the Jinja template that renders a conversation as the run's training did.

    For `chat` it is the tokenizer's own; for the other templates one that writes the conversation as one question
    (templates.flat). The last user message begins with config.data.instruction. With config.data.think_prefill the
    generation prompt ends in `<think>` and a line break.
    """
    kind, think_prefill, instruction = prompts.template(stage, data, tokenizer), data.think_prefill, data.instruction
    before_turns = INSTRUCTED.replace("TEXT", json.dumps(f"{instruction}\n", ensure_ascii=False)) if instruction else ""
    if kind == "chat":
        if not think_prefill:
            return before_turns + tokenizer.chat_template
        without_think, with_think = (
            templates.render("1", kind, "", tokenizer.render_chat, prefilled) for prefilled in (False, True)
        )
        missing = json.dumps(with_think.removeprefix(without_think), ensure_ascii=False)
        opening = f"{ASKED}{{{{ {missing} }}}}{{% endif %}}" if with_think != without_think else ""
        return before_turns + tokenizer.chat_template + opening
    around = templates.render("\0", kind, think_prefill=think_prefill).split("\0")
    before, after = (f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else "" for text in around)
    return f"{before_turns}{before}{FLAT}{after}"


def verify(
    folder: Path, leaves: hf_export.Leaves, logits: np.ndarray, network: Network, mesh: Mesh, dtype: str
) -> float:
    """Returns max |logit before - after| on random tokens, as a fraction of the largest logit; 0 for float32.

    `leaves` are the weights that were written, `logits` what they compute. They are compared with the folder and then
    dropped, before the folder is read back as any other: the devices never hold the weights twice. Of several processes
    each compares its share of the tensors. Raises ValueError when a weight is not bit-equal to ours rounded to `dtype`
    (`fp8`: quantised and multiplied out again), or when the model of config.json computes other logits.
    """
    model, shape = network.model, hf_config.model_config(folder)
    with hf.TensorFiles(folder) as files:
        _refuse_different(leaves, model, dtype, lambda tensor, value: _is_stored(files, tensor, value))
        leaves.drop()
        back = hf.load(folder, shape, mesh, jnp.float32)
        _refuse_different(hf_export.Leaves(back), model, dtype, lambda tensor, value: _is_read(files, tensor, value))
    reread, same_weights = (_logits(back, replace(network, model=one), mesh) for one in (shape, model))
    if not np.array_equal(reread, same_weights):
        raise ValueError("export_hf: config.json, read back, computes other logits; nothing was kept")
    return float(np.abs(reread - logits).max() / np.abs(logits).max())


def _refuse_different(
    leaves: hf_export.Leaves, model: ModelConfig, dtype: str, equal: Callable[[hf.Tensor, np.ndarray], bool]
) -> None:
    """Raises ValueError in every process when `equal(tensor, value)` is false for a tensor in the share of one."""
    matrices = [tensor for tensor in hf_export.tensors(model, dtype) if not tensor.is_scale]
    compared, different = set(hosts.share(range(len(matrices)))), []
    for number, tensor in enumerate(matrices):
        value = leaves.value(tensor)
        if number in compared and not equal(tensor, value):
            different.append(tensor.name)
    name = "the tensors that were compared"
    for names in hosts.broadcast(hosts.gather(different, name), name):
        if names:
            raise ValueError(f"export_hf: {names[0]} reads back differently; nothing was kept")


def _is_stored(files: hf.TensorFiles, tensor: hf.Tensor, value: np.ndarray) -> bool:
    """Returns whether the files hold the bits that a value is stored as."""
    parts = hf_export.stored(tensor, value)
    return all(_same_bits(files.read(name), array) for name, array in parts.items())


def _is_read(files: hf.TensorFiles, tensor: hf.Tensor, value: np.ndarray) -> bool:
    """Returns whether a value that an importer read is, in float32, what the files hold."""
    names = [tensor.name, *([tensor.name + fp8.SCALE] if tensor.dtype == fp8.TYPE else [])]
    return _same_bits(hf_export.decoded(tensor, {name: files.read(name) for name in names}), value)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


def _logits(params: decoder.Params, network: Network, mesh: Mesh) -> np.ndarray:
    """Returns the logits [2, 24, V] of two rows of random tokens, computed in float32."""
    tokens = np.random.default_rng(0).integers(0, network.model.vocab_size, (2, 24)).astype(np.int32)
    places = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    computed = Network(network.model, replace(network.compute, compute_dtype="float32"))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def run(params: decoder.Params) -> jax.Array:
        rows = jnp.asarray(tokens), jnp.asarray(places), jnp.ones_like(tokens)
        hidden, _, _ = decoder.forward(params, *rows, computed)
        return decoder.logits(params, hidden)

    with use_mesh(mesh):
        return np.asarray(run(params))


def card(source: Path, fields: dict, name: str) -> str:
    """Returns the model card of a run: its stage, its measured figures, and the settings that are not defaults."""
    stage = fields.get("stage", source.name)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {name}", ""]
    lines += [f"Trained with r1jax, stage `{stage}`, {fields.get('model.family')} architecture."]
    if base := fields.get("model.checkpoint"):
        lines += ["", f"Started from `{Path(base).name}`."]
    marker = source / common.DONE
    if marker.exists():
        figures = json.loads(marker.read_text())["figures"].get(lineage.RESULTS.get(stage, stage), {})
        shown = [(key, value) for key, value in figures.items() if isinstance(value, float)]
        if shown:
            lines += ["", "## Held-out figures", "", "| figure | value |", "|---|---|"]
            lines += [f"| {key} | {value:.4g} |" for key, value in shown]
    defaults = common.json_fields(Config())
    chosen = [(key, value) for key, value in fields.items() if key not in PATHS and value != defaults.get(key)]
    lines += ["", "## Settings", "", "Fields that differ from r1jax's defaults.", "", "| field | value |", "|---|---|"]
    lines += [f"| {key} | {_one_line(value)} |" for key, value in chosen]
    return "\n".join(lines) + "\n"


def _one_line(value) -> str:
    return " ".join(str(value).split()).replace("|", r"\|")
