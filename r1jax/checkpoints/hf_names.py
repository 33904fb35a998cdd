"""Tensor names of the published checkpoints: every leaf of decoder.Params, its tensors, and the transforms both ways.

A projection is stored [out, in] there and [in, heads, width] here. DeepSeek stores rotary dimensions as adjacent pairs;
here they are split in halves, so those rows are reordered on the way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from r1jax.core.sharding import ParamSpec
from r1jax.schema import ModelConfig

Array = np.ndarray
Change = Callable[[Array], Array]


@dataclass(frozen=True)
class Transform:
    """A checkpoint tensor to our layout and back, each the exact inverse of the other."""

    to_ours: Change
    to_hf: Change


@dataclass(frozen=True)
class LeafNames:
    """One leaf of decoder.Params and the tensors that it is made of.

    `name` holds {layer} for a leaf with a leading layer dimension and {expert} for one with experts behind it.
    """

    path: str  # attribute path in decoder.Params, joined by dots
    name: str
    transform: Transform
    first_layer: int = 0  # checkpoint number of the stack's first layer

    @property
    def stacked(self) -> int:
        """Leading dimensions of the leaf that choose a tensor."""
        return self.name.count("{")

    def tensor_name(self, place: tuple[int, ...]) -> str:
        """Returns the checkpoint's name of the tensor at a place in the leading dimensions."""
        layer, expert = (*place, 0, 0)[:2]
        return self.name.format(layer=self.first_layer + layer, expert=expert)

    def hf_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Returns the shape of each of the leaf's tensors in the checkpoint."""
        return self.transform.to_hf(np.broadcast_to(np.False_, spec.shape[self.stacked :])).shape


def _same(w: Array) -> Array:
    return w


def _transposed(w: Array) -> Array:
    return w.T


SAME, LINEAR = Transform(_same, _same), Transform(_transposed, _transposed)


def _into_heads(heads: int, width: int, order: Array | None = None) -> Transform:
    """[N * H, D] <-> [D, N, H]; `order` rearranges the rows of each head."""
    order = np.arange(width) if order is None else order
    back = np.argsort(order)
    return Transform(
        lambda w: w.reshape(heads, width, -1)[:, order].transpose(2, 0, 1),
        lambda w: w.transpose(1, 2, 0)[:, back].reshape(heads * width, -1),
    )


def _out_of_heads(heads: int, width: int) -> Transform:
    """[D, N * H] <-> [N, H, D]."""
    return Transform(lambda w: w.T.reshape(heads, width, -1), lambda w: w.reshape(heads * width, -1).T)


def _head_bias(heads: int, width: int) -> Transform:
    """[N * H] <-> [N, H]."""
    return Transform(lambda b: b.reshape(heads, width), lambda b: b.reshape(heads * width))


def half_split(before: int, rotary: int, interleaved: bool = True) -> Array:
    """Returns the row order of a half-split layout: `before` plain rows, then even and odd rotary rows.

    Source: the rotary rows of DeepSeek-V3's released modeling code, which turns (2j, 2j + 1) as one pair.
    """
    rows = np.arange(before + rotary)
    if not interleaved:
        return rows
    return np.concatenate([rows[:before], rows[before::2], rows[before + 1 :: 2]])


def _attention_rows(c: ModelConfig, interleaved: bool) -> Iterator[tuple[str, str, Transform]]:
    if c.is_mla:
        n, nope, turned, latent = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        order = half_split(latent, turned, interleaved)
        back = np.argsort(order)
        if c.q_lora_rank:
            yield "q_a", "q_a_proj.weight", LINEAR
            yield "q_a_norm", "q_a_layernorm.weight", SAME
        query = _into_heads(n, nope + turned, half_split(nope, turned, interleaved))
        yield "q_b", "q_b_proj.weight" if c.q_lora_rank else "q_proj.weight", query
        yield "kv_a", "kv_a_proj_with_mqa.weight", Transform(lambda w: w[order].T, lambda w: w.T[back])
        yield "kv_a_norm", "kv_a_layernorm.weight", SAME
        yield "kv_b", "kv_b_proj.weight", _into_heads(n, nope + c.v_head_dim)
        yield "out", "o_proj.weight", _out_of_heads(n, c.v_head_dim)
        return
    for ours, theirs, heads in (
        ("query", "q_proj", c.num_attention_heads),
        ("key", "k_proj", c.num_key_value_heads),
        ("value", "v_proj", c.num_key_value_heads),
    ):
        yield ours, f"{theirs}.weight", _into_heads(heads, c.head_dim)
        if c.attention_bias:
            yield f"{ours}_bias", f"{theirs}.bias", _head_bias(heads, c.head_dim)
    if c.qk_norm:
        yield "query_norm", "q_norm.weight", SAME
        yield "key_norm", "k_norm.weight", SAME
    yield "out", "o_proj.weight", _out_of_heads(c.num_attention_heads, c.head_dim)


def _swiglu_rows(ours: str, theirs: str) -> Iterator[tuple[str, str, Transform]]:
    for part in ("gate", "up", "down"):
        yield f"{ours}{part}", f"{theirs}{part}_proj.weight", LINEAR


def _block_rows(c: ModelConfig, sparse: bool, interleaved: bool) -> Iterator[tuple[str, str, Transform]]:
    """Yields (path in the block, name in the layer, transform)."""
    yield "attention_norm", "input_layernorm.weight", SAME
    yield "ffw_norm", "post_attention_layernorm.weight", SAME
    for ours, theirs, transform in _attention_rows(c, interleaved):
        yield f"attention.{ours}", f"self_attn.{theirs}", transform
    if not sparse:
        yield from _swiglu_rows("ffw.", "mlp.")
        return
    yield "ffw.router", "mlp.gate.weight", LINEAR
    if c.scoring_func == "sigmoid":  # a softmax router has no selection bias: ours stays zero
        yield "ffw.bias", "mlp.gate.e_score_correction_bias", SAME
    yield from _swiglu_rows("ffw.", "mlp.experts.{expert}.")
    if c.n_shared_experts:
        yield from _swiglu_rows("ffw.shared.", "mlp.shared_experts.")


MTP_ROWS = (
    ("embedding_norm", "enorm.weight", SAME),
    ("hidden_norm", "hnorm.weight", SAME),
    ("projection", "eh_proj.weight", LINEAR),
    ("final_norm", "shared_head.norm.weight", SAME),
)


def name_table(c: ModelConfig, interleaved: bool = True) -> tuple[LeafNames, ...]:
    """Returns the names of every leaf of decoder.Params that a checkpoint holds.

    It holds no scalar head, and no selection bias of a softmax router.

    `interleaved` is whether a DeepSeek checkpoint stores rotary dimensions as adjacent pairs (config.json's
    rope_interleave, true unless stated); the other families are half-split always.
    """
    entries = [LeafNames("embedding", "model.embed_tokens.weight", SAME)]
    stacks = (("dense", c.num_dense_layers, 0), ("sparse", c.num_moe_layers, c.num_dense_layers))
    for stack, layers, first in stacks:
        if layers:
            for ours, theirs, transform in _block_rows(c, stack == "sparse", interleaved):
                entries.append(LeafNames(f"{stack}.{ours}", "model.layers.{layer}." + theirs, transform, first))
    entries.append(LeafNames("final_norm", "model.norm.weight", SAME))
    if not c.tie_word_embeddings:
        entries.append(LeafNames("unembedding", "lm_head.weight", LINEAR))
    if c.num_nextn_predict_layers:
        block_rows = _block_rows(c, c.num_moe_layers > 0, interleaved)
        rows = [
            *MTP_ROWS,
            *((f"block.{ours}", theirs, transform) for ours, theirs, transform in block_rows),
        ]
        for ours, theirs, transform in rows:
            entries.append(LeafNames(f"mtp.{ours}", "model.layers.{layer}." + theirs, transform, c.num_hidden_layers))
    return tuple(entries)


def copies(c: ModelConfig) -> dict[str, str]:
    """Returns {tensor: the tensor that it repeats}: a prediction layer stores embedding and output matrix again."""
    if not c.num_nextn_predict_layers:
        return {}
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    layer = f"model.layers.{c.num_hidden_layers}"
    return {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight", f"{layer}.shared_head.head.weight": head}


def leaf_path(path: tuple) -> str:
    """Returns the dotted attribute path of a leaf, from a key path of jax.tree_util."""
    return ".".join(part.name for part in path)
