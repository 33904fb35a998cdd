"""Settings of the tools besides the recipe: tests for code prompts, export."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Checked, at_least


@dataclass(frozen=True)
class BuildTestsConfig(Checked):
    """How build_tests makes the tests of code prompts (P2 B.3.2, which gives no numbers)."""

    generators_per_prompt: int = 4  # written by config.judge for a row that has none
    inputs_per_kind: int = 2  # of each kind of input, by each generator
    min_tests: int = 10  # tests kept even if fewer of them fail all the wrong programs
    max_input_characters: int = 200_000  # a longer input is left out
    workers: int = 2  # programs that run at once

    checks = at_least(1, "generators_per_prompt", "inputs_per_kind", "min_tests", "max_input_characters", "workers")


@dataclass(frozen=True)
class ExportConfig:
    """How export_hf writes."""

    dtype: Literal["float32", "bfloat16", "fp8"] = "float32"  # fp8: DeepSeek's published layout, deepseek_v3 only
    verify: bool = True  # read the folder back and compare weights and logits
