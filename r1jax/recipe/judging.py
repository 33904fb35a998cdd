"""What stages with a judge share: loading it, grading by it, and work on many rows that survives a stop."""

import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from r1jax.checkpoints import hf
from r1jax.config import config_hash
from r1jax.core import hosts, remote
from r1jax.data import jsonl
from r1jax.recipe import common, problems
from r1jax.recipe.progress import Progress
from r1jax.rewards import compose
from r1jax.rewards.models.judge import Judge
from r1jax.rewards.score import RewardRequest, Score
from r1jax.sampler.build import build_sampler
from r1jax.schema import ComputeConfig, Config, DataConfig, JudgeConfig, Network, RewardConfig, replace

ROWS_PER_PART = 64  # rows that a stopped run loses at most


def require_judge(stage: str, judge: JudgeConfig) -> None:
    """Raises ValueError when config.judge.checkpoint is no Hugging Face folder."""
    folder = judge.checkpoint
    if not folder or not common.is_hugging_face(folder):
        raise ValueError(
            f"{stage}: config.judge.checkpoint={folder!r} is no Hugging Face folder; give the judge's with "
            "--config.judge.checkpoint=DIR (export_hf makes one of a stage's folder)"
        )


def editor_inputs(stage: str, judge: JudgeConfig, editor: str) -> dict[str, str]:
    """Returns {folder: digest} of the editing model `judge`; {} without an editor. ValueError as `require_judge`."""
    if not editor:
        return {}
    require_judge(stage, judge)
    return {judge.checkpoint: common.checkpoint_digest(judge.checkpoint)}


def load(stage: str, seed: int, judge: JudgeConfig, mesh: Mesh) -> Judge:
    """Returns the judge of config.judge.checkpoint. Raises ValueError as `require_judge`."""
    require_judge(stage, judge)
    model, tokenizer = common.read_hugging_face(judge.checkpoint)
    compute = ComputeConfig(compute_dtype=judge.compute_dtype)
    compute, tokenizer = common.fit_to_tokenizer(compute, model, tokenizer, judge.sampler.stop_ids)
    sampler = build_sampler(Network(model, compute), judge.sampler, mesh, tokenizer)
    params = sampler.engine.load_params(hf.load(judge.checkpoint, model, mesh, jnp.dtype(compute.compute_dtype)))
    return Judge(sampler, params, tokenizer, "chat" if tokenizer.chat_template else "plain", seed)


class JudgePool:
    """A RewardPool's `score` whose accuracy part is a judge's verdict; the judge is loaded when first asked."""

    together = True  # the judge runs on the devices of all processes

    def __init__(self, stage: str, seed: int, judge: JudgeConfig, reward: RewardConfig, mesh: Mesh):
        self._reward = reward
        self._load = functools.partial(load, stage, seed, judge, mesh)
        self._judge: Judge | None = None

    def __enter__(self) -> "JudgePool":
        return self

    def __exit__(self, *exception) -> None:
        self._judge = None

    @property
    def batch_deadline_s(self) -> float:
        return self._reward.batch_deadline_s

    @property
    def parse_rate(self) -> float:
        """Returns the share of verdicts that could be read."""
        return self._judge.counts.parse_rate if self._judge else 1.0

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns one Score per request, in order; a request that the judge cannot decide is unscorable."""
        self._judge = self._judge or self._load()
        verdicts = self._judge.accuracy(requests)
        pairs = zip(requests, verdicts, strict=True)
        return [compose.compose(request, self._reward, verdict) for request, verdict in pairs]


def work_key(config: Config, *models: str) -> str:
    """Returns a digest of the inputs of work on the rows of config.data.path: settings, rows and models.

    `models` are folders of checkpoints, "" for none.
    """
    made_from = list(problems.file_digests([config.data.path]).values())
    made_from += [common.checkpoint_digest(folder) if folder else "" for folder in models]
    settings = config_hash(replace(config, output=""), remote.shown)
    return settings[:16] + hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def in_parts(
    folder: Path,
    key: str,
    rows: Sequence[dict],
    work: Callable[[list[dict]], list[dict]],
    title: str,
    size: int = 0,
) -> list[dict]:
    """Returns the results of `work` on the rows, `size` (or ROWS_PER_PART) at a time, one result a row, in order.

    Each part is a file in `folder` until `finish_parts`; a part of an earlier run with the same `key` is read instead
    of made again. Of several processes all do the work together and process 0 writes. Until `finish_parts` no other run
    can work there: it raises ValueError, naming the process that does.
    """
    common.hold(folder)
    parts_folder = folder / f"parts-{key}"
    results: list[dict] = []
    size = size or ROWS_PER_PART
    with Progress(title, len(rows)) as progress:
        for number, start in enumerate(range(0, len(rows), size)):
            path = parts_folder / f"{number:06d}.jsonl"
            if not hosts.decide(path.exists, name=str(path)):
                hosts.decide(jsonl.write, path, work(list(rows[start : start + size])), name=str(path))
            results += jsonl.read(path)
            progress.update(len(results))
    return results


def finish_parts(folder: Path) -> None:
    """Removes the parts of all keys, whose content is then in the stage's output."""
    for parts_folder in folder.glob("parts-*") if hosts.is_writer() else ():
        shutil.rmtree(parts_folder)
    common.release(folder)


def require_paths(stage: str, data: DataConfig, output: str) -> None:
    """Raises ValueError if config.data.path or config.output is empty."""
    for name, value in (("data.path", data.path), ("output", output)):
        if not value:
            raise ValueError(
                f"{stage}: --config.{name} is empty; it needs --config.data.path=IN.jsonl and --config.output=OUT.jsonl"
            )
