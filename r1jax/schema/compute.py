"""How a model is run: devices, precision, kernels and the shapes of rows."""

import math
from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked, above, at_least
from r1jax.schema.model import ModelConfig
from r1jax.schema.optim import AuxiliaryConfig

ROW_AXES = ("slice", "data", "fsdp", "expert")  # axes of a mesh that divide rows; `context` divides slots as well


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Sizes of the mesh axes; their product is the number of devices used."""

    slice: int = 1  # TPU slices joined by the data-centre network: data parallel
    data: int = 1  # data parallel within a slice
    fsdp: int = 1  # data parallel with sharded weights and optimiser state
    expert: int = 1  # data parallel for the dense layers; experts are sharded over fsdp and expert together
    tensor: int = 1  # heads, feed-forward width and vocabulary
    context: int = 1  # tokens of a row; attention passes keys around a ring

    checks = at_least(1, "slice", "data", "fsdp", "expert", "tensor", "context")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.slice, self.data, self.fsdp, self.expert, self.tensor, self.context)

    @property
    def row_devices(self) -> int:
        """Devices over which rows are divided."""
        return math.prod(getattr(self, axis) for axis in ROW_AXES)

    @property
    def slot_devices(self) -> int:
        """Devices over which the sampler's slots are divided."""
        return self.row_devices * self.context


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """How a forward pass is computed. No field changes the set of a model's weights."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True  # False unrolls the depth: quicker to run when shallow, slower to compile when deep
    remat: bool = False  # recompute each block in the backward pass
    remat_policy: Literal["nothing", "dots_no_batch", "dots"] = (
        "nothing"  # what a recomputed block stores: nothing, its products with weights, or attention's products too
    )
    attention_implementation: Literal["auto", "xla", "flash"] = (
        "auto"  # over whole rows, and MLA's decode steps: XLA's operations or the Pallas kernels (auto: on a TPU)
    )
    attention_block: int = (
        0  # XLA, GQA without a cache: size of blocks of keys, so that other samples' are skipped; 0: all at once
    )
    logprob_implementation: Literal["auto", "xla", "pallas"] = (
        "auto"  # log-probs: XLA's tiles or the Pallas kernels (auto: on a TPU the kernel forward, XLA backward)
    )
    moe_implementation: Literal["auto", "dense", "blocked", "ragged"] = "auto"
    moe_dispatch: Literal["auto", "gathered", "routed"] = (
        "auto"  # tokens are sent to all devices of an expert group, or only to those of their experts (TPU)
    )
    moe_buffer_factor: float = (
        1.5  # rows a device takes at once, relative to an even share; a device with more takes several rounds
    )
    vocab_used: int = 0  # leading rows of the vocabulary that are sampled and normalised over, the real tokens; 0: all

    checks = (
        Check(
            "remat_policy",
            lambda c: c.remat or c.remat_policy == "nothing",
            "needs remat=true: without it every activation is kept",
        ),
        *above(0, "moe_buffer_factor"),
    )


@dataclass(frozen=True)
class PackConfig(Checked):
    """Shapes of packed training rows; one program serves any number of filled micro-batches."""

    row_tokens: int = 96
    rows_per_micro_batch: int = 32
    shared_prompts: bool = False  # RL: the samples of one prompt in a row share one copy of the prompt
    trained_chunk: int = 0  # one device: compute logits of trained positions only, this many at a time; 0: of all

    checks = (*at_least(1, "row_tokens", "rows_per_micro_batch"), *at_least(0, "trained_chunk"))


NETWORK_CHECKS = (  # of the fields that a Network and a Config have in common
    Check(
        "auxiliary.router_bias_update_rate",
        lambda c: (
            not c.auxiliary.router_bias_update_rate or not c.model.n_routed_experts or c.model.scoring_func == "sigmoid"
        ),
        "needs model.scoring_func=sigmoid: softmax routers have no selection bias",
    ),
    Check(
        "auxiliary.mtp_loss_weight",
        lambda c: not c.auxiliary.mtp_loss_weight or c.model.num_nextn_predict_layers > 0,
        "needs model.num_nextn_predict_layers=1",
    ),
    Check(
        "compute.vocab_used",
        lambda c: 0 <= c.compute.vocab_used <= c.model.vocab_size,
        "must be between 0 (all) and model.vocab_size={c.model.vocab_size}",
    ),
)


@dataclass(frozen=True)
class Network(Checked):
    """A model and how it is run: all that a forward pass, a trainer or a sampler needs of the config."""

    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    scalar_head: bool = False  # a reward model or a critic: adds weights [hidden_size] that give one number a token

    checks = NETWORK_CHECKS
