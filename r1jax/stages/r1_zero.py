"""R1-Zero: GRPO with rule rewards straight from a base model."""

import sys
import time
from pathlib import Path

import jax.numpy as jnp

from r1jax import config as configs
from r1jax.core import checkpoint, tree
from r1jax.core.metrics import read
from r1jax.evals.behaviour import TINY_REFLECTIVE_WORDS, reflective_count
from r1jax.report import curves
from r1jax.rl.loop import PolicyTraining
from r1jax.sampler import jetstream
from r1jax.schema import Config
from r1jax.stages import common, evaluate, prompts, stage0_base
from r1jax.stages.progress import Progress

CURVES = ("accuracy", "length", "reflective_words")


def run(config: Config, workdir: Path) -> dict:
    """Trains, resuming where it was stopped, evaluates start and end on held-out problems and returns the figures."""
    folder = common.StageFolder(config, workdir)
    if (figures := folder.finished()) is not None:
        print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
        evaluate.print_figures(_rows(figures))
        return figures
    folder.check()
    resolved, tokenizer, mesh = common.prepare(config)
    train, held_out = (prompts.encode(split, resolved, tokenizer) for split in prompts.load(resolved))
    if notice := jetstream.notice():
        print(notice, file=sys.stderr)
    params = start_weights(resolved, mesh, workdir)
    started = time.monotonic()
    with Progress("R1-Zero", resolved.grpo.updates) as progress:

        def show(update: int, row: dict[str, float], timing: dict[str, float]) -> None:
            total = sum(value for name, value in timing.items() if name.endswith("_s") and "per" not in name)
            phases = ("rollout_s", "rewards_s", "reference_s", "update_s")
            split = {name.removesuffix("_s"): timing[name] / total for name in phases if name in timing and total}
            speed = {"tok/s": timing["rollout_tokens_per_s"]} if "rollout_tokens_per_s" in timing else {}
            shown = {name: row[name] for name in ("reward", "accuracy", "length", "reflective_words")}
            progress.update(update, **shown, **speed, **split)

        training = PolicyTraining(resolved, tokenizer, mesh, train, params, folder.path, show, describe)
        folder.start()
        trained = training.run()
    write_curves(folder.path)
    figures = {"seconds": round(time.monotonic() - started, 1), "updates": resolved.grpo.updates}
    figures["programs"] = training.programs.counts()
    if held_out:
        params = start_weights(resolved, mesh, workdir)
        before, _ = evaluate.evaluate(resolved, tokenizer, mesh, held_out, params)
        after, responses = evaluate.evaluate(resolved, tokenizer, mesh, held_out, trained)
        evaluate.write_samples(folder.path / "samples.jsonl", responses)
        figures |= {"base": before, "r1_zero": after, "ratios": ratios(before, after)}
        evaluate.print_figures(_rows(figures))
    checkpoint.write_json(folder.path / "figures.json", figures)
    return folder.finish(figures, {"start": resolved.model.checkpoint or "base"})


def describe(texts: list[str]) -> dict[str, float]:
    """Returns the behaviour figures of a rollout's texts."""
    counts = [reflective_count(text, TINY_REFLECTIVE_WORDS) for text in texts]
    return {"reflective_words": sum(counts) / max(len(counts), 1)}


def start_weights(config: Config, mesh, workdir: Path):
    """Returns the float32 weights RL starts from: config.model.checkpoint, else the tiny base of the preset."""

    def base():
        known = {entry.name: entry.presets for entry in configs.entries()}["stage0_base"]
        if config.preset not in known:
            raise ValueError(
                f"preset '{config.preset}' has no base model of its own; give the starting weights with "
                "--config.model.checkpoint=DIR (a Hugging Face folder)"
            )
        return stage0_base.base_params(config, configs.load(f"stage0_base:{config.preset}", []), mesh, workdir)

    params = common.load_weights(config, mesh, config.model.checkpoint, base)
    return tree.cast(params, jnp.float32)


def ratios(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns after / before of accuracy, length and reflective words."""
    names = {"pass@1": "pass@1", "mean_tokens": "length", "reflective_per_response": "reflective_words"}
    return {short: after[name] / before[name] if before[name] else float("inf") for name, short in names.items()}


def write_curves(folder: Path) -> None:
    """Writes curves.csv and curves.png: accuracy, length and reflective words per update."""
    rows = read(folder)
    curves.write_csv(rows, folder / "curves.csv", ("update", "reward", *CURVES))
    curves.plot(rows, folder / "curves.png")


def _rows(figures: dict) -> list[dict]:
    return [{"checkpoint": name, **figures[name]} for name in ("base", "r1_zero") if name in figures]
