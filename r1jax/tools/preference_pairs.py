"""Makes preference pairs for the helpful reward model: a judge compares two replies to a prompt repeatedly (P2 B.2)."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts, sharding
from r1jax.core.say import say
from r1jax.data import files, jsonl, preferences
from r1jax.data.hashing import hash64
from r1jax.data.problems import Problem
from r1jax.data.prompts import keyed_permutation
from r1jax.recipe import common, judging, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rewards.models.judge import Judge, Judgement, Pair
from r1jax.rl import rollout
from r1jax.sampler.build import build_sampler, sampling_params
from r1jax.schema import Config, DataConfig, PreferenceConfig, parts_of


@dataclass(frozen=True)
class Asking(AskingParts):
    """What a model answers prompts with. `stage` and `seed` key every draw."""

    seed: int


def run(config: Config, workdir: Path) -> dict:
    """Writes the kept pairs {id, prompt, chosen, rejected, margin, judgements} of config.data.path to config.output.

    Rows are {id, prompt, responses: [text, ...]}; config.model answers those without responses. Returns the numbers of
    rows and of judged, kept and balanced pairs, the parse rate and the length bias. The output appears when it is
    complete; a stopped run continues where it was. Raises ValueError for a bad row, no judge, or when no pair is left.
    """
    judging.require_paths(config.stage, config.data, config.output)
    judging.require_judge(config.stage, config.judge)
    started, folder, settings = time.monotonic(), Path(workdir) / config.stage, config.preferences
    rows = read(config.data)
    key = judging.work_key(config, config.judge.checkpoint, config.model.checkpoint)
    mesh = sharding.make_mesh(config.mesh)
    if missing := [row for row in rows if not row["responses"]]:
        resolved, tokenizer, _ = common.prepare(config)
        answer = answerer(parts_of(Asking, resolved), settings.responses_per_prompt, tokenizer, mesh)
        answered = judging.in_parts(folder, f"{key}-answers", missing, answer, "answers")
        answered_by_id = {row["id"]: row for row in answered}
        rows = [answered_by_id.get(row["id"], row) for row in rows]
    judge = judging.load(config.stage, config.seed, config.judge, mesh)
    pairs = [vars(pair) for row in rows for pair in pairs_of(row, config.seed)]
    judged = judging.in_parts(
        folder, f"{key}-verdicts", pairs, lambda part: compare(judge, part, settings.judgements), "judgements"
    )
    kept = [pair for row in judged if (pair := labelled(row, settings))]
    balanced = preferences.balance_lengths(kept, config.seed) if settings.balance_lengths else kept
    figures = summary(rows, judged, kept, balanced) | {"seconds": round(time.monotonic() - started, 1)}
    say(json.dumps(figures))
    if not balanced:
        raise ValueError(
            f"{config.stage}: no pair is left of {len(judged)} ({len(kept)} before lengths were balanced, parse rate "
            f"{figures['parse_rate']:.3f}); give more rows, a better judge or a smaller config.preferences.min_margin"
        )
    hosts.decide(jsonl.write, config.output, balanced, name=config.output)
    judging.finish_parts(folder)
    return figures


def read(data: DataConfig) -> list[dict]:
    """Returns rows {id, prompt, responses}; `responses` are two or more distinct texts, or [] if the row has none.

    Raises ValueError with file and line for anything else and for an id given twice.
    """
    rows, seen = [], set()
    for file_row in files.read(data.path, data.columns, data.max_rows).rows:
        row, where = file_row.fields, file_row.place
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise ValueError(f"{where}: 'prompt' must be one text that is not empty")
        responses = row.get("responses") or []
        if not isinstance(responses, list) or not all(isinstance(text, str) and text.strip() for text in responses):
            raise ValueError(f"{where}: 'responses' must be a list of texts that are not empty")
        distinct = list(dict.fromkeys(responses))
        if len(distinct) == 1:
            raise ValueError(f"{where}: 'responses' holds one text, needs two different ones or none")
        if row["id"] in seen:
            raise ValueError(f"{where}: id {row['id']!r} was used before, needs its own")
        seen.add(row["id"])
        rows.append({"id": row["id"], "prompt": row["prompt"], "responses": distinct})
    return rows


def answerer(settings: Asking, count: int, tokenizer: Tokenizer, mesh: Mesh):
    """Returns a function that puts `count` replies of config.model into rows."""
    model = settings.network.model
    if not model.checkpoint:
        raise ValueError(
            f"{settings.stage}: rows of {settings.data.path} have no 'responses', and no model is given to write them; "
            "give --config.model.checkpoint=DIR"
        )
    params = common.load_weights(model, mesh, model.checkpoint)
    sampler = build_sampler(settings.network, settings.sampler, mesh, tokenizer)
    params = sampler.engine.load_params(params)
    sampling = sampling_params(settings.sampler, tokenizer.stop_ids)

    def answer(rows: list[dict]) -> list[dict]:
        problems = [Problem(row["id"], "", row["prompt"], "") for row in rows]
        encoded = prompts.encode(problems, settings, tokenizer)
        draws = [hash64("answers", prompt.problem.id) % 2**32 for prompt in encoded]
        requests = rollout.requests_for(encoded, draws, count, sampling, settings.seed, settings.stage, "sample")
        texts: dict[str, list[str]] = {row["id"]: [] for row in rows}
        samples = sampler.generate(requests, params)
        for prompt, sample in zip([p for p in encoded for _ in range(count)], samples, strict=True):
            text = prompt.prefill + tokenizer.decode(sample.token_ids)
            if not sample.truncated and text not in texts[prompt.problem.id]:
                texts[prompt.problem.id].append(text)
        return [row | {"responses": texts[row["id"]]} for row in rows]

    return answer


def pairs_of(row: dict, seed: int) -> list[Pair]:
    """Returns the replies of a row in pairs, in a keyed order; each reply is in one pair, an odd one is left out."""
    order = keyed_permutation(len(row["responses"]), hash64("pairs", seed, row["id"]))
    texts = [row["responses"][index] for index in order]
    return [
        Pair(f"{row['id']}/{number}", row["prompt"], *texts[2 * number : 2 * number + 2])
        for number in range(len(texts) // 2)
    ]


def compare(judge: Judge, rows: Sequence[dict], judgements: int) -> list[dict]:
    """Returns the rows of pairs, each with its `judgements`."""
    judgements_of_pairs = judge.compare([Pair(**row) for row in rows], judgements)
    return [
        row | {"judgements": list(map(vars, pair_judgements))}
        for row, pair_judgements in zip(rows, judgements_of_pairs, strict=True)
    ]


def labelled(row: dict, settings: PreferenceConfig) -> dict | None:
    """Returns the pair as chosen and rejected, or None if its mean margin is at most config.preferences.min_margin."""
    margins = [judgement["margin"] for judgement in row["judgements"]]
    margin = preferences.mean_margin(margins, settings.min_readable)
    if margin is None or abs(margin) <= settings.min_margin:
        return None
    chosen, rejected = (row["first"], row["second"]) if margin > 0 else (row["second"], row["first"])
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "margin": abs(margin),
        "judgements": row["judgements"],
    }


def summary(rows: list[dict], judged: list[dict], kept: list[dict], balanced: list[dict]) -> dict:
    """Returns the figures of a run; `shown_first_preferred` is 0.5 for a judge without position bias."""
    judgements = [Judgement(**judgement) for row in judged for judgement in row["judgements"]]
    margins = [(-j.margin if j.swapped else j.margin) for j in judgements if j.margin is not None]
    readable = max(len(margins), 1)
    return {
        "rows": len(rows),
        "pairs": len(judged),
        "judgements": len(judgements),
        "parse_rate": len(margins) / max(len(judgements), 1),
        "shown_first_preferred": sum((m > 0) + 0.5 * (m == 0) for m in margins) / readable,
        "kept": len(kept),
        "balanced": len(balanced),
        **{f"kept_{name}": value for name, value in preferences.length_bias(kept).items()},
        **{f"balanced_{name}": value for name, value in preferences.length_bias(balanced).items()},
    }
