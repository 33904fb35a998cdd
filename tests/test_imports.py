"""Imports go one way, as docs/architecture.md says: who may import whom inside r1jax, and who may import JAX."""

import ast
import graphlib
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"


def order(heading: str) -> dict[str, set[str]]:
    """Returns the table of the architecture page under a heading: folder or module -> those that it may import."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(heading) + 2 :])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name.strip("`"): set(re.findall("`([a-z_]+)`", below)) for name, _, below in cells}


BELOW = order("| folder or module | owns | may import |")  # part of r1jax; itself and schema always
ROOMS = order("| room of `rewards` | owns | may import of `rewards` |")
MODEL_REWARDS = {"rewards/models/reward_model.py", "rewards/models/judge.py"}  # these two run a model
GROUND = {"core.files", "core.errors"}  # modules without JAX that every part may import, as the page says too
WITHOUT_JAX = {
    "schema",
    "configs",
    "config",
    "flags",
    "paths",
    "sweep",
    "stage_table",
    "launch",
    "pod",
    "data",
    "report",
    "rewards",
}
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


@pytest.mark.parametrize("table", [BELOW, ROOMS], ids=["folders", "rooms_of_rewards"])
def test_documented_order_goes_from_the_ground_up(table):
    above: set[str] = set()
    for name, below in table.items():
        assert below <= above, f"{name} is documented before {below - above}"
        above.add(name)


def test_documented_order_names_every_folder_and_every_room():
    assert {part_of(path) for path in sources()} == set(BELOW)
    modules = [module_of(path).split(".") for path in sources() if part_of(path) == "rewards"]
    assert {names[2] for names in modules if len(names) > 2} == set(ROOMS)


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_module_imports_only_what_lies_below_it(path):
    part = part_of(path)
    allowed = (
        BELOW[part] | {part, "schema"} | ({"sampler", "models", "core"} if name_of(path) in MODEL_REWARDS else set())
    )
    inner = [name.split(".")[1:] for name in imported(path.read_text(encoding="utf-8")) if name.startswith("r1jax.")]
    assert {names[0] for names in inner if ".".join(names[:2]) not in GROUND} - allowed == set()


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


def is_without_jax(path: pathlib.Path) -> bool:
    return part_of(path) in WITHOUT_JAX or name_of(path).removesuffix(".py").replace("/", ".") in GROUND


@pytest.mark.parametrize("path", [path for path in sources() if is_without_jax(path)], ids=name_of)
def test_module_imports_nothing_of_jax(path):
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert name_of(path) in MODEL_REWARDS or roots & JAX_FAMILY == set()


def test_documented_ground_modules_are_these():
    (sentence,) = re.findall(r"The ground modules ([^.]*(?:\.\w[^.]*)*) import no", PAGE.read_text(encoding="utf-8"))
    assert set(re.findall("`([a-z.]+)`", sentence)) == GROUND


def test_ground_modules_import_nothing_of_the_package():
    for path in sources():
        if name_of(path).removesuffix(".py").replace("/", ".") in GROUND:
            assert [name for name in imported(path.read_text(encoding="utf-8")) if name.startswith("r1jax")] == []


def test_private_names_of_jax_are_used_in_one_module_alone():
    def is_private(path: pathlib.Path) -> bool:
        source = path.read_text(encoding="utf-8")
        return "jax._src" in source or "jaxlib._" in source

    assert [name_of(path) for path in sources() if is_private(path)] == ["core/private_jax.py"]


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
