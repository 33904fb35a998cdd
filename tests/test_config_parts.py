"""The claim that functions take the parts of the config that they use: whoever takes the whole of it is listed here."""

import ast
import pathlib

from r1jax import stage_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What makes, checks and keeps whole configs: the command line, the loader, the graph with what a stage inherits from it
# and descends from. And what derives a whole run from its config: its programs, and the plan of it.
WHOLE = {
    *("config", "flags", "paths", "sweep", "stage_table", "launch", "pod.request", "tools.ablation"),
    *("recipe.graph", "recipe.inherited", "recipe.lineage", "recipe.programs", "tools.plan"),
}
KEEPERS = {
    *("recipe.common:StageFolder.__init__", "recipe.common:json_fields", "recipe.common:prepare"),
    *("recipe.export_hf:stage_config", "recipe.judging:work_key"),
}
# What takes a config apart: it returns the parts that several steps use, under one name.
BUILDERS = {"schema.config:parts_of", "rl.settings:of_config"}
# Entries besides the functions of the table of stages: the body that stages 1 and 3 and distill share, and what each of
# them gives it to collect its examples, which may run a stage that is missing.
ENTRIES = {
    *("recipe.fine_tuning:run", "recipe.stage1_coldstart:collect", "recipe.stage3_rejection_sft:collect"),
    "recipe.distill:collect",
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


def test_only_entries_builders_and_keepers_of_configs_take_the_whole_config():
    stages = {stage.function for stage in stage_table.STAGES.values()}
    found = {name for name in takers() - stages if name.partition(":")[0] not in WHOLE}
    assert found == KEEPERS | BUILDERS | ENTRIES


def test_a_function_that_takes_the_whole_config_is_found():
    sources = ("def f(config): ...", "def f(c: Config): ...", "def f(a, *, c: schema.Config): ...")
    assert all(takes_the_whole(ast.parse(source).body[0]) for source in sources)
    assert not takes_the_whole(ast.parse("def f(config: GRPOConfig, data: DataConfig): ...").body[0])
