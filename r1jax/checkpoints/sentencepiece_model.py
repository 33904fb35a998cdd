"""A sentencepiece model file as a tokenizer backend: text to ids and back, special tokens included."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from r1jax.core import errors

FILE = "tokenizer.model"
CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type
SPACE = "▁"  # as pieces write it; user-defined runs of it are found by the library, after its normalisation
Prefix = Literal["first", "always", "never"]


class SentencePieceBackend:
    """Encodes ordinary text with the sentencepiece library; special tokens spelled out in it become their ids.

    Special are the model's control and user-defined pieces, its unknown piece, and what `added` and `special` name. A
    text is cut into parts at special tokens. `prefix` chooses which parts get the model's leading space: the one at the
    very start, every one, or none. transformers reads the same from add_prefix_space and legacy of
    tokenizer_config.json.
    """

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, int] | None = None,
        special: Iterable[str] = (),
        prefix: Prefix = "first",
    ):
        """`model` is the file's content, `added` the ids of tokens beyond or over it.

        Raises ValueError for no model.
        """
        proto = sentencepiece_model_pb2.ModelProto()  # ty: ignore[missing-attribute] protobuf makes it at import
        try:
            proto.ParseFromString(model)
            self._prefixed = self._processor(proto, True)
            self._bare = self._processor(proto, False)
        except Exception as error:  # protobuf's and the library's own errors share no base class
            raise ValueError(f"no sentencepiece model: {errors.one_line(error)}") from None
        self._model, self._added, self._prefix = model, dict(added or {}), prefix
        self._pieces = self._bare.get_piece_size()
        self._id_of = {piece.piece: index for index, piece in enumerate(proto.pieces)} | self._added
        specials = {piece.piece for piece in proto.pieces if piece.type == CONTROL}
        specials |= {piece.piece for piece in proto.pieces if piece.type == USER_DEFINED and piece.piece.strip(SPACE)}
        specials |= {
            proto.pieces[self._bare.unk_id()].piece,
            *self._added,
            *(text for text in special if text in self._id_of),
        }
        self._special = {text: self._id_of[text] for text in specials if text}
        self._text_of = {index: text for text, index in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @staticmethod
    def _processor(proto, prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """Returns the model with or without a space put before the text."""
        changed = sentencepiece_model_pb2.ModelProto()  # ty: ignore[missing-attribute] protobuf makes it at import
        changed.CopyFrom(proto)
        changed.normalizer_spec.add_dummy_prefix = prefix
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(changed.SerializeToString())
        return processor

    def prompt_prefix(self) -> None:
        """Returns nothing: a model file names a bos token, but not whether texts begin with it."""

    def _at(self, start: bool) -> sentencepiece.SentencePieceProcessor:
        return self._prefixed if self._prefix == "always" or (start and self._prefix == "first") else self._bare

    def encode(self, text: str) -> list[int]:
        """Returns ids without any special token that the text does not spell out."""
        ids: list[int] = []
        for place, part in enumerate(self._cut.split(text)):  # every second part is a special token
            if place % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._at(place == 0).encode_as_ids(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included; ids that the vocabulary lacks are left out."""
        parts: list[str] = []
        known = [index for index in ids if index in self._text_of or 0 <= index < self._pieces]
        for special, run in itertools.groupby(known, key=self._text_of.__contains__):
            if special:
                parts += [self._text_of[index] for index in run]
            else:
                parts.append(self._at(not parts).decode_ids(list(run)))
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        return self._id_of.get(token)

    def special_texts(self) -> list[str]:
        return list(self._special)

    def own_tokens(self) -> dict[str, str]:
        """Returns bos_token, eos_token, pad_token and unk_token as the model itself names them, those that it has."""
        ids = {name: getattr(self._bare, f"{name}_id")() for name in ("bos", "eos", "pad", "unk")}
        return {f"{name}_token": self._bare.id_to_piece(index) for name, index in ids.items() if index >= 0}

    @property
    def vocab_size(self) -> int:
        return max([self._pieces, *(index + 1 for index in self._added.values())])

    def save(self, folder: Path) -> None:
        """Writes the model file as it was read."""
        (folder / FILE).write_bytes(self._model)
