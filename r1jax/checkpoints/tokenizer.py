"""Tokenizers: a Hugging Face tokenizer.json through the `tokenizers` library, and the tiny world's own word list."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r1jax.data import tasks


def _token_text(value) -> str | None:
    """Returns a special token's text from tokenizer_config.json, where it is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


class Tokenizer:
    """Text to ids and back, with the special tokens and the chat template of a checkpoint."""

    def __init__(self, backend: tokenizers.Tokenizer, special: dict, chat_template: str = "", source: str = ""):
        self.backend, self.chat_template, self.source = backend, chat_template, source
        self.config = special
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        if self.eos_id is None:
            raise ValueError(f"tokenizer {source}: no eos_token; add it to tokenizer_config.json")
        pad = self._special_id("pad_token")
        self.pad_id = self.eos_id if pad is None else pad

    def _special_id(self, name: str) -> int | None:
        text = _token_text(self.config.get(name))
        return None if text is None else self.backend.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Returns ids without any special token that the text does not spell out."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included except pad and eos."""
        return self.backend.decode(
            [int(i) for i in ids if i not in (self.eos_id, self.pad_id)], skip_special_tokens=False
        )

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the chat template applied to messages, rendered in a sandbox. Raises ValueError without a template."""
        if not self.chat_template:
            raise ValueError(f"tokenizer {self.source}: no chat template; set --config.data.template=r1_zero or plain")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def refuse(message):
            raise TemplateError(message)

        environment.globals["raise_exception"] = refuse
        tokens = {name: _token_text(self.config.get(name)) or "" for name in ("bos_token", "eos_token")}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer {self.source}: the chat template failed: {reason}") from None

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = dict(self.config)
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))


def from_folder(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder. Raises ValueError when its files are missing or malformed."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"tokenizer: no tokenizer.json in {folder}; save the tokenizer in its fast format there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {error}") from None
    config, config_path = {}, folder / "tokenizer_config.json"
    if config_path.exists():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"tokenizer: {config_path} is not JSON: {error}") from None
    template = config.pop("chat_template", "") or ""
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
    return Tokenizer(backend, config, template, str(folder))


@functools.lru_cache
def tiny() -> Tokenizer:
    """Returns the tiny world's tokenizer: one token a word, words separated by spaces."""
    vocabulary = {word: index for index, word in enumerate(tasks.vocabulary())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(tasks.SPECIAL_TOKENS))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special["tokenizer_class"] = "PreTrainedTokenizerFast"
    return Tokenizer(backend, special, source="tiny world")
