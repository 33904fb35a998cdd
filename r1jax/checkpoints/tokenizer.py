"""Tokenizers: a Hugging Face folder's tokenizer.json or sentencepiece model, and the tiny world's own word list."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from r1jax.checkpoints import chat
from r1jax.checkpoints import sentencepiece_model as spm
from r1jax.data import tasks


class Backend(Protocol):
    """What turns text into ids and back; special tokens spelled out in the text are one id each."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def special_texts(self) -> list[str]: ...

    def save(self, folder: Path) -> None: ...


class JsonBackend:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._inner.token_to_id(token)

    def special_texts(self) -> list[str]:
        return [token.content for token in self._inner.get_added_tokens_decoder().values()]

    def save(self, folder: Path) -> None:
        self._inner.save(str(folder / "tokenizer.json"))


def _token_text(value: Any) -> str | None:
    """Returns a special token's text from tokenizer_config.json, where it is a string or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


class Tokenizer:
    """Text to ids and back, with the special tokens and the chat template of a checkpoint."""

    def __init__(self, backend: Backend, special: dict, chat_template: str = "", source: str = ""):
        """`special` is tokenizer_config.json. Without a pad_token, padding is the end token. ValueError without an end."""
        self.backend, self.chat_template, self.source = backend, chat_template, source
        self.config = special
        self._spelled: re.Pattern | None = None
        self.bos_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        if eos is None:
            given = _token_text(self.config.get("eos_token"))
            what = "" if given is None else f" in the vocabulary (eos_token={given!r})"
            raise ValueError(
                f"tokenizer {source}: no eos_token{what}; name the token that ends a response as eos_token in "
                "tokenizer_config.json (pad_token may be left out: padding is then the end token)"
            )
        self.eos_id = eos
        pad = self._special_id("pad_token")
        self.pad_id = self.eos_id if pad is None else pad

    def _special_id(self, name: str) -> int | None:
        text = _token_text(self.config.get(name))
        return None if text is None else self.backend.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    def encode(self, text: str) -> list[int]:
        """Returns ids without any special token that the text does not spell out."""
        return self.backend.encode(text)

    def defused(self, text: str) -> str:
        """Returns the text with a space inside every special token that it spells out, so that `encode` makes none of it.

        For text of strangers inside a prompt: a spelled-out end of turn would close the turn that quotes it.
        """
        if self._spelled is None:
            found = {token for token in self.backend.special_texts() if len(token) > 1 and token.strip() == token}
            longest_first = sorted(found, key=len, reverse=True)
            self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        while (broken := self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
            text = broken
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included except pad and eos."""
        return self.backend.decode([int(i) for i in ids if i not in (self.eos_id, self.pad_id)])

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the chat template applied to messages, rendered in a sandbox.

        Raises ValueError without a template, and in one line for whatever goes wrong inside it.
        """
        if not self.chat_template:
            raise ValueError(f"tokenizer {self.source}: no chat template; set --config.data.template=r1_zero or plain")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: _token_text(self.config.get(name)) or "" for name in names}
        try:
            return chat.render(
                self.chat_template, dict(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
            )
        except ValueError as error:
            raise ValueError(f"tokenizer {self.source}: the chat template failed: {error}") from None

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's own file and tokenizer_config.json, from which `from_folder` and transformers read it."""
        self.backend.save(folder)
        config = _for_older_readers(self.config, isinstance(self.backend, JsonBackend))
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
        )


def _for_older_readers(config: dict, is_json: bool) -> dict:
    """Returns tokenizer_config.json without what only transformers 5 knows; 5 reads the older names too."""
    kept = {name: value for name, value in config.items() if name not in ("backend", "is_local", "local_files_only")}
    if kept.get("tokenizer_class") in ("TokenizersBackend", "SentencePieceBackend", "PythonBackend"):
        kept["tokenizer_class"] = "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer"
    if isinstance(kept.get("extra_special_tokens"), list):  # an object of named tokens in transformers 4
        extra = kept.pop("extra_special_tokens")
        kept["additional_special_tokens"] = kept.get("additional_special_tokens") or extra
    return kept


def from_folder(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder: its tokenizer.json, else the sentencepiece model tokenizer.model.

    Raises ValueError when its files are missing or malformed, or name no end token.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").exists() and not (folder / spm.FILE).exists():
        raise ValueError(
            f"tokenizer: no tokenizer.json and no {spm.FILE} in {folder}; copy the tokenizer's files there"
        )
    config = _read_json(folder / "tokenizer_config.json")
    for name, value in _read_json(folder / "special_tokens_map.json").items():
        config[name] = value if config.get(name) is None else config[name]
    template = _chat_template(folder, config.pop("chat_template", None))
    if (folder / "tokenizer.json").exists():
        return Tokenizer(_json_backend(folder / "tokenizer.json"), config, template, str(folder))
    backend = _sentencepiece_backend(folder, config)
    # What the model names itself is written into the config, so that a saved folder states it.
    given = {name: value for name, value in config.items() if value is not None}
    config = backend.own_tokens() | {"tokenizer_class": "LlamaTokenizer"} | given
    return Tokenizer(backend, config, template, str(folder))


def _chat_template(folder: Path, stated: Any) -> str:
    """Returns the template of chat_template.jinja, else the one stated in tokenizer_config.json, "" without either."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(stated, list):  # several with names
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    if not isinstance(stated, str | None):
        raise ValueError(f"tokenizer: {folder / 'tokenizer_config.json'}: chat_template must be text")
    return stated or ""


def _read_json(path: Path) -> dict:
    """Returns a JSON object, or an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer: {path} holds a {type(value).__name__}, an object is needed")
    return value


def _json_backend(path: Path) -> JsonBackend:
    try:
        return JsonBackend(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {' '.join(str(error).split())}") from None


def _sentencepiece_backend(folder: Path, config: dict) -> spm.SentencePieceBackend:
    """Returns the backend of tokenizer.model; tokens beyond it go into `config` as transformers writes them.

    added_tokens.json and added_tokens_decoder give their ids; add_prefix_space and legacy (both as transformers
    defaults them: true, false) say where a leading space goes.
    """
    decoder = dict(config.get("added_tokens_decoder") or {})
    for token, index in _read_json(folder / "added_tokens.json").items():
        decoder.setdefault(str(index), {"content": token, "special": True})
    if decoder:
        config["added_tokens_decoder"] = decoder
    try:
        added = {str(_token_text(token)): int(index) for index, token in decoder.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"tokenizer: {folder}: added tokens must be given as numbers and texts, not {decoder}"
        ) from None
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named = [config.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")]
    named += extra.values() if isinstance(extra, dict) else extra
    prefix = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    try:
        content = (folder / spm.FILE).read_bytes()
        return spm.SentencePieceBackend(content, added, [_token_text(token) for token in named if token], prefix)
    except ValueError as error:
        raise ValueError(f"tokenizer: {folder / spm.FILE} is {error}") from None


@functools.lru_cache
def tiny() -> Tokenizer:
    """Returns the tiny world's tokenizer: one token a word, words separated by spaces."""
    vocabulary = {word: index for index, word in enumerate(tasks.vocabulary())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(tasks.SPECIAL_TOKENS))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special["tokenizer_class"] = "PreTrainedTokenizerFast"
    return Tokenizer(JsonBackend(inner), special, source="tiny world")
