"""The fields in which the sizes for two CPU cores differ from the recipe: stage -> {field: value}.

`tiny` (with its student `tiny_dense`) learns in minutes, so it takes higher rates, smaller batches and fewer updates;
`smollm2_135m` is there to be tried, with a handful of updates at the paper's rates.
"""

_SAMPLED = {"evaluation.temperature": 1.0, "evaluation.top_p": 1.0, "evaluation.greedy": True}


def _rl(updates: int, rate: float) -> dict:
    """Returns an RL stage of the tiny world: 16 prompts an update, 2 updates a rollout, the format worth a fifth."""
    return _SAMPLED | {
        "optimizer.learning_rate": rate,
        "reward.format": 0.2,
        "grpo.prompts_per_update": 16,
        "grpo.updates_per_rollout": 2,
        "grpo.updates": updates,
        "grpo.reference_refresh_updates": 40,
        "checkpointing.every_updates": 20,
    }


def _reward_model(epochs: int, samples: int) -> dict:
    """Returns a reward model of the tiny world, which draws and ranks its examples itself, from Dev3."""
    return {
        "start": "stage3_rejection_sft",
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_updates": 5,
        "data.holdout_fraction": 0.2,
        "pack.row_tokens": 96,
        "pack.rows_per_micro_batch": 8,
        "checkpointing.every_updates": 20,
        "reward_model.epochs": epochs,
        "reward_model.examples_per_update": 32,
        "reward_model.samples_per_prompt": samples,
    }


_TINY_SFT = _SAMPLED | {
    "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_updates": 5,
    "sft.epochs": 3,
    "sft.examples_per_update": 48,
}
_TINY_COLDSTART = _TINY_SFT | {
    "coldstart.prompts": 1600,
    "coldstart.max_examples": 2400,
    "coldstart.min_language_consistency": 1.0,
}
TINY = {
    "r1_zero": _rl(120, 3e-4),
    "ppo_baseline": _rl(120, 3e-4) | {"ppo.critic_learning_rate": 1e-3},
    "stage1_coldstart": _TINY_COLDSTART,
    # Half of R1-Zero's rate here and a third in stage 4, where the paper keeps it: at the full rate this size loses
    # accuracy at temperature 1.
    "stage2_reasoning_rl": _rl(60, 1.5e-4) | {"reward.language": 0.2},
    "stage3_rejection_sft": _TINY_SFT
    | {
        "sft.epochs": 2,
        "rejection.prompts": 3000,
        "rejection.samples_per_prompt": 4,
        "rejection.max_examples_per_prompt": 2,
        "rejection.min_language_consistency": 1.0,
        "checkpointing.every_updates": 20,
    },
    # The last third has the other prompts, where the paper has the last 400 of 1,700.
    "stage4_all_scenarios": _rl(60, 1e-4) | {"reward.language": 0.2, "scenarios.from_update": 40},
    "reward_helpful": _reward_model(epochs=6, samples=16),
    "reward_safety": _reward_model(epochs=10, samples=8),  # six times the prompts
    "distill": _TINY_COLDSTART | {"reward.extraction": "auto", "checkpointing.every_updates": 20},
    "student_rl": _rl(46, 3e-4),  # as much compute as three epochs of distillation
    "evaluate": _SAMPLED | {"evaluation.samples_per_problem": 5},
    "r1": _SAMPLED
    | {
        "evaluation.samples_per_problem": 4,
        "evaluation.consensus_problems": 96,
        "evaluation.consensus_samples": 16,
    },
}

_FEW = _SAMPLED | {"evaluation.max_problems": 16}
_FEW_RL = _FEW | {
    "reward.format": 0.0,
    "grpo.group_size": 8,
    "grpo.prompts_per_update": 4,
    "grpo.updates_per_rollout": 1,
    "grpo.updates": 5,
    "checkpointing.every_updates": 5,
}
_FEW_SFT = _FEW | {"sft.examples_per_update": 8, "checkpointing.every_updates": 20}
_FEW_PAIRS = {
    "optimizer.learning_rate": 3e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_updates": 5,
    "data.holdout_fraction": 0.25,
    "data.template": "plain",
    "pack.row_tokens": 384,
    "pack.rows_per_micro_batch": 4,
    "checkpointing.every_updates": 20,
    "reward_model.epochs": 2,
    "reward_model.examples_per_update": 32,
    "reward_model.frozen_blocks": 28,
    "reward_model.prompt_tokens": 64,
    "reward_model.response_tokens": 128,
}
SMOLLM2 = {
    "r1_zero": _FEW_RL,
    "ppo_baseline": _FEW_RL,
    "stage1_coldstart": _FEW_SFT | {"coldstart.prompts": 32, "coldstart.max_examples": 64},
    "stage2_reasoning_rl": _FEW_RL,
    "stage3_rejection_sft": _FEW_SFT
    | {
        "rejection.prompts": 32,
        "rejection.samples_per_prompt": 4,
        "rejection.max_examples_per_prompt": 2,
    },
    "stage4_all_scenarios": _FEW_RL | {"scenarios.from_update": 3},
    "reward_helpful": _FEW_PAIRS,
    "reward_safety": _FEW_PAIRS,
    "distill": _FEW_SFT | {"reward.extraction": "auto"},
    "student_rl": _FEW_RL,
    "evaluate": _SAMPLED | {"evaluation.samples_per_problem": 5},
    "r1": _FEW | {"evaluation.samples_per_problem": 4, "evaluation.consensus_problems": 0},
}
