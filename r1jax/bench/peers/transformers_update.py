"""One SFT update by a plain transformers loop; the arguments are those of `trl_update.py`.

Runs in an interpreter with torch and transformers. Each micro-batch, samples in the order of their length, is padded to
its own longest; gradient checkpointing is on; the loss is the model's own, rescaled to a mean over all trained tokens.
"""

import sys

import numpy as np
import torch
from figures import Stopwatch
from transformers import AutoModelForCausalLM


def main(path: str, checkpoint: str, micro_batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    samples, size = dict(np.load(path)), int(micro_batch)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=float(samples["learning_rate"]), betas=(0.9, 0.95), weight_decay=0.0
    )
    order, trained = np.argsort(-samples["lengths"], kind="stable"), int(samples["lengths"].sum())

    def backward(chosen: np.ndarray, longest: int) -> float:
        lengths = torch.from_numpy(samples["lengths"][chosen]).clamp(max=longest)
        responses = torch.from_numpy(samples["response_ids"][chosen, :longest]).long()
        mask = torch.arange(longest)[None] < lengths[:, None]
        prompts = torch.from_numpy(samples["prompt_ids"][chosen]).long()
        labels = torch.cat([torch.full_like(prompts, -100), responses.masked_fill(~mask, -100)], 1)
        attention = torch.cat([torch.ones_like(prompts), mask.long()], 1)
        ids = torch.cat([prompts, responses], 1)
        loss = model(input_ids=ids, attention_mask=attention, labels=labels, num_items_in_batch=trained).loss
        loss.backward()
        return float(loss.detach())

    backward(order[:size], 16)
    model.zero_grad()
    stopwatch = Stopwatch()
    cuts = [order[first : first + size] for first in range(0, len(order), size)]
    loss = sum(backward(chosen, int(samples["lengths"][chosen].max())) for chosen in cuts)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float(samples["clip_norm"]))
    optimizer.step()
    stopwatch.report(loss, float(norm))


if __name__ == "__main__":
    main(*sys.argv[1:])
