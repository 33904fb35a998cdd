"""The stages that learn from examples: how long they train and how their examples are made."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked, at_least

COLD_START_SOURCES = ("r1_zero", "few_shot", "direct", "people")
REASONING = "reasoning"  # the kind of rows that a rule can check
KINDS = (  # of rows with a response (P2 B.3.3); a kind with sub-kinds includes them
    REASONING,
    "writing",
    "question_answering",
    "self_cognition",
    "translation",
    "software_engineering",
    "software_engineering/repair",
    "software_engineering/front_end",
    "software_engineering/edit",
)
_MIX = f": needs KIND=WEIGHT above 0, each kind once; kinds: {', '.join(KINDS)}"


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """Corpus and length of stage0_base on the tiny world."""

    updates: int = 2400
    rows_per_update: int = 32
    corpus_documents: int = 200_000
    drill_fraction: float = 0.3
    fourier_numbers: bool = True  # start the number embeddings from sines of the number

    checks = at_least(1, "updates", "rows_per_update", "corpus_documents")


@dataclass(frozen=True)
class SFTConfig(Checked):
    """Supervised fine-tuning (P2 B.4.2): cosine 5e-5 to 5e-6, 2-3 epochs, batch 128."""

    epochs: int = 2
    examples_per_update: int = 128  # the last update of a run has the remaining ones

    checks = at_least(1, "epochs", "examples_per_update")


@dataclass(frozen=True)
class DistillConfig:
    """Where a student's examples come from (P2 B.4.3)."""

    examples: str = ""  # rows with prompt and response, or messages (docs/data.md); "" is stage 3 of the working folder
    grade: bool = True  # responses that the grader of their row's task finds wrong are left out


@dataclass(frozen=True)
class ColdStartConfig(Checked):
    """How stage 1's examples are made: whose traces, who edits them, who reviews them (P2 B.3.2, P1 section 2.3.1)."""

    prompts: int = 1000
    samples_per_prompt: int = 4
    max_examples: int = 1500
    min_language_consistency: float = 1.0
    max_examples_per_prompt: int = 2
    sources: tuple[str, ...] = ("r1_zero",)  # any of r1_zero, few_shot, direct, people, in the order of their examples
    teacher: str = ""  # r1_zero: folder of the R1-Zero run that is sampled; "" is workdir/r1_zero
    prompted_model: str = ""  # few_shot, direct: Hugging Face folder or a stage's folder; "" is the stage's base
    examples: str = ""  # people: rows with prompt and response; few_shot: worked examples, "" uses two built-in ones
    editor: Literal["", "judge"] = ""  # judge: config.judge's model rewrites every trace; "": white space is trimmed
    keep_unedited: bool = False  # keep a trace whose edit cannot be read, unchanged; false leaves it out
    review: str = ""  # JSONL that people fill in with verdicts on the examples; "" is no review

    checks = (
        *at_least(1, "prompts", "samples_per_prompt", "max_examples", "max_examples_per_prompt"),
        Check(
            "sources",
            lambda c: c.sources and len({*c.sources} & {*COLD_START_SOURCES}) == len(c.sources),
            f"must be some of {', '.join(COLD_START_SOURCES)}, each once",
        ),
        Check(
            "sources",
            lambda c: "people" not in c.sources or c.examples,
            "has people, whose rows are needed: set coldstart.examples=FILE",
        ),
        Check(
            "examples",
            lambda c: not c.examples or not {"people", "few_shot"}.isdisjoint(c.sources),
            "is read for sources=people or few_shot alone",
        ),
    )


@dataclass(frozen=True)
class RejectionConfig(Checked):
    """Stage 3's examples: several samples a prompt, of which good ones are mixed with general data (P2 B.3.3)."""

    prompts: int = 1200
    samples_per_prompt: int = 4
    temperature: float = 1.0
    max_examples_per_prompt: int = 2
    min_language_consistency: float = 1.0
    max_paragraph_words: int = 200  # a longer paragraph in the thinking drops the trace; no threshold in the paper
    drop_code_blocks: bool = True
    general_fraction: float = 0.25  # of the mixed set: about 200k of 800k
    general_path: str = (
        ""  # files of general rows with a response, separated by commas, besides rows of task general in data.*
    )
    kinds: tuple[str, ...] = ()  # KIND=WEIGHT: how general rows mix, as in writing=2; () takes them in order
    editor: Literal["", "judge"] = ""  # judge: config.judge's model writes thoughts for general rows that have none
    judged_prompts: str = ""  # rows {id, prompt, answer} without a rule verifier, accepted by config.judge; "" is none

    checks = (
        *at_least(1, "prompts", "samples_per_prompt", "max_examples_per_prompt"),
        Check(
            "general_fraction",
            lambda c: 0 <= c.general_fraction < 1,
            "must be in [0, 1): a set of general rows alone has no traces",
        ),
        Check("kinds", lambda entry: _weight(entry) > 0, _MIX, each=True),
        Check("kinds", lambda c: len(c.kind_weights()) == len(c.kinds), _MIX),
    )

    def kind_weights(self) -> dict[str, float]:
        """Returns {kind: weight} of `kinds`."""
        return {entry.partition("=")[0]: _weight(entry) for entry in self.kinds}


def _weight(entry: str) -> float:
    """Returns the weight of a KIND=WEIGHT, 0 for an unknown kind or if the weight is no number."""
    kind, _, text = entry.partition("=")
    return float(text) if kind in KINDS and text.replace(".", "", 1).isdecimal() else 0.0
