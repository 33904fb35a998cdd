"""Stage 1, cold start: SFT of the base on good traces that were edited and checked again, for readable reasoning."""

import dataclasses
import itertools
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts
from r1jax.core.say import say
from r1jax.data import rewrite, tasks
from r1jax.recipe import (
    common,
    editing,
    example_files,
    fine_tuning,
    judging,
    lineage,
    parts,
    problems,
    review,
    teachers,
    traces,
)
from r1jax.recipe.drafts import Counts, Draft, counts_line, grade, tally
from r1jax.recipe.parts import SamplingParts
from r1jax.rewards.models.judge import Judge
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import Score
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import ColdStartConfig, Config, DataConfig, JudgeConfig, RewardConfig, parts_of

TEACHER = "r1_zero"
PEOPLE = "people"
CHANGED = "answers that the edit changed"


@dataclasses.dataclass(frozen=True, eq=False)
class Making:
    """What this stage's examples are made from, and how."""

    sampling: SamplingParts
    coldstart: ColdStartConfig
    judge: JudgeConfig
    tokenizer: Tokenizer  # of the stage's base
    mesh: Mesh
    train: list[EncodedPrompt]
    teacher: Path | None  # folder of the model of source r1_zero, None without that source
    base: lineage.Base


def run(config: Config, workdir: Path) -> dict:
    """Makes the examples (after R1-Zero, if that is missing and can be made), fine-tunes the base on them and
    evaluates.

    If config.coldstart.review waits for verdicts, it prints that and returns {"awaits": that file}.
    """
    settings = config.coldstart
    made_here = TEACHER in settings.sources and not settings.teacher
    try:
        return fine_tuning.run(
            config,
            workdir,
            (TEACHER,) if made_here else (),
            collect,
            inputs(config.stage, config.coldstart, config.judge),
        )
    except review.Awaited as wait:
        say(str(wait))
        return {"awaits": settings.review}


def inputs(stage: str, coldstart: ColdStartConfig, judge: JudgeConfig) -> dict[str, str]:
    """Returns {model or file: digest} of those that config.coldstart names; ValueError for a missing one."""
    digests = {}
    prompted = {"few_shot", "direct"} & {*coldstart.sources}
    for folder, used in ((coldstart.teacher, TEACHER in coldstart.sources), (coldstart.prompted_model, prompted)):
        if folder and used:
            digests[folder] = common.checkpoint_digest(folder)
    if coldstart.examples:
        digests |= problems.file_digests([coldstart.examples])
    return digests | judging.editor_inputs(stage, judge, coldstart.editor) | review.inputs(coldstart.review)


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counts]:
    """Returns (examples with their provenance, how many of each task passed every check) (P2 B.3.2)."""
    settings = config.coldstart
    folder = common.StageFolder(config, workdir)
    kept = review.kept(folder, settings) if settings.review else None
    if kept is not None:
        drafts, counts = kept
    else:
        teacher = None
        if TEACHER in settings.sources:
            teacher = Path(settings.teacher) if settings.teacher else lineage.require(TEACHER, config, workdir)
        sampling, base = parts_of(parts.SamplingParts, config), lineage.base(config, mesh, workdir)
        drafts, counts = _make(Making(sampling, settings, config.judge, tokenizer, mesh, train, teacher, base))
    if settings.review and drafts:
        if not hosts.decide(Path(settings.review).exists, name=settings.review):
            review.ask(drafts, counts, folder, settings)
        drafts = _right_again(
            review.apply(drafts, config.stage, config.coldstart, counts),
            config.reward,
            config.coldstart,
            counts,
            "right after review",
        )
    say(counts_line(config.stage, counts))
    return [draft.row() for draft in drafts], counts


def _make(making: Making) -> tuple[list[Draft], Counts]:
    """Returns (drafts of all sources, edited, right and capped; counts)."""
    settings, reward, counts = making.coldstart, making.sampling.reward, {}
    by_source = []
    for source in settings.sources:
        if source == PEOPLE:
            by_source.append(people(making.sampling.data, reward, settings, counts))
        else:
            by_source.append(_sampled(source, making, counts))
    editor = None
    if settings.editor and any(by_source):
        editor = judging.load(making.sampling.stage, making.sampling.seed, making.judge, making.mesh)
    drafts = [draft for source_drafts in by_source for draft in _edited(source_drafts, editor, making, counts)]
    tally(counts, "rewritten", (draft.task for draft in drafts))
    drafts = _right_again(drafts, reward, settings, counts, "right again", edited=bool(settings.editor))
    drafts = traces.capped(drafts, settings.max_examples_per_prompt, settings.max_examples, Draft.row)
    tally(counts, "kept", (draft.task for draft in drafts))
    return drafts, counts


def people(data: DataConfig, reward: RewardConfig, coldstart: ColdStartConfig, counts: Counts) -> list[Draft]:
    """Returns the rows of config.coldstart.examples, without those that their task's grader finds wrong."""
    rows = example_files.ExampleFile(coldstart.examples, data, reward)
    say(*rows.remarks)
    drafts = list(rows)
    tally(counts, "rows of people", (draft.task for draft in drafts))
    with RewardPool(reward) as pool:
        kept = example_files.right(drafts, pool, counts)
    return [
        dataclasses.replace(draft, provenance={"source": PEOPLE} | draft.provenance | {"edited": False})
        for draft in kept
    ]


def _sampled(source: str, making: Making, counts: Counts) -> list[Draft]:
    """Returns the good traces of one source, before any edit."""
    settings, sampling, mesh, train = making.coldstart, making.sampling, making.mesh, making.train
    if source == TEACHER:
        assert making.teacher is not None  # this source has one
        teacher = teachers.load(sampling, mesh, making.teacher, TEACHER)
        responses = teachers.sampled(
            teacher, mesh, train, settings.prompts, settings.samples_per_prompt, temperature=1.0
        )
    else:
        teacher = teachers.prompted(sampling, settings.prompted_model, making.tokenizer, mesh, making.base)
        examples = _worked(sampling.data, sampling.reward, settings) if source == "few_shot" else []
        responses = teachers.answered(teacher, settings, mesh, train, source, examples)
    checks = traces.basic_checks(settings.min_language_consistency)
    if settings.editor:  # the editor translates, so the language is checked after it
        checks = [check for check in checks if check[0] != traces.ONE_LANGUAGE]
    samples = settings.samples_per_prompt
    return [
        Draft(response.problem, response.text, {"source": source} | provenance | {"edited": False})
        for number, response in traces.passing(responses, checks, counts)
        for provenance in [traces.source(teacher.name, number, samples, response.text)]
    ]


def _worked(data: DataConfig, reward: RewardConfig, coldstart: ColdStartConfig) -> list[tuple[str, str]]:
    """Returns (question, whole turn) of the examples for few-shot prompting: the file's, else the built-in ones."""
    if not coldstart.examples:
        return teachers.worked_examples(reward.extraction)
    rows = example_files.ExampleFile(coldstart.examples, data, reward)
    return [(row.problem.text, row.text) for row in itertools.islice(rows, teachers.MOST_EXAMPLES)]


def _edited(drafts: list[Draft], editor: Judge | None, making: Making, counts: Counts) -> list[Draft]:
    """Returns the drafts of one source after editing: by the tiny world's rules for its own problems, else by a model.

    The model rewrites sampled traces and adds thoughts to people's replies that nothing grades; other texts of people
    stay unchanged.
    """
    seed, judge = making.sampling.seed, making.judge
    if not drafts or drafts[0].provenance["source"] == PEOPLE:
        replies = [draft for draft in drafts if not draft.gradable]
        others = [draft for draft in drafts if draft.gradable]
        return others + (editing.with_thoughts(replies, editor, seed, judge, counts) if editor and replies else replies)
    tiny_world = [draft for draft in drafts if draft.problem.source == tasks.SOURCE]
    others = [draft for draft in drafts if draft.problem.source != tasks.SOURCE]
    tidied = [edited for draft in tiny_world if (edited := _tidied(draft)) is not None]
    if editor and others:
        reward, keep_unedited = making.sampling.reward, making.coldstart.keep_unedited
        return tidied + editing.rewrite(others, editor, seed, reward, judge, counts, keep_unedited)
    return tidied + [dataclasses.replace(draft, text=draft.text.strip()) for draft in others]


def _tidied(draft: Draft) -> Draft | None:
    """Returns a trace of the tiny world in one clean layout, None if it is no chain of true checks."""
    problem = draft.problem
    text = rewrite.tidy(problem.text, draft.text, problem.language)
    if text is None or not rewrite.is_sound(problem.text, text):
        return None
    provenance = draft.provenance | {"edited": text != draft.text}
    return dataclasses.replace(draft, text=text, provenance=provenance)


def _right_again(
    drafts: list[Draft],
    reward: RewardConfig,
    coldstart: ColdStartConfig,
    counts: Counts,
    name: str,
    edited: bool = False,
) -> list[Draft]:
    """Returns the drafts whose current text is right and well formed by their own task's grader.

    Drafts that nothing can grade are kept, and texts of people may have another form. After a model's edit (`edited`)
    a trace must also be of one language, and answers that the edit changed are counted. `counts[name]` is set to the
    number of drafts returned.
    """
    with RewardPool(reward) as pool:
        pairs = list(zip(drafts, grade(drafts, pool), strict=True))
    if edited:
        written = [(draft, score) for draft, score in pairs if score and draft.provenance["edited"]]
        tally(counts, CHANGED, (draft.task for draft, score in written if score.parts["accuracy"] != 1.0))
    least = coldstart.min_language_consistency if edited else 0.0
    right = [draft for draft, score in pairs if _is_good(draft, score, least)]
    tally(counts, name, (draft.task for draft in right))
    return right


def _is_good(draft: Draft, score: Score | None, least_language: float) -> bool:
    by_people = draft.provenance["source"] == PEOPLE
    if score is None or not score.scorable:
        return score is None or by_people
    well_formed = by_people or (score.parts["format"] == 1.0 and score.parts["language"] >= least_language)
    return score.parts["accuracy"] == 1.0 and well_formed
