"""Every case of io_cases.jsonl is held by a test: one that names it in a call of `io_case`."""

import pathlib
import re

from io_cases import rows

CALL = re.compile(r"io_case\(\s*\"([^\"]+)\"")


def test_every_case_is_named_by_a_test():
    sources = [path.read_text(encoding="utf-8") for path in pathlib.Path(__file__).parent.glob("test_*.py")]
    named = {name for source in sources for name in CALL.findall(source)}
    assert set(rows()) - named == set()
    assert named - set(rows()) == set()
