"""What a trained reward model says of responses: a decoder with a scalar head, read at the end token of the turn."""

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
class Reading:
    """How a question and a response become the ids that a reward model reads.

    helpful reads the final summary alone, safety the whole response with its thinking (DeepSeek-R1, appendix B.3).
    """

    kind: Kind
    template: str  # as in data.templates.render
    instruction: str = ""
    prompt_tokens: int = 0  # so many last tokens of the question, 0 is all
    response_tokens: int = 0  # so many first tokens of what is judged, 0 is all

    def ids(self, question: str, response: str, tokenizer: Any) -> np.ndarray | None:
        """Returns int32 [n], ending in the end token; None where the kind finds nothing to judge in the response."""
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
    """Returns the reward model that starts from a decoder: its body and a scalar head, no output matrix."""
    return replace(
        network,
        model=replace(network.model, tie_word_embeddings=True, num_nextn_predict_layers=0, checkpoint=""),
        auxiliary=replace(network.auxiliary, mtp_loss_weight=0.0),
        scalar_head=True,
    )


def from_decoder(params: decoder.Params, model: ModelConfig) -> decoder.Params:
    """Returns the weights of a decoder as a reward model that says 0 of everything."""
    return dataclasses.replace(params, unembedding=None, mtp=None, scalar_head=np.zeros(model.hidden_size, np.float32))


class RewardModel:
    """Scores batches of texts on a mesh; one program, whatever their number and length."""

    def __init__(
        self,
        params: decoder.Params,
        network: Network,
        mesh: Mesh,
        reading: Reading,
        tokenizer: Any,
        rows: int,
        row_tokens: int,
        center: float = 0.0,
    ):
        """`params` lie on the mesh in the dtype they compute in; a batch has `rows` rows of `row_tokens` tokens.

        `center` is the score to which `rewards` gives 1/2.
        """
        self.params, self.network, self.mesh, self.reading, self.tokenizer = params, network, mesh, reading, tokenizer
        self.rows, self.row_tokens, self.center = rows, row_tokens, center

        def score(params, tokens, positions, segments):
            return decoder.scalars(params, decoder.forward(params, tokens, positions, segments, network)[0])

        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def warm_up(self) -> None:
        """Compiles the program."""
        self.scores([np.zeros(1, np.int32)])

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return private_jax.compilations(self._score)

    def scores(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the score of each sequence of ids, read at its last token, float32 [N].

        A sequence longer than a row loses its beginning.
        """
        cut = [np.asarray(ids[-self.row_tokens :], np.int32) for ids in sequences]
        found = np.zeros(len(cut), np.float32)
        for members, batch in batches(cut, self.row_tokens, self.rows):
            found[members] = self._batch(batch)
        return found

    def rewards(self, questions: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Returns sigmoid(score - center) of each response, float32 [N] in [0, 1]; 0 where there is nothing to judge.

        For pairs that is the chance to win against a response of score `center`, for labels that of being safe.
        """
        read = [self.reading.ids(*both, self.tokenizer) for both in zip(questions, responses, strict=True)]
        judged = {index: ids for index, ids in enumerate(read) if ids is not None}
        found = np.zeros(len(read), np.float32)
        scores = self.scores(list(judged.values())).astype(np.float64)
        found[list(judged)] = expit(scores - self.center)
        return found

    def _batch(self, batch: PackedBatch) -> list[float]:
        place = sharding.sharding(self.mesh, ("batch", "sequence"), batch.tokens.shape)
        arrays = [sharding.place(array, place) for array in (batch.tokens, batch.positions, batch.segments)]
        with use_mesh(self.mesh):
            scalars = np.asarray(self._score(self.params, *arrays))
        return [scalars[row, start + length - 1] for row, start, length in batch.slots]
