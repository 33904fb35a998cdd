"""What an update does: the optimiser, auxiliary losses, and when the weights are stored."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked, above, at_least


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Optimiser with a schedule in updates. RL betas and clip are not given in the R1 paper: design decision."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: matrices inside the layers; AdamW takes all other parameters
    learning_rate: float = 3e-6  # R1 RL, P2 section 3.2.1
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1  # cosine ends at learning_rate * final_fraction
    warmup_updates: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False  # keep the moments in host memory between updates
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # master weights; bfloat16 freezes at small rates
    max_skipped_updates: int = 10  # a run ends after this many updates in a row without a finite gradient; 0: never
    muon_momentum: float = 0.95  # Muon's mu
    muon_update_rms: float = 0.2  # root mean square of Muon's updates over the rate: about AdamW's (arXiv 2502.16982)

    checks = (
        Check("max_skipped_updates", lambda c: c.max_skipped_updates >= 0, "must be 0 (no limit) or more"),
        Check("muon_momentum", lambda c: 0 <= c.muon_momentum < 1, "must be in [0, 1)"),
        *above(0, "muon_update_rms"),
    )


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Auxiliary losses and updates besides the stage's objective: the experts' balance and the prediction module."""

    router_bias_update_rate: float = 0.0  # gamma of the V3 report; 0 in RL (design decision)
    aux_loss_alpha: float = 0.0  # sequence-wise balance loss; V3 trained with 1e-4, config.json's 0.001 is not read
    mtp_loss_weight: float = 0.0  # lambda; V3 pretraining 0.3, then 0.1; not stated for SFT and RL, so 0
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"  # hidden state that feeds the module; not in the paper


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    every_updates: int = 20
    keep: int = 2  # of the newest
    keep_every: int = 0  # checkpoints at multiples of so many updates are kept for good; 0: none

    checks = (
        *at_least(1, "every_updates", "keep"),
        *at_least(0, "keep_every"),
        Check(
            "keep_every",
            lambda c: c.keep_every % c.every_updates == 0,
            "needs a multiple of every_updates={c.every_updates}: only then is there a checkpoint to keep",
        ),
    )
