"""What the project's own benchmarks measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchConfig:
    """What the benchmarks measure: for bench_update, samples of random tokens with responses of log-normal length, and
    the systems that update on them; for bench_kernels, the TPU to compile for."""

    samples: int = 64
    prompt_tokens: int = 64
    median_tokens: int = 48  # of a response
    p99_tokens: int = 512  # 99th percentile of the lengths
    longest_tokens: int = 576  # longer draws are cut to this
    code_files: tuple[str, ...] = ()  # bench_code: JSONL of id, prompt, tests, solution
    mutants_per_row: int = 1  # bench_code: mutants of each solution, one mistake each
    repeats: int = 3  # rounds in which every system runs once, in turn
    losses: tuple[str, ...] = ("grpo", "sft")
    threads: int = 2  # processors that every system may use
    peer_micro_batch: int = 8  # samples of a peer's micro-batch
    trl_python: str = ""  # interpreter with torch, transformers and trl; "" leaves TRL and transformers out
    tunix_python: str = ""  # interpreter with google-tunix; "" leaves Tunix out
    tunix_micro_batch: int = 2  # Tunix holds the logits of all positions
    topology: str = "v5p:1x1x1"  # bench_kernels: one chip of a generation, as libtpu names it
    split_updates: int = 2  # GRPO steps of a run that measures the phases of a step, the first not counted; 0: none
