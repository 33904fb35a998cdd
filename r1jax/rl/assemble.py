"""Assembles the four parts of a run from its config."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from r1jax.core import tree
from r1jax.models import decoder
from r1jax.rl import loop
from r1jax.rl.journal import Journal
from r1jax.rl.objective import GroupObjective, Objective
from r1jax.rl.ppo import CriticObjective
from r1jax.rl.recorder import Recorder
from r1jax.rl.rollout import EncodedPrompt
from r1jax.rl.sampling import Sampling
from r1jax.rl.settings import RunSettings
from r1jax.rl.source import JournalledSource, RolloutSource, SourceAhead
from r1jax.rl.state import RunInputs, RunState


@dataclass(frozen=True, eq=False)
class Training:
    """The four parts of one run."""

    run: RunState
    source: JournalledSource
    objective: Objective
    recorder: Recorder

    def train(self) -> decoder.Params:
        """Trains to the last update and returns the float32 weights."""
        return loop.train(self.run, self.source, self.objective, self.recorder)


def assemble(config: RunSettings, inputs: RunInputs, objective: Objective | None = None) -> Training:
    """Returns the parts of a run; without an objective, config.grpo.advantage chooses it.

    Raises ValueError when a packed row, or the devices, cannot hold what the config asks for.
    """
    _check_row(config, inputs.prompts.all)
    if objective is None:
        objective = CriticObjective(config, inputs) if config.grpo.advantage == "gae" else GroupObjective(config)
    run = RunState(config, inputs, objective.loss)
    inputs = dataclasses.replace(inputs, params=None)  # the state has its own copy: the start weights are not kept
    recorder = Recorder(run, inputs)
    sampling, journal = Sampling(config, inputs, recorder), Journal(inputs.folder / "journal")
    if inputs.sampler_mesh is None:
        source = RolloutSource(run, sampling, lambda: sampling.sampler.engine.load_params(run.params))
    else:
        source = _source_ahead(run, sampling, journal)
    return Training(run, JournalledSource(source, journal), objective, recorder)


def _source_ahead(run: RunState, sampling: Sampling, journal: Journal) -> SourceAhead:
    """Returns the source whose sampler has devices that the trainer does not use."""
    assert sampling.inputs.sampler_mesh is not None
    shared = set(run.mesh.devices.flat) & set(sampling.inputs.sampler_mesh.devices.flat)
    if shared:
        raise ValueError(f"disaggregated: {len(shared)} devices are in config.mesh and in config.sampler_mesh")
    snapshot = tree.copier(run.config.network.compute.compute_dtype, run.trainer.param_shardings)
    placed = sampling.sampler.engine.param_shardings
    # The copy to the sampler's devices runs asynchronously.
    return SourceAhead(run, sampling, lambda: jax.device_put(snapshot(run.params), placed), journal.holds)


def _check_row(config: RunSettings, prompts: Sequence[EncodedPrompt]) -> None:
    """Raises ValueError when a packed row cannot hold the longest prompt with a full response."""
    if not prompts:
        raise ValueError(f"{config.stage}: no training prompts")
    longest = max(len(prompt.ids) for prompt in prompts)
    needed = longest + config.sampler.max_new_tokens
    if needed > config.pack.row_tokens:
        raise ValueError(
            f"config.pack.row_tokens={config.pack.row_tokens} cannot hold the longest prompt ({longest} tokens) and "
            f"config.sampler.max_new_tokens={config.sampler.max_new_tokens}; raise it to {needed}"
        )
