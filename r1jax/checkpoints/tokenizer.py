"""Tokenizers: a Hugging Face folder's tokenizer.json or sentencepiece model, and the tiny world's word list."""

import copy
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from r1jax.checkpoints import chat
from r1jax.checkpoints import sentencepiece_model as spm
from r1jax.core import errors
from r1jax.core.say import say
from r1jax.data import tasks
from r1jax.schema import ModelConfig

GENERATION = "generation_config.json"
_SURROGATE = re.compile("[\ud800-\udfff]")
PROBE = "r1jax7741"  # a marker, to locate a text inside a rendered or encoded one


class Backend(Protocol):
    """Turns text into ids and back; each special token spelled out in the text becomes one id."""

    @property
    def vocab_size(self) -> int: ...  # the highest id and 1

    def encode(self, text: str) -> list[int]: ...

    def prompt_prefix(self) -> list[int] | None: ...  # ids that it puts before a text by itself; None: not stated

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def special_texts(self) -> list[str]: ...

    def save(self, folder: Path) -> None: ...


class JsonBackend:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def prompt_prefix(self) -> list[int] | None:
        """Returns the ids that the post-processor puts before a text; None where it has none."""
        plain, whole = self.encode(PROBE), self._inner.encode(PROBE, add_special_tokens=True).ids
        places = range(len(whole) - len(plain) + 1)
        return whole[: next((at for at in places if whole[at : at + len(plain)] == plain), 0)] or None

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._inner.token_to_id(token)

    def special_texts(self) -> list[str]:
        return [token.content for token in self._inner.get_added_tokens_decoder().values()]

    def save(self, folder: Path) -> None:
        self._inner.save(str(folder / "tokenizer.json"))


def _in_parts(messages: Sequence[dict], texts: Sequence[str] = ()) -> list[dict]:
    """Returns messages whose content is a list of parts, as multimodal ones have it, but for the roles of `texts`."""
    return [
        message
        if message["role"] in texts or not isinstance(message["content"], str)
        else message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _token_text(value: Any) -> str | None:
    """Returns a special token's text from tokenizer_config.json, where it is a string or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


class Tokenizer:
    """Text to ids and back, with the special tokens and the chat template of a checkpoint."""

    def __init__(
        self, backend: Backend, special: dict, chat_template: str = "", source: str = "", stop_ids: Sequence[int] = ()
    ):
        """`special` is tokenizer_config.json, `stop_ids` further ids at which a response ends.

        Without a pad_token, padding is the end token. ValueError without an end.
        """
        self.backend, self.chat_template, self.source = backend, chat_template, source
        self.config, self._more_stops = special, tuple(stop_ids)
        self._spelled: re.Pattern | None = None
        self.bos_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        if eos is None:
            stated = _token_text(self.config.get("eos_token"))
            what = "" if stated is None else f" in the vocabulary (eos_token={stated!r})"
            raise ValueError(
                f"tokenizer {source}: no eos_token{what}; name the token that ends a response as eos_token in "
                "tokenizer_config.json (pad_token may be left out: padding is then the end token)"
            )
        self.eos_id = eos
        pad = self._special_id("pad_token")
        self.pad_id = eos if pad is None else pad

    def _special_id(self, name: str) -> int | None:
        text = _token_text(self.config.get(name))
        return None if text is None else self.backend.token_to_id(text)

    @property
    def vocab_size(self) -> int:
        return self.backend.vocab_size

    # Where a response ends

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a response ends: eos_id first, those of the folder's config.json and generation_config.json,
        those that `stopping_at` gave, and the chat template's end of turn."""
        return tuple(dict.fromkeys((self.eos_id, *self._more_stops, self.end_of_turn_id)))

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        """The special token that the chat template writes after an assistant turn; without one, eos_id.

        An end of turn that is no special token is reported once on stderr, since no single id can stop there.
        """
        after = self._after_turn()
        known = [text for text in self.backend.special_texts() if text.strip()]
        end_of_turn = max((text for text in known if after.startswith(text.strip())), key=len, default=None)
        if end_of_turn is not None:
            index = self.backend.token_to_id(end_of_turn)
            assert index is not None  # it is one of the backend's own
            return index
        if after:
            say(
                f"tokenizer {self.source}: the chat template ends a turn with {after.splitlines()[0]!r}, which is no "
                "special token: responses end at the end token alone; set --config.sampler.stop_strings to end them there too"
            )
        return self.eos_id

    def _after_turn(self) -> str:
        """Returns the text that the chat template writes after an assistant turn, stripped; "" without a template."""
        turns = [{"role": "user", "content": PROBE[::-1]}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.render_chat(turns, add_generation_prompt=False) if self.chat_template else ""
        except ValueError:  # rendering the prompts will report what is wrong with the template
            return ""
        return text.rpartition(PROBE)[2].strip() if PROBE in text else ""

    def stopping_at(self, ids: Sequence[int]) -> "Tokenizer":
        """Returns this tokenizer with further stop ids. Raises ValueError for one that it has no token for."""
        if bad := [index for index in ids if not 0 <= index < self.vocab_size]:
            raise ValueError(f"stop id {bad[0]} is none of the {self.vocab_size} ids of tokenizer {self.source}")
        if set(ids) <= set(self.stop_ids):
            return self
        further = copy.copy(self)
        further._more_stops = (*self._more_stops, *ids)
        further.__dict__.pop("stop_ids", None)
        return further

    # Text to ids

    def encode(self, text: str) -> list[int]:
        """Returns ids without any special token that the text does not spell out. ValueError for a lone surrogate."""
        try:
            return self.backend.encode(text)
        except Exception:  # the libraries differ in what they raise
            if (lone := _SURROGATE.search(text)) is None:
                raise
            raise ValueError(
                f"tokenizer {self.source}: the text has a lone surrogate, {ascii(lone[0])} at character "
                f"{lone.start()}, which UTF-8 cannot hold; mend or leave out the row that it comes from"
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt, beginning with one bos token where the tokenizer puts one before a text."""
        ids, prefix = self.encode(text), self._prompt_prefix
        starts = ids[: len(prefix)] == prefix or (self.bos_id is not None and ids[:1] == [self.bos_id])
        return ids if starts else prefix + ids

    @functools.cached_property
    def _prompt_prefix(self) -> list[int]:
        """What the post-processor puts before a text; where it states nothing, bos where add_bos_token is true."""
        stated = self.backend.prompt_prefix()
        if stated is not None:
            return stated
        return [self.bos_id] if self.config.get("add_bos_token") is True and self.bos_id is not None else []

    def encode_response(self, text: str, end_id: int | None = None) -> list[int]:
        """Returns the ids of a whole turn with one end token, `end_id` or else end_of_turn_id, as the last.

        Special tokens among the stop ids that the text already ends in, and white space after them, are left out.
        """
        special = {self.backend.token_to_id(spelled): spelled for spelled in self.backend.special_texts()}
        ends = tuple(special[index] for index in self.stop_ids if index in special)
        while (bare := text.rstrip()).endswith(ends):
            text = bare.removesuffix(next(end for end in ends if bare.endswith(end)))
        return [*self.encode(text), self.end_of_turn_id if end_id is None else end_id]

    def escape_special_tokens(self, text: str) -> str:
        """Returns the text with a space inside every special token that it spells out, so that `encode` yields none.

        It is for untrusted text inside a prompt, where a spelled-out end of turn would close the turn that quotes it.
        """
        if self._spelled is None:
            specials = {token for token in self.backend.special_texts() if len(token) > 1 and token.strip() == token}
            longest_first = sorted(specials, key=len, reverse=True)
            self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        while (broken := self._spelled.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
            text = broken
        return text

    # Ids to text

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids, special tokens included except pad and eos, and except stop ids at the end."""
        kept = [int(index) for index in ids if index not in (self.eos_id, self.pad_id)]
        while kept and kept[-1] in self.stop_ids:
            kept.pop()
        return self.backend.decode(kept)

    def decode_batch(self, rows: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        return [self.decode(row) for row in rows]

    # Chat

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the chat template applied to messages (role, content), rendered in a sandbox.

        Where rendering fails, or leaves out a user turn, contents are passed as lists of one text part, which some
        templates expect, first for all turns and then for all but the system's. Raises ValueError without a template,
        and in one line for any error inside it.
        """
        if not self.chat_template:
            raise ValueError(f"tokenizer {self.source}: no chat template; set --config.data.template=r1_zero or plain")
        asked = [m["content"].strip() for m in messages if m["role"] == "user" and isinstance(m["content"], str)]
        try:
            text, error = self._render(messages, add_generation_prompt), None
        except ValueError as failed:
            text, error = "", failed
        if error or not all(question in text for question in asked):
            for texts in ((), ("system", "developer"), ("system", "developer", "assistant")):
                try:
                    by_parts = self._render(_in_parts(messages, texts), add_generation_prompt)
                except ValueError:
                    continue
                if by_parts and all(question in by_parts for question in asked) and "{'type': 'text'" not in by_parts:
                    return by_parts
        if error:
            raise ValueError(f"tokenizer {self.source}: the chat template failed: {error}") from None
        return text

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """Returns the template rendered with the values that transformers passes: named special tokens, no tools."""
        extra = self.config.get("extra_special_tokens")
        named = {name: value for name, value in self.config.items() if name.endswith("_token")}
        tokens = {
            name: _token_text(value) for name, value in (named | (extra if isinstance(extra, dict) else {})).items()
        }
        values: dict[str, Any] = {name: text for name, text in tokens.items() if text is not None}
        values |= dict(messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
        return chat.render(self.chat_template, values)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's file and tokenizer_config.json, from which `from_folder` and transformers read it.

        Other stop ids go into generation_config.json, where the folder has none yet.
        """
        self.backend.save(folder)
        config = _for_older_readers(self.config, isinstance(self.backend, JsonBackend))
        if self.chat_template:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        if self._more_stops and not (folder / GENERATION).exists():
            stops = {"eos_token_id": list(dict.fromkeys((self.eos_id, *self._more_stops)))}
            (folder / GENERATION).write_text(json.dumps(stops, indent=2), encoding="utf-8")


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
        backend = _json_backend(folder / "tokenizer.json")
        return Tokenizer(backend, config, template, str(folder), _stated_stops(folder, backend))
    backend = _sentencepiece_backend(folder, config)
    # The special tokens that the model file names are written into the config, so that a saved folder states them.
    stated = {name: value for name, value in config.items() if value is not None}
    config = backend.own_tokens() | {"tokenizer_class": "LlamaTokenizer"} | stated
    return Tokenizer(backend, config, template, str(folder), _stated_stops(folder, backend))


def _stated_stops(folder: Path, backend: Backend) -> list[int]:
    """Returns the eos_token_id (a number or several) of config.json and generation_config.json, those that are tokens.

    The text part of a multimodal model counts too. Ids that are no token or an ordinary one, and stop_strings, which
    are not read, are reported on stderr. Raises ValueError for a value that is no id.
    """
    special = {backend.token_to_id(text) for text in backend.special_texts()}
    file_of_id: dict[int, str] = {}
    for name in ("config.json", GENERATION):
        stated = _read_json(folder / name)
        if stated.get("stop_strings"):
            say(
                f"tokenizer {folder}: stop_strings of {name} are not read; set --config.sampler.stop_strings to end "
                "responses there"
            )
        inner = stated.get("text_config")
        both = [part.get("eos_token_id") for part in (stated, inner) if isinstance(part, dict)]
        ids = [index for ids in both if ids is not None for index in (ids if isinstance(ids, list) else [ids])]
        if bad := [index for index in ids if not isinstance(index, int) or isinstance(index, bool)]:
            raise ValueError(
                f"tokenizer: {folder / name}: eos_token_id holds {bad[0]!r}, needs a token's number or several"
            )
        file_of_id |= {index: name for index in ids if index not in file_of_id}
    kept = [index for index in file_of_id if 0 <= index < backend.vocab_size]
    for index, name in file_of_id.items():
        stated_id = f"tokenizer {folder}: eos_token_id {index} of {name} is"
        if index not in kept:
            say(f"{stated_id} none of the {backend.vocab_size} ids of the tokenizer: no response ends there")
        elif index not in special:
            say(f"{stated_id} the ordinary token {backend.decode([index])!r}: responses end there too")
    return kept


def vocab_used(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Returns config.compute.vocab_used: the number of the tokenizer's ids, 0 where each of the model's rows has one.

    Rows beyond the tokenizer's highest id are neither sampled nor part of the softmax. Raises ValueError where the
    tokenizer has ids that the model has no rows for.
    """
    size = tokenizer.vocab_size
    if size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.source} has {size} ids, but the model only {model.vocab_size} rows (vocab_size of "
            "config.json); give the tokenizer that belongs to the weights"
        )
    return 0 if size == model.vocab_size else size


def _chat_template(folder: Path, stated: Any) -> str:
    """Returns the template of chat_template.jinja, else the one stated in tokenizer_config.json, "" without either."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(stated, list):  # several with names
        stated = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
    if isinstance(stated, dict):
        if "default" not in stated:
            say(
                f"tokenizer {folder}: none of the chat templates ({', '.join(map(str, stated))}) is named default: "
                "none is used"
            )
        stated = stated.get("default")
    if not isinstance(stated, str | None):
        raise ValueError(f"tokenizer: {folder / 'tokenizer_config.json'}: chat_template must be text")
    return stated or ""


def _read_json(path: Path) -> dict:
    """Returns a JSON object, or an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer: {path} holds a {type(value).__name__}, an object is needed")
    return value


def _json_backend(path: Path) -> JsonBackend:
    try:
        return JsonBackend(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizer: {path} is not a tokenizer.json: {errors.one_line(error)}") from None


def _sentencepiece_backend(folder: Path, config: dict) -> spm.SentencePieceBackend:
    """Returns the backend of tokenizer.model; tokens beyond it go into `config` as transformers writes them.

    added_tokens.json and added_tokens_decoder give their ids; add_prefix_space and legacy (both as transformers
    defaults them: true, false) decide where a leading space goes.
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
    special = [text for token in named if (text := _token_text(token))]
    prefix = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    try:
        content = (folder / spm.FILE).read_bytes()
        return spm.SentencePieceBackend(content, added, special, prefix)
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
