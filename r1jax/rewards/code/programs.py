"""Finds the program in a response: the last block of code in a language that can be run."""

import re
import textwrap
from dataclasses import dataclass

from r1jax.rewards.answers.extraction import extract, fences
from r1jax.rewards.code.claims import compiles

_VERSION = r"(?:[\s-]*v?\d[\w.]*)?(?![\w+#])"  # version of a language: 3, 3.11, -17, 20
_BEFORE = r"[{.\s]*(?:lang(?:uage)?\s*[-=:]\s*|language-)?[\"']?"
_PYTHON = re.compile(rf"{_BEFORE}(?:[ci]?python|pypy|py){_VERSION}(?![\s-]*(?:repl|traceback|console))", re.IGNORECASE)
_CPP = re.compile(
    rf"{_BEFORE}(?:gnu\s*|ms\s*)?(?:c\+\+|cpp|cplusplus|cxx|cc|[gu]\+\+|gnu\+\+|clang\+\+){_VERSION}", re.IGNORECASE
)
_FILE = re.compile(r"(?:(?:title|name|file|filename|path)\s*[:=]?\s*)?[\"']?[\w./-]+\.(py|cpp|cc|cxx)\b", re.IGNORECASE)
_MAX_LABEL_CHARACTERS = 80
_OTHERS = re.compile(
    rf"{_BEFORE}(java|javascript|js|typescript|ts|node(?:js)?|c|c#|csharp|cs|go(?:lang)?|rust|rs|kotlin|kt|ruby|rb|swift|scala|haskell|hs|php|"
    rf"perl|r|julia|lua|pascal|delphi|fortran|ocaml|elixir|erlang|clojure|dart|racket|f#|matlab|octave|cuda|cython|d|nim|zig|"
    rf"lisp|scheme|prolog|cobol|ada|groovy|vb(?:\.net)?|visual basic|objective-c|assembly|asm){_VERSION}",
    re.IGNORECASE,
)
_INCLUDES = re.compile(r"^[ \t]*#[ \t]*include\b", re.MULTILINE)


@dataclass(frozen=True)
class SourceCode:
    """A program as the model wrote it."""

    text: str
    language: str  # python, cpp, or the name of a language that cannot be run


def extract_program(response: str) -> SourceCode | None:
    """Returns the program in the text after the thought, None if there is none.

    It is the last Python or C++ block; else the last block without a language, as C++ if it includes a header, else as
    Python; else the last one in another programming language. A text without blocks is a program as a whole. Unclosed
    blocks do not count.
    """
    if extract(response, "whole") is None:
        return None
    text = response.rpartition("</think>")[2].strip("\n")  # a bare function body begins with its indent
    blocks, opened = fences(text)
    read = [(language_of(label), content) for label, content in reversed(blocks)]
    for wanted in (("python", "cpp"), ("",)):
        for language, content in read:
            if language in wanted:
                return _source(content, language)
    for language, content in read:
        if language != "text":
            return SourceCode(content, language)
    return None if blocks or opened else _source(text, "")


def language_of(label: str) -> str:
    """Returns the programming language that a block's label names, such as python; "" without a label, else "text"."""
    label = label.strip()[:_MAX_LABEL_CHARACTERS]
    if not label:
        return ""
    if _PYTHON.match(label):
        return "python"
    if _CPP.match(label):
        return "cpp"
    if other := _OTHERS.match(label):
        return other[1].lower()
    if file := _FILE.match(label):
        return "python" if file[1].lower() == "py" else "cpp"
    return "text"


def _source(text: str, language: str) -> SourceCode:
    language = language or ("cpp" if _INCLUDES.search(text) and "main" in text else "python")
    if language == "python" and text[:1] in (" ", "\t", "\n") and not compiles(text):
        # This dedents a whole program; the bare body of a function does not compile and keeps its indent.
        flush = textwrap.dedent(text)
        text = flush if compiles(flush) else text
    return SourceCode(text, language)
