r"""Rows of public data sets under the field names that r1jax uses, recognised by the fields that they have.

A row keeps every field that is not read as another one. What the user maps (THEIRS=OURS) is never overwritten.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax.data import program_tests, turns
from r1jax.data.boxes import last_box

COLUMNS = "config.data.columns"  # the field that maps names; errors name it
FIELDS = (
    *(
        "id",
        "task",
        "prompt",
        "answer",
        "reference",
        "tests",
        "response",
        "messages",
        "chosen",
        "rejected",
        "safe",
        "unsafe",
    ),
    *("solution", "language", "source", "meta", "kind", "system", "choices", "accepted", "wrong", "generators"),
    *turns.REASONING,
)
ID_FIELDS = ("unique_id", "task_id", "question_id", "problem_id", "uuid")  # read as id where they differ in every row
SYNONYMS = {  # our field: names that public sets give it, read where exactly one of them is there
    "prompt": ("problem", "question", "instruction", "query"),
    "answer": ("expected_answer", "final_answer", "ground_truth"),
    "response": ("output", "completion", "generated_solution"),
}
LIKELY = {  # names that a hint proposes; read only when mapped
    "prompt": ("description", "text", "input", "user", "task_description", "question_content", "content"),
    "answer": ("solution", "target", "label", "gold", "correct_answer", "reference", "result", "output", "response"),
    "response": (
        "solution",
        "target",
        "assistant",
        "generation",
        "generations",
        "answer",
        "text",
        "reasoning_solution",
    ),
    "tests": ("test", "test_cases", "unit_tests", "input_output", "public_tests"),
}
KNOWN = {*FIELDS, *ID_FIELDS, *(name for names in SYNONYMS.values() for name in names), "options", "answerKey"}
_BY_SMALL_LETTERS = {name.lower(): name for name in KNOWN}
_OPTION_LINES = re.compile(r"^[ \t]*\(?A[.):].*\n(?:.*\n)*?[ \t]*\(?B[.):]", re.MULTILINE)
_LETTERS = "ABCDEFGHIJ"
_OWN_LETTER = re.compile(r"\s*\(?([A-J])[.):]\s*")  # of a choice that brings its letter
_WORKED_END = re.compile(r"\s*(?<!#)####(?!#)[ \t]*(\S[^\n]*?)\s*\Z")


def mapping(columns: Sequence[str]) -> dict[str, str]:
    """Returns {their name: ours} of THEIRS=OURS.

    ValueError, naming the field, for another form, an unknown or repeated name.
    """
    ours_by_theirs: dict[str, str] = {}
    for column in columns:
        theirs, equals, ours = (part.strip() for part in column.partition("="))
        if not (theirs and equals and ours):
            raise ValueError(f"{COLUMNS}: {column!r} is not THEIRS=OURS, as in problem=prompt")
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, 1)
            raise ValueError(
                f"{COLUMNS}: {column!r}: no field {ours!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELDS)}")
            )
        if theirs in ours_by_theirs or ours in ours_by_theirs.values():
            raise ValueError(f"{COLUMNS}: {column!r}: {theirs if theirs in ours_by_theirs else ours!r} is mapped twice")
        ours_by_theirs[theirs] = ours
    return ours_by_theirs


class MappedColumns:
    """What is seen of the fields that a mapping names, row by row."""

    def __init__(self, names: Mapping[str, str]):
        self._missing = dict(names)  # those that no row has had
        self._columns: dict[str, None] = {}  # of all rows, in order
        self._first: list[str] | None = None  # columns of the first row

    def see(self, row: Mapping) -> None:
        """Takes note of a row."""
        if self._first is None:
            self._first = list(row)
        if self._missing:
            self._columns |= dict.fromkeys(row)
            self._missing = {theirs: ours for theirs, ours in self._missing.items() if _at(row, theirs) is None}

    def check(self, path: str) -> None:
        """Raises ValueError when no row had a field that is mapped."""
        for theirs, ours in self._missing.items():
            near = difflib.get_close_matches(theirs, self._columns, 1)
            listed = ", ".join(map(repr, self._first or ())) or "no fields"
            meant = f"; did you mean {near[0]!r}?" if near else f"; the first row has {listed}"
            raise ValueError(f"{path}: no row has the field {theirs!r} of {COLUMNS}={theirs}={ours}{meant}")


def canonical(row: Mapping, names: Mapping[str, str], place: str) -> tuple[dict, list[str]]:
    """Returns (the fields of a row under our names, remarks on how fields were read).

    `names` is {their name: ours}. Raises ValueError, naming the place, for a row that has no prompt or that cannot be
    read.
    """
    fields, remarks = _renamed(row, names)
    try:
        for recognise in (
            _system,
            _preferences,
            program_tests.read,
            _choices,
            _verl,
            _alpaca,
            _worked,
            _synonyms,
            _boxed,
        ):
            remarks += recognise(fields)
        remarks += _conversation(fields) + _finish(fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if "prompt" not in fields:
        raise ValueError(missing("prompt", row, place))
    return fields, remarks


def missing(field: str, row: Mapping, place: str) -> str:
    """Returns the error for a row without a field; it lists the fields of the row and names the one likely meant."""
    return f"{place}: field {field!r} is missing; {what_it_has(field, row)}"


def what_it_has(field: str, row: Mapping) -> str:
    """Returns the second half of `missing`: the fields of the row, and the option that maps the one likely meant."""
    likely = _likely(field, list(row)) or "NAME"
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}; map one with --{COLUMNS}={likely}={field}"


def _likely(field: str, names: list[str]) -> str:
    """Returns which of a row's names is likely a field; "" where none is."""
    wanted = (*SYNONYMS.get(field, ()), *LIKELY.get(field, ()))
    small = {name.lower(): name for name in names if name not in FIELDS or name in LIKELY.get(field, ())}
    for name in wanted:
        if name in small:
            return small[name]
    for name in (field, *wanted):
        if near := difflib.get_close_matches(name, small, 1, 0.7):
            return small[near[0]]
    return next((small[name] for name in small if any(word in name for word in (field, *wanted))), "")


def _at(row: Mapping, name: str) -> object:
    """Returns a field of a row, `a.b` also being b inside a; None without it."""
    value: object = row.get(name)
    if value is None and "." in name:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _renamed(row: Mapping, names: Mapping[str, str]) -> tuple[dict, list[str]]:
    fields = {name: value for name, value in row.items() if value is not None and name not in names}
    remarks = []
    for name in list(fields):
        known = _BY_SMALL_LETTERS.get(name.lower(), name)
        if known not in row and known not in names.values():
            fields[known] = fields.pop(name)
            remarks.append(f"{name} read as {known}")
    for theirs, ours in names.items():
        value = _at(row, theirs)
        if value is not None:
            fields[ours] = value
            remarks.append(f"{theirs} mapped to {ours}")
    return fields, remarks


def _fill(fields: dict, ours: str, theirs: str, value: object) -> list[str]:
    """Sets a field that is not there, takes theirs away and returns the remark."""
    if ours in fields:
        return []
    fields.pop(theirs, None)
    fields[ours] = value
    return [f"{theirs} read as {ours}"]


def _system(fields: dict) -> list[str]:
    text = fields.get("system_prompt")
    return _fill(fields, "system", "system_prompt", text) if isinstance(text, str) else []


def _preferences(fields: dict) -> list[str]:
    """Pairs of whole conversations, as messages or as one text: the turns that both share are the prompt."""
    pair: list[Any] = [fields.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(side, str) for side in pair):
        return [] if "prompt" in fields else _transcripts(fields, pair)
    if not any(isinstance(side, list) for side in pair):
        return []
    all_remarks: list[str] = []
    before = []
    for name, side in zip(("chosen", "rejected"), pair, strict=True):
        conversation, remarks = turns.read(side, name)
        prompt, response = turns.split_last(conversation)
        if response is None:
            raise ValueError(f"field {name!r} does not end in an assistant turn")
        fields[name] = response
        before.append(prompt)
        all_remarks += remarks
    if before[0] != before[1]:
        raise ValueError("'chosen' and 'rejected' differ before their last turn; they need one prompt")
    if before[0] and "prompt" not in fields:
        fields["prompt"] = before[0]
    elif isinstance(before[0], list) and len(before[0]) > 1:
        fields["prompt"] = before[0]  # the row's prompt field holds the first turn only
    return [*all_remarks, "last turns of chosen and rejected compared, the turns before them are the prompt"]


def _transcripts(fields: dict, pair: list[str]) -> list[str]:
    mark = "\n\nAssistant:"
    sides = [side.rpartition(mark) for side in pair]
    if not all(side[1] for side in sides):
        return []
    if sides[0][0] != sides[1][0]:
        raise ValueError("'chosen' and 'rejected' differ before their last 'Assistant:'; they need one prompt")
    prompt = sides[0][0].strip()
    fields["prompt"] = prompt if "\n\nHuman:" in prompt else prompt.removeprefix("Human:").strip()
    fields["chosen"], fields["rejected"] = (side[2].strip() for side in sides)
    return ["transcripts of Human and Assistant: the last turn is compared, what comes before it is the prompt"]


def _choices(fields: dict) -> list[str]:
    """MMLU, ARC and their like: the choices become lettered lines of the prompt, the answer a letter."""
    name = "choices" if "choices" in fields else "options"
    labels, texts = _options(fields.get(name))
    asked = next((key for key in ("prompt", *SYNONYMS["prompt"]) if isinstance(fields.get(key), str)), "")
    if not texts or not asked or _OPTION_LINES.search(fields[asked]):
        return []
    if len(texts) > len(_LETTERS):
        raise ValueError(f"field {name!r} has {len(texts)} choices, at most {len(_LETTERS)} can be graded")
    answer_field = next((key for key in ("answer", "answerKey", "answer_index", "label") if key in fields), "")
    if answer_field:
        fields["answer"] = _letter(fields.pop(answer_field), labels, texts, answer_field)
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False)]
    fields["prompt"] = "\n".join([fields.pop(asked).rstrip(), *lines])
    fields.setdefault("task", "mcq")
    del fields[name]
    return [f"{asked} and {name} read as a prompt with lettered choices, task mcq"]


def _options(value: object) -> tuple[list[str], list[str]]:
    """Returns (labels, texts) of choices: a list of texts, {label: text}, or ARC's {label: [...], text: [...]}."""
    labels: list = []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, value = list(value.get("label", ())), value["text"]
    elif isinstance(value, Mapping):
        labels, value = list(value), list(value.values())
    if not isinstance(value, list) or len(value) < 2 or any(isinstance(text, Mapping | list) for text in value):
        return [], []
    if None in value:
        raise ValueError(f"one of the choices {value} is null, each needs text")
    texts = [str(text) for text in value]
    letters = [_OWN_LETTER.match(text) for text in texts]
    if all(match and match[1] == letter for match, letter in zip(letters, _LETTERS, strict=False)):
        texts = [text[match.end() :] for text, match in zip(texts, letters, strict=False) if match]
    return list(map(str, labels)) or list(_LETTERS[: len(texts)]), texts


def _letter(answer: object, labels: list[str], texts: list[str], name: str) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in labels:
            return _LETTERS[labels.index(str(answer))]
        if 0 <= answer < len(texts):
            return _LETTERS[answer]
    if isinstance(answer, str):
        bare = answer.strip().strip("().")
        matches = {index for index, label in enumerate(labels) if label == bare}
        matches |= (
            {index for index, text in enumerate(texts) if text.strip() == answer.strip()} if not matches else set()
        )
        if len(matches) == 1:
            return _LETTERS[matches.pop()]
    raise ValueError(
        f"field {name!r} is {answer!r}, needs the number of one of {len(texts)} choices from 0, its label or its text"
    )


def _verl(fields: dict) -> list[str]:
    """Rows of verl: reward_model.ground_truth is the answer, data_source the source."""
    graded = fields.get("reward_model")
    if not isinstance(graded, Mapping) or graded.get("ground_truth") is None:
        return []
    remarks = _fill(fields, "answer", "reward_model.ground_truth", graded["ground_truth"])
    if isinstance(fields.get("data_source"), str):
        remarks += _fill(fields, "source", "data_source", fields["data_source"])
    return remarks


def _alpaca(fields: dict) -> list[str]:
    more = fields.get("input")
    if "prompt" in fields or not isinstance(more, str) or not isinstance(fields.get("instruction"), str):
        return []
    fields["prompt"] = "\n\n".join(part for part in (fields.pop("instruction"), fields.pop("input")) if part.strip())
    return ["instruction and input read as prompt"]


def _worked(fields: dict) -> list[str]:
    """GSM8K: the answer is a worked solution that ends in `#### 72`."""
    answer = fields.get("answer")
    if not isinstance(answer, str) or not {"prompt", *SYNONYMS["prompt"]} & fields.keys():
        return []
    end = _WORKED_END.search(answer)
    if not end:
        return []
    fields.setdefault("solution", answer[: end.start()])
    fields["answer"] = end[1]
    return ["answer taken from behind #### of the worked answer"]


def _synonyms(fields: dict) -> list[str]:
    remarks = []
    for ours, names in SYNONYMS.items():
        if ours in fields or (ours == "answer" and "tests" in fields) or (ours == "prompt" and "messages" in fields):
            continue
        there = [name for name in names if name in fields]
        if len({repr(fields[name]) for name in there}) > 1:
            candidates = " and ".join(map(repr, there))
            raise ValueError(f"fields {candidates} may each be the {ours}; map one with --{COLUMNS}={there[0]}={ours}")
        if there:
            remarks += _fill(fields, ours, there[0], _only(fields[there[0]]))
    return remarks


def _only(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], Mapping) else value


def _boxed(fields: dict) -> list[str]:
    """Worked solutions: a box holds the answer where the row has none; one with a thought is a whole response."""
    solution = fields.get("solution")
    if not isinstance(solution, str):
        return []
    remarks = []
    if "response" not in fields and "messages" not in fields and "</think>" in solution:
        fields["response"] = solution
        remarks.append("solution, which has a thought, read as response too")
    if not {"answer", "tests"} & fields.keys() and (box := last_box(solution)):
        fields["answer"] = box
        remarks.append("answer taken from the last \\boxed{} of the solution")
    return remarks


def _conversation(fields: dict) -> list[str]:
    """Messages and conversations: the last assistant turn is the response, the turns before it are the prompt."""
    name = next((name for name in ("messages", "conversations", "conversation") if name in fields), "")
    remarks: list[str] = []
    if name:
        conversation, remarks = turns.read(fields.pop(name), name)
        conversation = _with_system(conversation, fields)
        fields["messages"] = conversation
        prompt, response = turns.split_last(conversation)
        if "prompt" not in fields or (response is not None and "response" not in fields and _is_first(fields, prompt)):
            fields["prompt"] = prompt
        if response is not None and "response" not in fields:
            fields["response"] = response
        remarks.append(f"{name}: the last assistant turn read as response, the turns before it as prompt")
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and turns.is_written(prompt):
        remarks.append("prompt, a conversation as JSON text, read as messages")
        prompt = fields["prompt"] = turns.read(prompt, "prompt")[0]
    if isinstance(prompt, list):
        fields["prompt"], prompt_remarks = turns.read(prompt, "prompt")
        remarks += prompt_remarks
    if (
        isinstance(prompt, str | list)
        and not name
        and isinstance(fields.get("system"), str)
        and fields["system"].strip()
    ):
        asked: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else fields["prompt"]
        fields["prompt"] = _with_system(asked, fields)
        remarks.append("system read as the system turn of the prompt")
    return remarks


def _is_first(fields: Mapping, turns_before: str | list[dict]) -> bool:
    """Returns whether a row's prompt is only the first of several turns, so that the response does not answer it."""
    return isinstance(turns_before, list) and sum(turn["role"] == "user" for turn in turns_before) > 1


def _with_system(conversation: list[dict], fields: Mapping) -> list[dict]:
    system = fields.get("system")
    if not isinstance(system, str) or not system.strip() or conversation[0]["role"] == "system":
        return conversation
    return [{"role": "system", "content": system}, *conversation]


def _finish(fields: dict) -> list[str]:
    """Checks types, turns id, answer and source into text, and merges a thought from a separate column."""
    for name in ("response", "chosen", "rejected"):
        if isinstance(fields.get(name), list):
            conversation, _ = turns.read(fields[name], name)
            if len(conversation) != 1 or conversation[0]["role"] != "assistant":
                raise ValueError(
                    f"field {name!r} is a list of {len(conversation)} messages, one assistant turn is needed"
                )
            fields[name] = conversation[0]["content"]
    for name, kinds in {"id": (str, int), "answer": (str, int, float), "source": (str, int)}.items():
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a string or " + ("a number" if name == "answer" else "an integer")
            raise ValueError(f"field {name!r} is {type(value).__name__}, {wanted} is needed")
        fields[name] = str(value)
    if not fields.get("id", "-").strip():
        raise ValueError("field 'id' is empty; give it text or leave it out")
    for name in ("task", "response", "chosen", "rejected", "language"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"field {name!r} is {type(fields[name]).__name__}, a string is needed")
    if not isinstance(fields.get("prompt", ""), str | list):
        raise ValueError(
            f"field 'prompt' is {type(fields['prompt']).__name__}, a string or a list of messages is needed"
        )
    return _merge_thought(fields)


def _merge_thought(fields: dict) -> list[str]:
    if "response" not in fields:
        return []
    response, remarks = turns.with_thought(fields["response"], fields)
    if remarks:
        messages = fields.get("messages")
        if messages and messages[-1]["content"] == fields["response"]:
            fields["messages"] = [*messages[:-1], messages[-1] | {"content": response}]
        fields["response"] = response
    return remarks
