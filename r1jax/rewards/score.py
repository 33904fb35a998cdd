"""What goes into a grader and what comes out of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """The result of grading one sample.

    `value` is the reward; `parts` holds the unweighted terms by name. `scorable` False means that no answer could have
    been graded (unreadable reference, no time for the sample, a crash of a program's grader): the sample must leave its
    group's statistics, and `value` means nothing.
    """

    value: float
    parts: dict[str, float]
    scorable: bool
    detail: str


@dataclass(frozen=True)
class RewardRequest:
    """One sample to grade. The graded assistant text is `prefill + response`."""

    id: str
    task: str  # a key of compose.GRADERS
    prompt: str  # the question, without the chat template
    response: str  # the sampled text
    reference: str  # the expected answer; "" for tasks graded by a rule
    prefill: str = ""  # the part of the assistant's turn that the prompt already holds, such as "<think>\n"
    language: str = ""  # target language of the chain of thought; "" is the prompt's
    truncated: bool = False  # the length limit ended the sample
    source: str = ""  # where the problem comes from; problems of "tiny" have their own rules and lexicon

    @property
    def text(self) -> str:
        """The whole assistant turn."""
        return self.prefill + self.response
