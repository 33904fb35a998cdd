"""Claims about the pages: links lead somewhere, names exist, lines fit a terminal, the index lists every page."""

import itertools
import pathlib
import re

import pytest

from r1jax import config as configs
from r1jax import schema

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLUMNS = 110
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^\s*```.*?^\s*```", flags=re.DOTALL | re.MULTILINE)
NO_FIELDS = {"a.b", "model.layers.61", "reward_model.ground_truth"}  # a pattern, a tensor, a column of another's rows
FILE = re.compile(r"\.(py|md|jsonl?|safetensors|html|csv|png|model|txt)$")


def each_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())(function)


def anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def without_code(lines: list[str]) -> list[str]:
    """Returns a page's lines without its indented blocks of code, which follow an empty line."""
    kept, in_code = [], False
    for before, line in zip(["", *lines], lines, strict=False):
        in_code = line.startswith("    ") and (in_code or not before.strip()) or (in_code and not line.strip())
        kept += [] if in_code else [line]
    return kept


@each_page
def test_prose_wraps_at_110_columns(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in without_code(prose) if len(line) > COLUMNS and not line.startswith("|")] == []


def test_index_links_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([a-z_]+\.md)\)", index))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert "](docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def patterns(path: str) -> list[str]:
    """Returns the glob patterns of a path as pages write it: `NAME` is any name, `{a,b}` either."""
    parts = [part.split(",") for part in re.split(r"[{}]", re.sub(r"\b[A-Z]+\b", "*", path))]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


@each_page
def test_files_that_a_page_names_exist(page):
    text = re.sub("^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = re.findall(r"(?<![\w/.])((?:r1jax|configs|kernels|tests|launch|docs|\.ci)/[\w/.*{},-]*\w/?)", text)
    missing = [path for path in named for pattern in patterns(path) if not any(ROOT.glob(pattern.rstrip("/")))]
    assert missing == []


@each_page
def test_configs_that_a_page_starts_exist(page):
    known = {entry.name: entry.presets for entry in configs.entries()}
    for name, preset in re.findall(r"--config=([a-z]\w*)(?::([a-z]\w*))?", page.read_text(encoding="utf-8")):
        assert name in known and (not preset or preset in known[name]), f"{name}:{preset}"


@each_page
def test_config_fields_that_a_page_names_exist(page):
    text, parts = page.read_text(encoding="utf-8"), {key.split(".")[0] for key in configs.flatten(schema.Config())}
    named = re.findall(r"--config\.([a-z][\w.]*\w)=", text)
    quoted = [key.removeprefix("config.") for key in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text)]
    named += [key for key in quoted if key.split(".")[0] in parts and not FILE.search(key)]
    for key in configs.keys((key, "") for key in named if key not in NO_FIELDS):
        configs.field_type(schema.Config(), key)


@pytest.mark.parametrize("page", ["rewards.md", "sandbox.md"])
def test_code_that_a_page_prints_gives_what_it_says(page, capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (code,) = [block for block in blocks if "\nprint(" in block]
    exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.rstrip() == code.rpartition("  # ")[2].rstrip()
