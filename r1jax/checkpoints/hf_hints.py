"""Diagnoses of a folder's tensor names, where a list of missing and unexpected ones would not explain the fault."""

import re
from collections.abc import Collection

HEAD = "lm_head.weight"
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile and of FSDP
BODY = "model."  # what the names of every supported family begin with, but for the head's
_FIRST = ("embed_tokens.weight", "layers.0.input_layernorm.weight")  # of every supported family, without BODY
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector)\b")
_FUSED = re.compile(r"\.mlp\.experts\.[a-z]\w*(\.(weight|bias))?$")
_FACTOR = re.compile(r"_scale(_inv)?$")


def misnamed(names: Collection[str]) -> str:
    """Returns one clause about names that are not those of a published checkpoint as a whole, '' when they are."""
    if adapters := [name for name in names if _ADAPTER.search(name)]:
        return f"{adapters[0]} belongs to an adapter; merge the adapter into its model and save that"
    for wrapper in WRAPPERS:
        if held := [name for name in names if wrapper in name]:
            return _prefixed(names, wrapper, held)
    begins = {name.removesuffix(first) for first in _FIRST for name in names if name.endswith(first)}
    if not begins or BODY in begins:
        return ""
    begin = min(begins, key=len)
    if not begin:
        return f"no name begins with {BODY}: this is the body of a model; save the whole model with its output matrix"
    if begin.endswith(f".{BODY}"):
        prefix = begin.removesuffix(BODY)
        return _prefixed(names, prefix, [name for name in names if name.startswith(prefix)])
    return f"names begin with {begin} where {BODY} must stand; save the language model alone"


def _prefixed(names: Collection[str], prefix: str, held: list[str]) -> str:
    if all(name.startswith(prefix) for name in names):
        return f"all names begin with {prefix}; save the model without it"
    return f"{len(held)} of {len(names)} names hold {prefix}, first {held[0]}; save the model without it"


def fused(names: Collection[str]) -> str:
    """Returns one clause about experts that share a tensor, '' when there are none."""
    for name in names:
        if _FUSED.search(name):
            return (
                f"{name}: fused experts are not read; store gate_proj, up_proj and down_proj of every expert apart, as "
                "save_pretrained of transformers does"
            )
    return ""


def remedies(stored: Collection[str], wanted: Collection[str], tie: str, beside: str) -> str:
    """Returns advice on missing and unexpected tensors, as clauses of one line; '' when there is none.

    `tie` is the state of tie_word_embeddings in config.json, as text; `beside` names an index that was ignored, or is
    ''.
    """
    clauses = []
    if HEAD in wanted and HEAD not in stored:
        clauses.append(
            f"without {HEAD} the embedding is the output matrix: set tie_word_embeddings to true in config.json ({tie})"
        )
    if factors := [name for name in stored if _FACTOR.search(name) and name not in wanted]:
        clauses.append(
            f"{len(factors)} tensors such as {factors[0]} are factors of FP8 matrices, which are not FP8 here: if the "
            "matrices were multiplied by them, remove the factors from the folder, else cast the FP8 folder again"
        )
    if beside:
        clauses.append(f"{beside} was left aside, as by transformers; remove whichever of the two is out of date")
    return "".join(f"; {clause}" for clause in clauses)
