"""Where problems come from."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked, share


def _renames(column: str) -> bool:
    """Returns whether a text is THEIRS=OURS, neither of them empty."""
    theirs, equals, ours = column.partition("=")
    return bool(theirs.strip() and equals and ours.strip())


@dataclass(frozen=True)
class DataConfig(Checked):
    """Where problems come from: files of rows (docs/data.md), or the tiny world where no file is given."""

    world: Literal["none", "tiny"] = "none"  # the problems without files: none, or those that the tiny presets generate
    path: str = ""  # files of problems, separated by commas: a share of each is held out, the rest is trained on
    weights: tuple[float, ...] = ()  # shares of the files in `path` in the prompts; () draws every row equally often
    eval_path: str = ""  # files whose rows are all evaluated and never trained on; nothing of `path` is then held out
    general_path: str = ""  # files of task general, besides the rows of that task in `path`
    safety_path: str = ""  # files of task safety, likewise
    columns: tuple[str, ...] = ()  # THEIRS=OURS: a file's name of a field, as in problem=prompt
    task: str = ""  # task of rows that name none
    template: Literal["auto", "tiny", "r1_zero", "chat", "plain"] = "auto"
    instruction: str = ""  # text put before every prompt
    think_prefill: bool = False  # end every prompt in `<think>\n`, as R1's chat format does; graded with the response
    max_rows: int = 0  # of each file; 0 reads all
    holdout_fraction: float = 0.1  # of the questions in `path`, by the hash of their text, kept for evaluation
    max_left_out: float = 0.5  # share of the prompts that may be too long for config.sampler.max_prompt_tokens

    checks = (
        *share("must be between 0 and 1", "holdout_fraction", "max_left_out"),
        Check("columns", _renames, ": needs THEIRS=OURS, as in problem=prompt", each=True),
    )
