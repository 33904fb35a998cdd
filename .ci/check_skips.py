"""Compare the skipped tests of a JUnit file with the committed list: check_skips.py JUNIT_XML EXPECTED_SKIPS.

Exit code 1 when a test was skipped that is not listed, or one that must never be skipped.
"""

import pathlib
import sys
import xml.etree.ElementTree

NEVER = ("sandbox", "jetstream", "parity", "chromium")  # their absence would hide what the project promises


def skipped(junit: pathlib.Path) -> dict[str, str]:
    """Returns {test id: reason} of the skipped tests in a JUnit file."""
    cases = xml.etree.ElementTree.parse(junit).iter("testcase")
    found = {}
    for case in cases:
        mark = case.find("skipped")
        if mark is not None:
            found[f"{case.get('classname')}::{case.get('name')}"] = mark.get("message", "")
    return found


def main(junit: pathlib.Path, expected: pathlib.Path) -> int:
    """Prints every skip with its reason and returns the exit code."""
    listed = [line.strip() for line in expected.read_text(encoding="utf-8").splitlines()]
    listed = [line for line in listed if line and not line.startswith("#")]
    found = skipped(junit)
    print(f"{len(found)} skipped tests, {len(listed)} expected")
    failures = 0
    for test, reason in found.items():
        never = any(word in test.lower() or word in reason.lower() for word in NEVER)
        verdict = "must not be skipped" if never else "expected" if test in listed else "not in the list"
        failures += verdict != "expected"
        print(f"  {test}: {reason} ({verdict})")
    for test in sorted(set(listed) - set(found)):
        print(f"  {test}: listed, but not skipped; take it off the list")
    return int(failures > 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
