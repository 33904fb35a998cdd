"""Tests of programs as public sets write them, turned into the `tests` that the code grader runs (docs/programs.md)."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

OUTPUT_CHECKED = (  # several outputs may be right
    *("checker", "generated_checker", "custom_checker", "checker_code", "special_judge", "spj", "validator"),
    *("interactive", "interaction_format", "interactor"),
)
FUNCTION_NAMES = ("fn_name", "func_name", "function_name")  # fields that name the function which a test calls
TYPES = ("testtype", "test_type", "type")  # fields that name the way to run a test, which is one of the next two
BY_INPUT = ("stdin", "stdio", "stdin_stdout", "stdin-stdout", "standard_input")
BY_CALL = ("functional", "function", "function_call", "call", "call_based", "call-based")
IGNORED = frozenset(  # fields of tests that do not change which outputs are right, or lower the limits of the sandbox
    "id name source url split version comment comments note notes description explanation difficulty rating tags score "
    "weight points hidden public is_public time_limit time_limit_s timeout memory_limit".split()
)
_TYPING = re.compile(r"\b(?:Any|Callable|Deque|Dict|Iterable|Iterator|List|Optional|Sequence|Set|Tuple|Union)\b")
# Tests of a function compare plain values: tuples count as lists, and the expected value may be a list's only member.
SAME = """
def _plain(value):
    return [_plain(member) for member in value] if isinstance(value, (list, tuple)) else value

def _same(got, expected):
    return _plain(got) == expected
"""
SAME_OR_ONLY = """
def _plain(value):
    return [_plain(member) for member in value] if isinstance(value, (list, tuple)) else value

def _same(got, expected):
    got = _plain(got)
    return got == expected or (isinstance(expected, list) and len(expected) == 1 and got == expected[0])
"""
EITHER = """
def _tested():
    try:
        solution = Solution()
    except KeyError:
        return {name}
    return solution.{name}
"""
UNPACK = (
    "json.dumps(json.loads(pickle.loads(zlib.decompress(base64.b64decode(TEXT))))), in a Python of your own and only "
    "for a file you trust"
)


def read(fields: dict) -> list[str]:
    """Gives a row of a known shape `tests`, in place, and returns remarks.

    Raises ValueError for tests that the grader cannot run.
    """
    remarks: list[str] = []
    if "tests" in fields:
        fields["tests"] = as_calls(parsed(fields["tests"], "tests"), fields)
    else:
        for needed, convert in SHAPES:
            if needed <= fields.keys():
                remarks = [convert(fields)]
                fields.setdefault("task", "code")
                break
    tests = fields.get("tests")
    if tests is None:
        return []
    for name in OUTPUT_CHECKED:
        if fields.get(name) or (isinstance(tests, Mapping) and tests.get(name)):
            raise ValueError(_checked(name))
    return remarks


def _checked(name: str) -> str:
    return f"field {name!r} is given: rows with more than one right output cannot be graded; leave the row out"


def refuse_unknown(tests: Mapping, known: Iterable[str]) -> None:
    """Raises ValueError for the first unknown field of tests, or of one test, that may change what is right."""
    for name, value in tests.items():
        if name in known or name in IGNORED or value is None or value in ("", [], {}):
            continue
        if name in OUTPUT_CHECKED and value is False:
            continue
        if name in OUTPUT_CHECKED:
            raise ValueError(_checked(name))
        near = difflib.get_close_matches(name, known, 1, 0.5)
        remedy = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"field {name!r} is {str(value)[:60]!r}, which this grader does not read and which may change what is "
            f"right; {remedy}Take the field away if equality is what is right, else leave the row out"
        )


def as_calls(tests: object, row: Mapping) -> object:
    """Returns tests that call a function with plain values as python-asserts; all others as they are.

    Such are cases {input, output} of type functional (LiveCodeBench: each line of the input is an argument, in JSON)
    and inputs and outputs beside `fn_name` (APPS: lists of arguments). The function's name is a field of the tests, of
    one of them, of their metadata or of the row's. Raises ValueError for those that name no function, for types that
    are not known and mixed ones, and for fields that cannot be read.
    """
    if isinstance(tests, list):
        tests = {"cases": tests}
        unchanged = tests["cases"]
    else:
        unchanged = tests
    if not isinstance(tests, Mapping) or tests.get("kind", "functional") not in ("functional", "stdin-stdout"):
        return unchanged
    cases = _as_cases(tests)
    if cases is None:
        return unchanged
    places = [*cases, tests]
    kinds = {str(place[name]).lower() for place in places for name in TYPES if place.get(name)}
    if unknown := sorted(kinds - {*BY_INPUT, *BY_CALL}):
        raise ValueError(
            f"a test is of type {unknown[0]!r}; {BY_INPUT[0]} and {BY_CALL[0]} can be graded, leave the row out"
        )
    names = {str(name) for place in (*places, row) for name in _names(place)}
    named = any(name for place in places for name in _names(place))
    if not (named or kinds & {*BY_CALL} or tests.get("kind") == "functional"):
        return unchanged
    if kinds & {*BY_INPUT}:
        raise ValueError("some tests are of type stdin and some call a function; give the row one kind of tests")
    if len(names) != 1:
        named_functions = ", ".join(sorted(names)) or "none"
        raise ValueError(
            f"the tests are of type functional and name the function: {named_functions}; give its name as 'fn_name', or "
            "leave the row out"
        )
    call_fields = (*FUNCTION_NAMES, *TYPES, "metadata")
    refuse_unknown(tests, ("kind", "cases", "test_cases", "inputs", "outputs", "starter_code", *call_fields))
    for case in cases:
        refuse_unknown(case, ("input", "output", *call_fields))
    arguments = [_arguments(case.get("input")) for case in cases]
    expected = [_expected(case) for case in cases]
    return _calls(names.pop(), arguments, expected, None, SAME_OR_ONLY if "inputs" in tests else SAME)


def _as_cases(tests: Mapping) -> list[Mapping] | None:
    """Returns the tests one by one as {input, output, ...}.

    None where they are neither a list of objects nor two lists of one length.
    """
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
        return [{"input": text, "output": expected} for text, expected in zip(inputs, outputs, strict=True)]
    cases = tests.get("cases", tests.get("test_cases"))
    return cases if isinstance(cases, list) and all(isinstance(case, Mapping) for case in cases) else None


def _names(place: Mapping) -> Iterator[str]:
    """Yields the names of the tested function that a row, its tests, one test or their metadata states."""
    metadata = place.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            metadata = None
    for fields in (place, metadata):
        if isinstance(fields, Mapping):
            yield from (fields[name] for name in FUNCTION_NAMES if fields.get(name))


def _arguments(value: object) -> list:
    return value if isinstance(value, list) else [parsed(line, "input") for line in _lines(value)]


def _expected(case: Mapping) -> object:
    output = case.get("output")
    return output if isinstance(case.get("input"), list) else parsed(output, "output")


def parsed(value: object, name: str) -> Any:
    """Returns a value, read from JSON if it is text. ValueError when that fails."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"field {name!r} is text that is not JSON: {value[:40]!r}") from None


def _human_eval(fields: dict) -> str:
    fields["tests"] = {"kind": "python-check", "code": fields.pop("test"), "entry_point": fields.pop("entry_point")}
    return "test and entry_point read as tests of kind python-check, task code"


def _mbpp(fields: dict) -> str:
    asserts = fields.pop("test_list")
    if not isinstance(asserts, list) or not asserts:
        raise ValueError("field 'test_list' is empty, a list of asserts is needed")
    setup = [*(fields.pop("test_imports", None) or ()), fields.pop("test_setup_code", None) or ""]
    fields["tests"] = {"kind": "python-asserts", "setup": "\n".join(setup).strip(), "asserts": asserts}
    asked = fields.pop("text", None) if "prompt" not in fields else fields["prompt"]
    if isinstance(asked, str) and asserts[0] not in asked:
        fields["prompt"] = f"{asked.rstrip()}\nYour code should pass this test:\n{asserts[0]}"
    return "test_list read as tests of kind python-asserts, the first shown in the prompt, task code"


def _live_code_bench(fields: dict) -> str:
    cases = []
    for name in ("public_test_cases", "private_test_cases"):
        text = fields.pop(name, None)
        if isinstance(text, str) and text.strip() and not text.lstrip().startswith(("[", "{")):
            raise ValueError(
                f"field {name!r} is compressed and pickled, and a pickle can run code; write it as JSON: {UNPACK}"
            )
        listed = parsed(text or [], name)
        if not isinstance(listed, list) or not all(isinstance(case, Mapping) for case in listed):
            raise ValueError(f"field {name!r} is no list of test cases")
        cases += listed
    kinds = {case.get("testtype", "stdin") for case in cases}
    metadata = parsed(fields.get("metadata") or {}, "metadata")
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    starter = fields.get("starter_code") or ""
    if kinds == {"stdin"}:
        fields["tests"] = _stdin([case.get("input") for case in cases], [case.get("output") for case in cases])
    elif kinds == {"functional"} and name:
        arguments = [[parsed(line, "input") for line in _lines(case.get("input"))] for case in cases]
        expected = [parsed(case.get("output"), "output") for case in cases]
        fields["tests"] = _calls(name, arguments, expected, "class Solution" in starter, SAME)
    else:
        raise ValueError(
            f"test cases of testtype {', '.join(map(str, sorted(kinds))) or 'none'}: stdin, or functional with "
            "metadata.func_name, can be graded"
        )
    fields["prompt"] = _with_starter(fields.pop("question_content"), starter)
    return "LiveCodeBench's test cases read as tests, starter_code shown in the prompt, task code"


def _lines(text: object) -> list[str]:
    return [line for line in str(text or "").split("\n") if line.strip()]


def _code_contests(fields: dict) -> str:
    files = [fields.get(name) for name in ("input_file", "output_file")]
    if any(isinstance(name, str) and name.strip() for name in files):
        raise ValueError(
            "fields 'input_file' and 'output_file': programs that read or write files cannot be graded; leave the row "
            "out"
        )
    inputs, outputs = [], []
    for name in ("public_tests", "private_tests", "generated_tests"):
        tests = parsed(fields.pop(name, None) or {}, name)
        if isinstance(tests, list):  # of {input, output}
            tests = {side: [case.get(side) for case in tests] for side in ("input", "output")}
        inputs += tests.get("input", ())
        outputs += tests.get("output", ())
    fields["tests"] = _stdin(inputs, outputs)
    if "prompt" not in fields and isinstance(fields.get("description"), str):
        fields["prompt"] = fields.pop("description")
    return "public, private and generated tests read as tests of kind stdin-stdout, task code"


def _apps(fields: dict) -> str:
    tests = parsed(fields.pop("input_output"), "input_output")
    if not isinstance(tests, Mapping) or not {"inputs", "outputs"} <= tests.keys():
        raise ValueError("field 'input_output' has no 'inputs' and 'outputs'; the row has no tests, leave it out")
    starter = fields.get("starter_code") or ""
    if name := tests.get("fn_name"):
        fields["tests"] = _calls(name, tests["inputs"], tests["outputs"], "class Solution" in starter, SAME_OR_ONLY)
    else:
        fields["tests"] = _stdin(*([_text(value) for value in tests[side]] for side in ("inputs", "outputs")))
    asked = next((name for name in ("prompt", "question", "problem") if isinstance(fields.get(name), str)), "")
    if asked:
        fields["prompt"] = _with_starter(fields.pop(asked), starter)
    return "input_output read as tests, starter_code shown in the prompt, task code"


def _text(value: object) -> object:
    return "\n".join(value) if isinstance(value, list) and all(isinstance(line, str) for line in value) else value


def _with_starter(question: object, starter: str) -> object:
    if not starter.strip() or not isinstance(question, str) or starter.strip() in question:
        return question
    names = sorted(set(_TYPING.findall(starter))) if "import" not in starter else []
    imports = (
        f"from typing import {', '.join(names)}\n\n" if names else ""
    )  # what else a signature names is not defined
    return f"{question.rstrip()}\n\nBegin your program with this code:\n```python\n{imports}{starter.rstrip()}\n```"


def _stdin(inputs: list, outputs: list) -> dict:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"{len(inputs)} inputs and {len(outputs)} outputs of tests, as many of both and at least one are needed"
        )
    if not all(isinstance(text, str) for text in (*inputs, *outputs)):
        raise ValueError("inputs and outputs of tests must be text")
    pairs = zip(inputs, outputs, strict=True)
    return {"kind": "stdin-stdout", "cases": [{"input": text, "output": expected} for text, expected in pairs]}


def _calls(name: str, arguments: list, expected: list, method: bool | None, same: str) -> dict:
    """Returns python-asserts that call a function, or a method of the class Solution, with plain values.

    With `method` None it is a method where the program defines that class.
    """
    if not str(name).isidentifier():
        raise ValueError(f"the name of the tested function, {name!r}, is no identifier")
    if not arguments or len(arguments) != len(expected) or not all(isinstance(values, list) for values in arguments):
        raise ValueError(
            f"{len(arguments)} lists of arguments and {len(expected)} results of tests, as many of both are needed"
        )
    called = f"Solution().{name}" if method else name
    if method is None:
        same, called = same + EITHER.format(name=name), "_tested()"
    asserts = [
        f"assert _same({called}({', '.join(map(repr, values))}), {result!r})"
        for values, result in zip(arguments, expected, strict=True)
    ]
    return {"kind": "python-asserts", "setup": same, "asserts": asserts}


SHAPES = (  # fields that identify a format, and the function that turns them into tests
    ({"question_content", "public_test_cases"}, _live_code_bench),
    ({"public_tests"}, _code_contests),
    ({"input_output"}, _apps),
    ({"prompt", "test", "entry_point"}, _human_eval),
    ({"test_list"}, _mbpp),
)
