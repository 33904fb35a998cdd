"""Scores responses with a trained reward model: a decoder with a scalar head, whose score is that of the end token."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import expit

from r1jax.core import private_jax, sharding
from r1jax.core.sharding import use_mesh
from r1jax.data import templates
from r1jax.data.packing import PackedBatch, batches
from r1jax.models import decoder
from r1jax.schema import ModelConfig, Network, replace

Kind = Literal["helpful", "safety"]


@dataclass(frozen=True)
class TextFormat:
    """How a question and a response are written as the token ids that a reward model reads.

    `helpful` reads only the final summary, `safety` the whole response with its thinking (DeepSeek-R1, appendix B.3).
    """

    kind: Kind
    template: str  # as in data.templates.render
    instruction: str = ""
    prompt_tokens: int = 0  # read only the last N tokens of the question; 0 reads all
    response_tokens: int = 0  # read only the first N tokens of the judged text; 0 reads all

    def ids(self, question: str, response: str, tokenizer: Any) -> np.ndarray | None:
        """Returns token ids, int32 [n], the last one being the end token; None if there is no text to judge."""
        judged = templates.summary(response) if self.kind == "helpful" else response
        if self.kind == "helpful" and not judged:
            return None
        if self.prompt_tokens:
            question = tokenizer.decode_batch([tokenizer.encode(question)[-self.prompt_tokens :]])[0]
        text = templates.render(question, self.template, self.instruction, tokenizer.render_chat)
        prompt, judged = templates.split_turn(text, judged)
        cut = tokenizer.encode(judged)[: self.response_tokens or None]
        return np.asarray([*tokenizer.encode(prompt), *cut, tokenizer.eos_id], np.int32)


def architecture(network: Network) -> Network:
    """Returns the network of a reward model: a decoder's body with a scalar head, without an output matrix."""
    return replace(
        network,
        model=replace(network.model, tie_word_embeddings=True, num_nextn_predict_layers=0, checkpoint=""),
        auxiliary=replace(network.auxiliary, mtp_loss_weight=0.0),
        scalar_head=True,
    )


def from_decoder(params: decoder.Params, model: ModelConfig) -> decoder.Params:
    """Returns the weights of a decoder with a scalar head of zeros, so that every score is 0."""
    return dataclasses.replace(params, unembedding=None, mtp=None, scalar_head=np.zeros(model.hidden_size, np.float32))


class RewardModel:
    """Scores texts on a mesh with one compiled program, whatever their number and lengths."""

    def __init__(
        self,
        params: decoder.Params,
        network: Network,
        mesh: Mesh,
        text_format: TextFormat,
        tokenizer: Any,
        rows: int,
        row_tokens: int,
        center: float = 0.0,
    ):
        """`params` are on the mesh, in the compute dtype. A batch has `rows` rows of `row_tokens` tokens.

        `center` is the score for which `rewards` returns 1/2.
        """
        self.params, self.network, self.mesh, self.text_format, self.tokenizer = (
            params,
            network,
            mesh,
            text_format,
            tokenizer,
        )
        self.rows, self.row_tokens, self.center = rows, row_tokens, center

        @jax.named_scope("score")
        def score(params, tokens, positions, segments):
            return decoder.scalars(params, decoder.forward(params, tokens, positions, segments, network)[0])

        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def warm_up(self) -> None:
        """Compiles the program."""
        self.scores([np.zeros(1, np.int32)])

    def lower(self) -> jax.stages.Lowered:
        """Returns the program lowered without arrays; `params` may be structs with shardings."""
        place = sharding.sharding(self.mesh, ("batch", "sequence"), (self.rows, self.row_tokens))
        ids = jax.ShapeDtypeStruct((self.rows, self.row_tokens), np.int32, sharding=place)
        with use_mesh(self.mesh):
            return self._score.lower(self.params, ids, ids, ids)

    @property
    def compilations(self) -> int:
        """The number of programs compiled so far."""
        return private_jax.compilations(self._score)

    def scores(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the score of each sequence of ids at its last token, float32 [N].

        Of a sequence longer than a row only the end is read.
        """
        cut = [np.asarray(ids[-self.row_tokens :], np.int32) for ids in sequences]
        scores = np.zeros(len(cut), np.float32)
        for members, batch in batches(cut, self.row_tokens, self.rows):
            scores[members] = self._batch(batch)
        return scores

    def rewards(self, questions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns sigmoid(score - center) of each response, float32 [N] in [0, 1]; 0 where there is no text to judge.

        For a model trained on pairs this is the probability of winning against a response of score `center`, for a
        model trained on labels the probability of being safe.
        """
        read = [self.text_format.ids(*both, self.tokenizer) for both in zip(questions, responses, strict=True)]
        judged = {index: ids for index, ids in enumerate(read) if ids is not None}
        rewards = np.zeros(len(read), np.float32)
        scores = self.scores(list(judged.values())).astype(np.float64)
        rewards[list(judged)] = expit(scores - self.center)
        return rewards

    def _batch(self, batch: PackedBatch) -> list[float]:
        place = sharding.sharding(self.mesh, ("batch", "sequence"), batch.tokens.shape)
        arrays = [sharding.place(array, place) for array in (batch.tokens, batch.positions, batch.segments)]
        with use_mesh(self.mesh):
            scalars = np.asarray(self._score(self.params, *arrays))
        return [scalars[row, start + length - 1] for row, start, length in batch.slots]
