"""Claims about what a run may go on with: harmless fields change freely, lengths grow, all else is refused with both values."""

import json
import pathlib
import re

import pytest

from r1jax import config as configs
from r1jax.recipe import common, graph, identity
from r1jax.rl.journal import Journal

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "resume.md"
FIELDS = (("grpo.updates", "8"), ("grpo.updates_per_rollout", "4"))


def stopped(tmp_path, *overrides, name="r1_zero:tiny", update=3, figures=None):
    """Makes the folder of a run that was stopped after some updates, or, with `figures`, has ended."""
    folder = common.StageFolder(configs.load(name, [*overrides]), tmp_path)
    folder.start({})
    (folder.path / "checkpoints" / str(update)).mkdir(parents=True)
    if figures is not None:
        (folder.path / "figures.json").write_text(json.dumps(figures))
        folder.finish(figures, {}, "")
    return folder


def again(tmp_path, *overrides, name="r1_zero:tiny"):
    return common.StageFolder(configs.load(name, [*overrides]), tmp_path)


def test_the_page_lists_every_free_field_with_its_reason():
    rows = re.findall(r"^\| `([a-z_.]+)` \| (yes|rounded) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    expected = {name: ("yes" if field.same_bits else "rounded", field.reason) for name, field in identity.FREE.items()}
    assert {name: (bits, reason) for name, bits, reason in rows} == expected
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in (*identity.UPDATES, *identity.EPOCHS))


def test_free_fields_are_fields_of_a_config():
    names = configs.flatten(configs.load("r1_zero"))
    for free in (*identity.FREE, *identity.UPDATES, *identity.EPOCHS, *identity.EPOCHS.values()):
        assert any(name == free or name.startswith(f"{free}.") for name in names), free


def test_a_run_goes_on_with_other_devices_slots_workers_and_checkpoints_and_notes_what_changed(tmp_path):
    stopped(tmp_path)
    changed = ("mesh.fsdp", "2"), ("sampler.slots", "8"), ("reward.workers", "1"), ("checkpointing.every_updates", "7")
    folder = again(tmp_path, *changed)
    folder.check()
    folder.start({})
    folder.start({})
    names = [row["name"] for row in folder.changes()]
    assert sorted(names) == sorted(name for name, _ in changed)
    assert {row["update"] for row in folder.changes()} == {3}
    assert json.loads((folder.path / "config.json").read_text())["sampler.slots"] == 8


def test_a_finished_run_stays_finished_whatever_free_field_changes(tmp_path):
    stopped(tmp_path, figures={"updates": 3})
    folder = again(tmp_path, ("mesh.data", "4"), ("checkpointing.keep", "9"), ("gate.pass_at_1", "0.5"))
    assert folder.finished({}) == {"updates": 3} and folder.state({}) == "done"
    assert again(tmp_path, ("seed", "1")).finished({}) is None and again(tmp_path, ("seed", "1")).state({}) == "stale"


def test_a_changed_learning_rate_is_refused_with_field_both_values_and_remedy(tmp_path):
    stopped(tmp_path, ("optimizer.learning_rate", "1e-4"))
    said = r"\(optimizer.learning_rate: 0.0001 there, 0.001 now\); give the value there, choose another --workdir or"
    with pytest.raises(ValueError, match=said):
        again(tmp_path, ("optimizer.learning_rate", "1e-3"), ("sampler.slots", "8"), ("grpo.updates", "99")).check()


def test_rows_of_a_micro_batch_belong_to_a_reward_model_and_not_to_another_run(tmp_path):
    for name, free in (("r1_zero:tiny", True), ("reward_helpful:tiny", False)):
        stopped(tmp_path, name=name)
        folder = again(tmp_path, ("pack.rows_per_micro_batch", "64"), name=name)
        if free:
            folder.check()
        else:
            with pytest.raises(ValueError, match="rows_per_micro_batch: 8 there, 64 now"):
                folder.check()


def test_a_longer_run_goes_on_also_from_its_end(tmp_path):
    stopped(tmp_path, *FIELDS, update=8, figures={"updates": 8})
    folder = again(tmp_path, FIELDS[1], ("grpo.updates", "12"))
    folder.check()
    assert folder.finished({}) is None and folder.state({}) == "stopped"
    folder.start({})
    assert not (folder.path / common.DONE).exists()
    assert again(tmp_path, FIELDS[1], ("grpo.updates", "12")).state({}) == "stopped"


@pytest.mark.parametrize(
    ("update", "after", "schedule", "why"),
    [
        (3, "6", "constant", "grpo.updates: 10 there, 6 now, and a run can only become longer"),
        (3, "16", "cosine", "optimizer.schedule=cosine spans them all: earlier rates would be others"),
        (9, "16", "constant", "its last rollout, from update 8 on, is of 2 updates, not of 4"),
    ],
)
def test_a_length_that_would_change_what_was_made_is_refused_with_the_reason(tmp_path, update, after, schedule, why):
    fields = ("grpo.updates_per_rollout", "4"), ("optimizer.schedule", schedule)
    stopped(tmp_path, *fields, ("grpo.updates", "10"), update=update)
    with pytest.raises(ValueError, match=re.escape(why)):
        again(tmp_path, *fields, ("grpo.updates", after)).check()


def test_a_short_last_rollout_that_was_drawn_and_not_trained_on_is_drawn_anew(tmp_path):
    folder = stopped(tmp_path, FIELDS[1], ("grpo.updates", "10"), update=8)
    Journal(folder.path / "journal")
    for first in (4, 8):
        (folder.path / "journal" / f"rollout_{first:08d}.npz").touch()
    folder = again(tmp_path, FIELDS[1], ("grpo.updates", "16"))
    folder.start({})
    assert [path.name for path in (folder.path / "journal").iterdir()] == ["rollout_00000004.npz"]


@pytest.mark.parametrize(
    ("schedule", "examples", "why"),
    [
        ("constant", 256, ""),
        ("constant", 100, ""),  # fewer than an update holds: every update is an epoch
        ("constant", 200, "its last update had fewer than 128 examples"),
        ("constant", None, "only a finished run can have more epochs"),
        ("cosine", 256, "optimizer.schedule=cosine spans them all"),
    ],
)
def test_more_epochs_go_on_where_every_update_stays_the_same(tmp_path, schedule, examples, why):
    fields = ("optimizer.schedule", schedule), ("sft.examples_per_update", "128")
    figures = {} if examples is None else {"figures": {"examples": examples}}
    stopped(tmp_path, *fields, ("sft.epochs", "1"), name="distill:tiny", **figures)
    folder = again(tmp_path, *fields, ("sft.epochs", "3"), name="distill:tiny")
    if not why:
        folder.check()
    else:
        with pytest.raises(ValueError, match=re.escape(f"sft.epochs: 1 there, 3 now, and {why}")):
            folder.check()


def test_the_graph_makes_a_finished_stage_longer_alone_or_where_nothing_was_made_from_it(tmp_path):
    updates = [("set", "r1_zero.grpo.updates=400")]
    stages = graph.stage_configs(configs.load("quickstart", updates))
    for stage, chosen in (("r1_zero", configs.load("quickstart")), ("stage1_coldstart", configs.load("quickstart"))):
        folder = common.StageFolder(graph.stage_configs(chosen)[stage], tmp_path)
        folder.start({})
        folder.finish({}, {}, "")
        if stage == "r1_zero":
            graph._refuse_unready(list(graph.GRAPH), stages, tmp_path, again=False)
    with pytest.raises(ValueError, match="--config.only=r1_zero, then the others again with --config.from=stage1_cold"):
        graph._refuse_unready(list(graph.GRAPH), stages, tmp_path, again=False)
    graph._refuse_unready(["r1_zero"], stages, tmp_path, again=False)
    assert graph.state("r1_zero", stages, tmp_path) == "stopped"
    assert graph.state("stage1_coldstart", stages, tmp_path) == "stale"


def test_the_digest_of_a_run_does_not_depend_on_free_fields():
    base = common.StageFolder(configs.load("r1_zero:tiny"), pathlib.Path("."))
    free = [("sampler.slots", "7"), ("mesh.tensor", "2"), ("gate.pass_at_1", "0.5")]
    assert again(pathlib.Path("."), *free).hash == base.hash != again(pathlib.Path("."), ("seed", "3")).hash
