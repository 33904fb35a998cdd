"""The claim that functions take the parts of the config that they use: whoever takes the whole of it is listed here."""

import ast
import pathlib

from r1jax import stage_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What makes, checks and keeps whole configs: the command line, the loader, the graph with what a stage descends from.
WHOLE = ("config", "flags", "sweep", "stage_table", "launch", "recipe.graph", "recipe.lineage", "tools.ablation")
KEEPERS = {
    *("recipe.common:StageFolder.__init__", "recipe.common:json_fields", "recipe.common:prepare"),
    *("recipe.export_hf:stage_config", "recipe.judging:work_key", "rl.settings:of_config"),
}
# Steps of stages that read too many parts to name them, or hand the config on to the graph; no name may be added.
STEPS: dict[str, tuple[str, ...]] = {
    "bench.update": (
        "draw",
        "prepare_figures",
        "report",
        "split_figures",
        "start_weights",
        "update_figures",
    ),
    "recipe.distill": (
        "_check_inputs",
        "collect",
    ),
    "recipe.evaluate": (
        "as_trained",
        "before_and_after",
        "evaluate",
        "measurement_key",
        "of_weights",
    ),
    "recipe.fine_tuning": (
        "fine_tune",
        "run",
    ),
    "recipe.general_rows": ("chosen",),
    "recipe.policy": (
        "later",
        "load_reward_models",
        "make_training",
    ),
    "recipe.problems": (
        "FileProblems.__init__",
        "source",
    ),
    "recipe.prompts": (
        "_source",
        "load",
        "load_held_out",
    ),
    "recipe.review": (
        "_key",
        "ask",
        "kept",
    ),
    "recipe.reward_models": ("fit",),
    "recipe.stage0_base": (
        "base_key",
        "base_params",
        "pretrain",
        "write_asset",
    ),
    "recipe.stage1_coldstart": (
        "_make",
        "_sampled",
        "collect",
    ),
    "recipe.stage3_rejection_sft": ("collect",),
    "recipe.teachers": (
        "load",
        "prompted",
    ),
    "recipe.tiny_preferences": ("examples",),
    "recipe.traces": ("sample",),
    "recipe.judged_prompts": ("sample",),
    "tools.build_tests": ("generator_writer",),
    "tools.preference_pairs": ("answerer",),
}


def takes_the_whole(function: ast.FunctionDef) -> bool:
    """Returns whether a parameter is annotated as the whole config, or called config without saying which part it is."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    kinds = {argument.arg: ast.unparse(argument.annotation) if argument.annotation else "" for argument in arguments}
    whole = ("Config", "schema.Config", "Config | None")
    return any(kind in whole or (name == "config" and not kind) for name, kind in kinds.items())


def takers() -> set[str]:
    """Returns MODULE:NAME, below r1jax, of every function that takes the whole config."""
    found = set()
    for path in (ROOT / "r1jax").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "r1jax").with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = [("", tree), *((f"{node.name}.", node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        for owner, node in owners:
            inside = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            found |= {f"{module}:{owner}{one.name}" for one in inside if takes_the_whole(one)}
    return found


def test_only_entries_and_keepers_of_configs_and_the_listed_steps_take_the_whole_config():
    entries = {stage.function for stage in stage_table.STAGES.values()}
    listed = {f"{module}:{name}" for module, names in STEPS.items() for name in names}
    rest = {name for name in takers() - entries - KEEPERS if name.partition(":")[0] not in WHOLE}
    assert rest == listed


def test_a_function_that_takes_the_whole_config_is_found():
    sources = ("def f(config): ...", "def f(c: Config): ...", "def f(a, *, c: schema.Config): ...")
    assert all(takes_the_whole(ast.parse(source).body[0]) for source in sources)
    assert not takes_the_whole(ast.parse("def f(config: GRPOConfig, data: DataConfig): ...").body[0])
