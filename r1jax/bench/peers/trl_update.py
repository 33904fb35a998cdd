"""One GRPO update by TRL's GRPOTrainer: `python trl_update.py SAMPLES.npz CHECKPOINT MICRO_BATCH THREADS`.

Runs in an interpreter with torch, transformers, trl and datasets. Only loss, backward pass and optimiser step are
timed: old and reference log-probs are part of the samples, in the form of TRL's own rollout (one batch padded to its
longest response, then cut into micro-batches). Prints a JSON object.
"""

import sys
import tempfile

import numpy as np
import torch
from datasets import Dataset
from figures import Stopwatch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def trainer_of(samples: dict, checkpoint: str, micro_batch: int, folder: str) -> GRPOTrainer:
    """Returns TRL's trainer in float32 with gradient checkpointing, its loss set to the measured one."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    number = len(samples["advantages"])
    arguments = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=number // micro_batch,
        num_generations=int(samples["group_size"]),
        max_completion_length=samples["response_ids"].shape[1],
        beta=float(samples["kl_coef"]),
        epsilon=float(samples["clip_ratio"]),
        loss_type="grpo",
        temperature=1.0,
        learning_rate=float(samples["learning_rate"]),
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=float(samples["clip_norm"]),
        report_to=[],
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * number}),
        processing_class=tokenizer,
    )


def inputs_of(samples: dict) -> dict[str, torch.Tensor]:
    """Returns the samples in the form of the inputs of TRL's `_compute_loss`."""
    lengths = torch.from_numpy(samples["lengths"])
    responses = torch.from_numpy(samples["response_ids"]).long()
    mask = (torch.arange(responses.shape[1])[None] < lengths[:, None]).long()
    prompts = torch.from_numpy(samples["prompt_ids"]).long()
    return dict(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts),
        completion_ids=responses,
        completion_mask=mask,
        advantages=torch.from_numpy(samples["advantages"]),
        old_per_token_logps=torch.from_numpy(samples["behaviour_logps"]),
        ref_per_token_logps=torch.from_numpy(samples["reference_logps"]),
        num_items_in_batch=mask.sum(),
    )


def main(path: str, checkpoint: str, micro_batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    samples, size = dict(np.load(path)), int(micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(samples, checkpoint, size, folder)
    inputs, number = inputs_of(samples), len(samples["advantages"])
    cut = lambda start: {k: v[start : start + size] if v.dim() else v for k, v in inputs.items()}  # noqa: E731
    trainer.create_optimizer()
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = number // size

    def backward(micro: dict) -> float:
        loss = trainer.compute_loss(model, micro)
        loss.backward()
        return float(loss.detach())

    warm = {k: v[:, :16] if k.startswith("completion") or k.endswith("logps") else v for k, v in cut(0).items()}
    backward(warm)
    model.zero_grad()
    stopwatch = Stopwatch()
    loss = sum(backward(cut(first)) for first in range(0, number, size))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float(samples["clip_norm"]))
    trainer.optimizer.step()
    model.zero_grad()
    stopwatch.report(loss, float(norm))


if __name__ == "__main__":
    main(*sys.argv[1:])
