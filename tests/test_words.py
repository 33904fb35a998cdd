"""The words of code and docs: class names that occur once, names that say what they hold, terms that a stranger knows."""

import ast
import io
import pathlib
import re
import tokenize
from collections import defaultdict

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("r1jax", "kernels", "configs") for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
TRACKED = ("ClassDef", "FunctionDef", "AsyncFunctionDef", "Module")

# Words that speak of code as of a person, or mean something else to most readers; plain verbs replace them: "reports",
# "follows", "separated by".
WORDS = re.compile(r"\b(told|tells?|telling|stands?|standing|stood|lies?|lain|lying|parted)\b", re.IGNORECASE)
# True uses: a letter or a symbol stands for a number, in mathematics.
TRUE_USES = re.compile(r"\bstands? for\b", re.IGNORECASE)
# Names that do not say what a variable, an argument or a function holds.
VAGUE = {"found", "given", "made", "own", "said", "told"}
ALLOWED_NAMES = {
    ("r1jax/data/tasks.py", "tell"),  # a word of the tiny world's language
    ("kernels/flash_attention.py", "own"),  # the keys of a query's own sample, besides those of its shared prompt
    ("r1jax/models/ring.py", "own"),  # the columns of a row that belong to this device of the ring
}


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: pathlib.Path) -> list[str]:
    """Returns the docstrings and comments of a source, without the code quoted in them."""
    source = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if type(node).__name__ in TRACKED]
    texts = [ast.get_docstring(node, clean=False) or "" for node in nodes]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [re.sub(r"`[^`]*`", "", text) for text in texts]


def names(path: pathlib.Path) -> set[str]:
    """Returns every name that a source gives to a variable, an argument, a function, a class or a keyword."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for field in ("id", "arg", "name", "attr"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                result.add(name.strip("_"))
    return result


def words_in(texts: list[str]) -> list[str]:
    """Returns the lines that use a word of WORDS in another sense than TRUE_USES."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if WORDS.search(TRUE_USES.sub("", line))]


def test_no_two_classes_share_a_name():
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name_of(path)}:{node.lineno}")
    assert {name: at for name, at in places.items() if len(at) > 1} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_and_comments_use_plain_words(path):
    assert words_in(prose(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_names_say_what_they_hold(path):
    vague = {name for name in names(path) if name.lower() in VAGUE or WORDS.fullmatch(name)}
    assert {name for name in vague if (name_of(path), name) not in ALLOWED_NAMES} == set()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_use_plain_words(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert words_in([re.sub(r"`[^`\n]*`", "", text)]) == []
