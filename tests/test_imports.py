"""Imports go one way, read from the sources: who may import whom inside r1jax, and who may import JAX."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BELOW = {  # part of r1jax: the parts it may import; itself and schema always
    "schema": set(),
    "configs": set(),
    "config": {"configs"},
    "flags": {"config"},
    "stage_table": set(),
    "sweep": {"config", "flags", "stage_table"},
    "launch": {"flags", "config", "sweep", "stage_table", "core"},  # of core, what starts several processes
    "core": set(),
    "kernels": set(),
    "data": set(),
    "report": set(),
    "models": {"kernels", "core"},
    "checkpoints": {"models", "core", "data"},  # the tiny world's words are its tokenizer
    "sampler": {"models", "core"},
    "train": {"data", "models", "core"},  # of kernels only what models place on the mesh
    "rewards": {"data"},  # the tiny world's rules
    "evals": {"sampler", "rewards", "data", "core"},
    "plan": {"kernels", "core"},
    "rl": {"sampler", "rewards", "data", "train", "models", "core"},
    "recipe": {
        *("rl", "train", "sampler", "data", "rewards", "evals", "checkpoints", "report", "plan", "models", "core"),
        "stage_table",  # the graph gives overrides to other stages and calls them by name
        "config",  # a stage writes its flattened config and its hash
    },
    "tools": {"recipe"},
    "bench": {"recipe", "tools"},
}
for upper in ("tools", "bench"):  # both may import what the recipe may
    BELOW[upper] |= BELOW["recipe"]
ROOMS = {  # folder or module of rewards: those of the others that it may import
    "score": set(),
    "plugins": set(),
    "rules": set(),
    "answers": {"score"},
    "sandbox": set(),
    "code": {"score", "answers", "sandbox"},
    "models": {"score"},
    "compose": {"score", "plugins", "rules", "answers", "sandbox", "code"},
    "warm": {"answers"},
    "worker": {"score", "answers", "sandbox"},
    "pool": {"score", "compose", "worker", "sandbox"},
    "references": {"score", "plugins", "answers", "sandbox", "code", "compose", "pool"},
    "golds": {"score", "answers", "compose", "pool"},
    "explaining": {"score", "answers", "compose", "pool"},
}
MODEL_REWARDS = {"rewards/models/reward_model.py", "rewards/models/judge.py"}  # these two run a model
WITHOUT_JAX = {"schema", "configs", "config", "flags", "sweep", "stage_table", "launch", "data", "report", "rewards"}
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "jetstream"}


def sources() -> list[pathlib.Path]:
    folders = [ROOT / "r1jax", ROOT / "configs", ROOT / "kernels"]
    return sorted(path for folder in folders for path in folder.rglob("*.py") if path != ROOT / "r1jax" / "__init__.py")


def name_of(path: pathlib.Path) -> str:
    """Returns the path inside the package: `core/rng.py`, `configs/grade.py`, `launch.py`."""
    relative = path.relative_to(ROOT)
    return (relative.relative_to("r1jax") if relative.parts[0] == "r1jax" else relative).as_posix()


def part_of(path: pathlib.Path) -> str:
    return name_of(path).split("/")[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Returns the dotted names that a source imports, anywhere in it; `from r1jax import x` counts as r1jax.x."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imported_finds_every_form():
    source = "import jax.numpy as jnp\nfrom r1jax import schema\ndef f():\n    from r1jax.core.rng import key, fold\n"
    assert imported(source) == {"jax.numpy", "r1jax.schema", "r1jax.core.rng.key", "r1jax.core.rng.fold"}


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_module_imports_only_what_lies_below_it(path):
    part = part_of(path)
    allowed = (
        BELOW[part] | {part, "schema"} | ({"sampler", "models", "core"} if name_of(path) in MODEL_REWARDS else set())
    )
    inner = {name.split(".")[1] for name in imported(path.read_text(encoding="utf-8")) if name.startswith("r1jax.")}
    assert inner - allowed == set()


def module_of(path: pathlib.Path) -> str:
    """Returns the dotted name of a source: `r1jax.core.rng`; a package's is that of its folder."""
    return ".".join(["r1jax", *pathlib.Path(name_of(path)).with_suffix("").parts]).removesuffix(".__init__")


@pytest.mark.parametrize("path", [path for path in sources() if part_of(path) == "rewards"], ids=name_of)
def test_room_of_rewards_imports_only_what_lies_below_it(path):
    def room(name: str) -> str:
        return name.split(".")[2]

    names = [name for name in imported(path.read_text(encoding="utf-8")) if name.startswith("r1jax.rewards.")]
    if module_of(path) != "r1jax.rewards":
        assert {room(name) for name in names} - ROOMS[room(module_of(path))] <= {room(module_of(path))}


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in sources()}
    graph = {}
    for name, path in modules.items():
        names = imported(path.read_text(encoding="utf-8"))
        graph[name] = {full if full in modules else full.rpartition(".")[0] for full in names} & modules.keys()
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of a circle


@pytest.mark.parametrize("path", [path for path in sources() if part_of(path) in WITHOUT_JAX], ids=name_of)
def test_module_imports_nothing_of_jax(path):
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert name_of(path) in MODEL_REWARDS or roots & JAX_FAMILY == set()


def test_kernels_import_jax_only():
    ours = [path for path in sources() if part_of(path) == "kernels"]
    roots = {name.split(".")[0] for path in ours for name in imported(path.read_text(encoding="utf-8"))}
    assert roots <= {"jax", "functools", "math", "typing", "dataclasses", "collections", "r1jax", "numpy"}


def test_jetstream_is_imported_in_one_place():
    users = {
        name_of(path)
        for path in sources()
        if "jetstream" in {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    }
    assert users <= {"sampler/jetstream.py"}


def test_nothing_imports_launch():
    users = [name_of(path) for path in sources() if "r1jax.launch" in imported(path.read_text(encoding="utf-8"))]
    assert users == []
