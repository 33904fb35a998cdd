"""What can be seen of a run while it goes on. Nothing here changes a bit of its result."""

from dataclasses import dataclass

from r1jax.schema.checks import Checked, at_least


@dataclass(frozen=True)
class WatchConfig(Checked):
    rollout_samples: int = 4  # of each rollout, written to rollout_samples.jsonl; 0: none
    rollouts_kept: int = 50  # rollouts in that file: the newest half, and earlier ones spread over the run
    report_every_s: float = 30.0  # report.html is written anew while the run goes on; 0: at its end alone
    wandb_project: str = ""  # Weights & Biases gets the rows of metrics too, in this project; "": it does not

    checks = (*at_least(0, "rollout_samples", "report_every_s"), *at_least(2, "rollouts_kept"))
