"""How responses are scored: rules and their graders, the sandbox, trained reward models, a judge."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked, above, at_least
from r1jax.schema.sampling import SamplerConfig


@dataclass(frozen=True)
class Limits:
    """What a program in the sandbox may use (docs/sandbox.md: how each limit is enforced)."""

    wall_s: float = 6.0  # from the start of the sandbox
    cpu_s: float = 5.0  # processor time of all its processes together
    memory_bytes: int = 512 << 20  # address space of each process, and resident memory of all together
    processes: int = 16  # processes and threads at a time
    file_bytes: int = 32 << 20  # size of one file
    disk_bytes: int = 64 << 20  # of each of its two private directories, which are memory
    output_bytes: int = 4 << 20  # of each of standard output and standard error


@dataclass(frozen=True)
class SandboxConfig(Limits):
    """Where programs of the model run, and the limits of one test."""

    backend: Literal["auto", "bubblewrap", "unshare"] = "auto"  # auto: bubblewrap where it is found and works


@dataclass(frozen=True)
class RewardConfig(Checked):
    """Weights of the summed rule rewards (P2 eq. 4 and 7) and how they are graded."""

    accuracy: float = 1.0
    format: float = 1.0  # magnitude not given in the paper: design decision
    language: float = 0.0  # language consistency; 1 from RL stage 1 on in the paper
    repetition: float = 0.0  # penalty for the share of repeated n-grams, in (-1, 0]; not in the paper
    repetition_ngram: int = 3  # words; open-r1 and TRL
    reward_model: float = 0.0  # score of the trained model that config.scenarios names; 1 in the paper's stage 4
    rule: float = 0.0  # score of the task's grader on samples that a reward model scores; 0 only logs it
    extraction: Literal["auto", "boxed", "answer_tag", "whole"] = "auto"  # where the answer is looked for in a response
    graders: tuple[str, ...] = ()  # the user's own: TASK=PACKAGE.MODULE:FUNCTION or TASK=FILE.py:FUNCTION
    override_graders: bool = False  # whether these may replace built-in ones
    workers: int = 0  # grader processes; 0 grades plain numbers and rules in this process
    deadline_s: float = 10.0  # per sample, in a worker; a slower answer is wrong if its reference was read in time
    batch_deadline_s: float = 600.0  # for all samples of a rollout
    sandbox: SandboxConfig = SandboxConfig()
    cache_entries: int = 65536  # scores of workers kept by content, the least recently used dropped first; 0: none

    checks = (
        *above(0, "deadline_s", "batch_deadline_s", "repetition_ngram"),
        *at_least(0, "workers", "cache_entries"),
    )


@dataclass(frozen=True)
class RewardModelConfig(Checked):
    """A trained reward model: the decoder it starts from with a scalar head (P2 section 3.1 and appendix B.3).

    The paper's: 256 examples an update, a rate of 6e-6, one epoch, at most 8,192 tokens (config.pack.row_tokens).
    """

    epochs: int = 1
    examples_per_update: int = 256  # pairs, or labelled responses
    balance_lengths: bool = True  # pairs: as many with a longer chosen response as with a longer rejected one
    frozen_blocks: int = 0  # freeze the embedding and the first N blocks; their outputs are computed once
    prompt_tokens: int = 0  # read only the last N tokens of a prompt; 0 reads all
    response_tokens: int = 0  # read only the first N tokens of a response; 0 reads all
    samples_per_prompt: int = 32  # tiny world: responses to each prompt, from the start and from the base each
    pairs_per_prompt: int = 64  # tiny world: at most

    checks = (
        *at_least(1, "epochs", "examples_per_update", "samples_per_prompt", "pairs_per_prompt"),
        *at_least(0, "frozen_blocks", "prompt_tokens", "response_tokens"),
    )


@dataclass(frozen=True)
class JudgeConfig:
    """A second model that judges pairs of replies, and answers against a reference (P2 B.2, B.3.3)."""

    checkpoint: str = ""  # Hugging Face folder of the judge; "" is none
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    sampler: SamplerConfig = (
        SamplerConfig(  # the parameters are those of the paper's evaluations (P2 D.1); B.2 gives none
            slots=32,
            max_prompt_tokens=8192,
            max_new_tokens=4096,
            temperature=0.6,
            top_p=0.95,
            prefill_buckets=(512, 1024, 2048, 4096),
            windows=(2048, 4096, 8192),
        )
    )


@dataclass(frozen=True)
class PreferenceConfig(Checked):
    """How preference_pairs labels two replies by a judge and which pairs it keeps (P2 B.2)."""

    judgements: int = 4  # of a pair, each sampled independently, A and B in a random order
    min_margin: float = 1.0  # a pair is kept if the mean of its readable margins, -2 to 2, exceeds this
    min_readable: int = 2  # least number of readable judgements of a kept pair; not in the paper
    balance_lengths: bool = True  # keep as many pairs with a longer chosen reply as with a longer rejected one
    responses_per_prompt: int = 2  # sampled from config.model for rows without responses

    checks = (
        *at_least(1, "judgements", "min_readable"),
        Check("min_readable", lambda c: c.min_readable <= c.judgements, "exceeds judgements={c.judgements}"),
        Check("min_margin", lambda c: 0 <= c.min_margin < 2, "must be in [0, 2)"),
        *at_least(2, "responses_per_prompt"),
    )
