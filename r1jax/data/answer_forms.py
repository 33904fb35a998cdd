r"""Other ways to write a mathematical answer, and near misses, made by work on its text.

Shares no code with the graders, so that it can measure them: `rewritings` are equal to the answer by arithmetic on its
numerals or by a rule of notation, `perturbations` are different from it.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction

_QUANTITY = re.compile(
    r"(?P<currency>\\\$)?(?P<sign>-?)(?:(?P<whole>\d+)\s*(?=\\d?frac))?"
    r"(?:\\d?frac\s*(?:\{(?P<top>\d+)\}|(?P<top_digit>\d))\s*(?:\{(?P<bottom>\d+)\}|(?P<bottom_digit>\d+))|(?P<decimal>(?=[\d.])(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?))"
    r"(?P<unit>\^\\circ|\s*\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d)?)?"
)
_WORD = re.compile(r"\\text\{\(?([A-Za-z]+)\)?\}")
_MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)
_NUMERAL = re.compile(r"(?<![\d.])\d*\.?\d+")
_UNIT_TAIL = re.compile(r"\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d)?$|\^\\circ$")
_SIGN = re.compile(
    r"(?:^|(?<=[(\[,&=])|(?<=\\\{)|(?<=matrix\}))(\s*)(?:(-)|(?=\\(?:d?frac|sqrt|pi|cot)|\.?0*[1-9]|[A-Za-z]))"
)
_SPACED = {"+": " + ", "=": " = ", ",": " , "}
_ROW_BREAK = r"\\"
_NAMES = ("Alice", "odd", "west", "circle", "hyperbola")

Forms = dict[str, str]  # kind -> text


def rewritings(gold: str) -> Forms:
    """Returns texts that mean the same as a LaTeX answer, by kind; at least 5 for every kind of answer known here."""
    gold = gold.strip()
    forms = {
        "trailing_period": gold + ".",
        "dollars": f"${gold}$",
        "parentheses_delimiters": rf"\({gold}\)",
        "sentence": f"The answer is ${gold}$.",
    }
    if (word := _WORD.fullmatch(gold)) is not None:
        forms |= {
            "bare": word[1],
            "bold": rf"\textbf{{{word[1]}}}",
            "roman": rf"\mathrm{{{word[1]}}}",
            "lower": word[1].lower(),
        }
    elif (quantity := _quantity(gold)) is not None:
        forms |= _number_forms(*quantity)
    else:
        forms |= _notation_forms(gold) | _structure_forms(gold)
    return {kind: text for kind, text in forms.items() if text != gold}


def perturbations(gold: str) -> Forms:
    """Returns texts that mean something else than a LaTeX answer, by kind."""
    gold = gold.strip()
    if (word := _WORD.fullmatch(gold)) is not None:
        other = next(name for name in _NAMES if name.lower() != word[1].lower())
        letters = [letter for letter in "ABCDE" if letter != word[1]]
        return (
            {"another_option": rf"\text{{({letters[0]})}}"}
            if len(word[1]) == 1
            else {"another_word": rf"\text{{{other}}}"}
        )
    forms = {"another_number": _change(gold, 0), "another_last_number": _change(gold, -1)}
    forms["swapped_sign"] = _negated(gold)
    if (quantity := _quantity(gold)) is not None:
        value, currency, unit = quantity
        forms |= {
            "appended_digit": f"{currency}{_decimal(value) or value}1{unit}",
            "two_answers": f"{gold}, {_change(gold, 0)}",
        }
        forms["rounded"] = "" if _decimal(value) else f"{float(value):.2f}"
        forms["prefix"] = str(value)[:-1] if value.denominator == 1 and len(str(abs(value))) > 1 else ""
        forms["tenth"] = _decimal(value / 10) or "" if value else ""
        forms = {kind: text for kind, text in forms.items() if (_quantity(text) or ("",))[0] != value}
    forms |= _broken_structure(gold)
    return {kind: text for kind, text in forms.items() if text and text != gold}


def _quantity(gold: str) -> tuple[Fraction, str, str] | None:
    """Returns (value, currency sign, unit) of a text that is one rational number."""
    match = _QUANTITY.fullmatch(re.sub(r",\\!\s*", ",", gold))
    if match is None:
        return None
    if match["decimal"] is not None:
        value = Fraction(match["decimal"].replace(",", ""))
    else:
        bottom = int(match["bottom"] or match["bottom_digit"])
        if bottom == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["top"] or match["top_digit"]), bottom)
    return -value if match["sign"] else value, match["currency"] or "", match["unit"] or ""


def _decimal(value: Fraction) -> str | None:
    """Returns the finite decimal of a fraction, None if it has none."""
    for places in range(20):
        if (value * 10**places).denominator == 1:
            digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
            text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
            return ("-" if value < 0 else "") + text
    return None


def _number_forms(value: Fraction, currency: str, unit: str) -> Forms:
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    forms = {
        "doubled_fraction": rf"{sign}\frac{{{2 * top}}}{{{2 * bottom}}}{unit}",
        "dfrac": rf"{sign}\dfrac{{{top}}}{{{bottom}}}{unit}",
        "tfrac": rf"{sign}\tfrac{{{top}}}{{{bottom}}}{unit}",
        "slash": f"{sign}{top}/{bottom}{unit}",
        "variable": rf"x = \frac{{{value.numerator}}}{{{bottom}}}{unit}",
    }
    decimal = _decimal(value)
    if decimal is not None:
        forms |= {
            "decimal_zeros": f"{currency}{decimal}{'0' if '.' in decimal else '.00'}{unit}",
            "text": rf"\text{{{decimal}}}",
            "left_right": rf"\left({decimal}\right)",
            "product": rf"{_decimal(value / 10)} \times 10^{{1}}",
        }
        if not unit and not currency:
            forms |= {
                "unit": rf"{decimal}\text{{ units}}",
                "unit_word": f"{decimal} dollars",
                "currency": rf"\${decimal}",
            }
            forms["percent"] = rf"{_decimal(value * 100)}\%"
        whole, point, rest = decimal.lstrip("-").partition(".")
        if len(whole) > 3:
            grouped = f"{int(whole):,}"
            for kind, mark in (
                ("thousands", ","),
                ("thousands_braces", "{,}"),
                ("thousands_space", r"\,"),
                ("thousands_latex", r",\!"),
            ):
                forms[kind] = f"{sign}{grouped.replace(',', mark)}{point}{rest}{unit}"
    if top > bottom > 1:
        whole, rest = divmod(top, bottom)
        forms["mixed"] = rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}{unit}"
        forms["mixed_slash"] = f"{sign}{whole} {rest}/{bottom}{unit}"
    return forms


def _notation_forms(gold: str) -> Forms:
    """Returns forms that follow from rules of LaTeX notation, for any formula."""
    forms = {
        "dfrac": re.sub(r"\\d?frac(?![a-z])", r"\\dfrac", gold),
        "tfrac": re.sub(r"\\d?frac(?![a-z])", r"\\tfrac", gold),
        "braced": re.sub(r"\\(sqrt|frac)\s*(\d)(?![\d}])", r"\\\1{\2}", re.sub(r"([\^_])(\w)", r"\1{\2}", gold)),
        "cdot": re.sub(r"(\d)\s*(\\sqrt|\\pi)", r"\1 \\cdot \2", gold),
        "root_as_power": re.sub(r"\\sqrt\s*(?:\{(\d+)\}|(\d))", lambda m: f"{{{m[1] or m[2]}}}^{{1/2}}", gold),
        "spaces": re.sub(r"\s*([+=,])\s*", lambda match: _SPACED[match[1]], gold),
        "no_spaces": re.sub(r"(?<![a-z\\])\s+|\s+(?![A-Za-z])", "", gold),
        "display": rf"\displaystyle {gold}",
        "wide_space": re.sub(r"(?<=,)\s*", r"\\; ", gold) if "," in gold else rf"\;{gold}\;",
    }
    plain = forms["no_left_right"] = re.sub(r"\\(left|right)(?![a-z])\s*", "", gold)
    opened = re.sub(r"\\\{|[(\[]", r"\\left\g<0>", plain)
    forms["left_right"] = re.sub(r"\\\}|[)\]]", r"\\right\g<0>", opened)
    return forms


def _structure_forms(gold: str) -> Forms:
    """Returns forms that follow from the meaning of sets, intervals, tuples, matrices, equations and terms."""
    plain = re.sub(r"\\(left|right)(?![a-z])\s*", "", gold).strip()
    if (matrix := _MATRIX.fullmatch(plain)) is not None:
        entries = re.sub(r"(-?\d+)/(\d+)", r"\\frac{\1}{\2}", matrix[1])
        array = "c" * (1 + matrix[1].split(_ROW_BREAK)[0].count("&"))
        return {
            "bmatrix": rf"\begin{{bmatrix}}{matrix[1]}\end{{bmatrix}}",
            "matrix_fractions": rf"\begin{{pmatrix}}{entries}\end{{pmatrix}}",
            "array": rf"\left( \begin{{array}}{{{array}}}{matrix[1]}\end{{array}} \right)",
            "matrix_sums": rf"\begin{{pmatrix}}{_every_numeral(matrix[1], lambda n: f'{2 * n}/2')}\end{{pmatrix}}",
        }
    if r"\cup" in plain:
        return {"permuted": r" \cup ".join(reversed(re.split(r"\s*\\cup\s*", plain)))}
    if (members := _members(plain)) is not None:
        opening, items, closing = members
        forms = {"member_doubled": opening + ", ".join(rf"\frac{{2({item})}}{{2}}" for item in items) + closing}
        if opening in ("", r"\{") and not any(r"\pm" in item for item in items):
            turned = ", ".join([*items[1:], items[0]])
            forms |= {"permuted": opening + turned + closing, "set_braces": rf"\{{{turned}\}}", "listed": turned}
            forms["and"] = rf"{', '.join(items[:-1])} \text{{ and }} {items[-1]}"
            return forms
        if r"\infty" in plain or "[" in opening or "]" in closing:
            forms.pop("member_doubled")
            forms |= {"inequality": _inequality(opening, *items, closing), "membership": rf"x \in {plain}"}
        return {kind: text for kind, text in forms.items() if r"\pm" not in text}
    if r"\in" in plain:
        return {"without_membership": plain.split(r"\in")[1].strip()}
    if "=" in plain:
        left, right = (side.strip() for side in plain.split("="))
        if len(left) == 1:  # solved
            return {"sides_swapped": f"{right} = {left}", "right_side": right, "moved": f"{left} - ({right}) = 0"}
        return {"sides_swapped": f"{right} = {left}", "doubled_equation": f"2({left}) = 2({right})"}
    if r"\pm" in plain:
        return {"two_values": f"{plain.replace(chr(92) + 'pm', '+')}, {plain.replace(chr(92) + 'pm', '-')}"}
    if "_" in plain:
        return {}
    return {
        "doubled": rf"\frac{{2({plain})}}{{2}}",
        "parenthesised": f"({plain})",
        "minus_minus": f"-(-({plain}))",
        "plus_zero": f"{plain} + 0",
    }


def _members(plain: str) -> tuple[str, list[str], str] | None:
    """Returns (opening, members, closing) of a tuple, interval, set or bare list of at least two; else None."""
    match = re.fullmatch(r"(\(|\[|\\\{|)(.*?)(\)|\]|\\\}|)", plain, re.DOTALL)
    assert match is not None  # every part may be empty
    items, depth = [""], 0
    for character in match[2]:
        depth += (character in "({[") - (character in ")}]")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    items = [item.strip() for item in items]
    return (match[1], items, match[3]) if len(items) > 1 and bool(match[1]) == bool(match[3]) else None


def _inequality(opening: str, low: str, high: str, closing: str) -> str:
    left = "" if "infty" in low else f"{low} {'<' if opening == '(' else chr(92) + 'le'} "
    right = "" if "infty" in high else f" {'<' if closing == ')' else chr(92) + 'le'} {high}"
    return f"{left}x{right}"


def _every_numeral(text: str, write: Callable[[int], str]) -> str:
    return re.sub(r"(?<![\d/.])\d+(?![\d/.])", lambda match: write(int(match[0])), text)


def _change(gold: str, place: int) -> str:
    """Returns the answer with one of its numerals one higher in its last digit; "" when it has none.

    Units keep theirs.
    """
    end = tail.start() if (tail := _UNIT_TAIL.search(gold)) else len(gold)
    numerals = list(_NUMERAL.finditer(gold, 0, end))
    if not numerals:
        return ""
    numeral = numerals[place]
    _, point, decimals = numeral[0].partition(".")
    digits = str(int(numeral[0].replace(".", "")) + 1).zfill(len(numeral[0]) - len(point))
    changed = f"{digits[: len(digits) - len(decimals)]}{point}{digits[len(digits) - len(decimals) :]}"
    return gold[: numeral.start()] + changed + gold[numeral.end() :]


def _negated(gold: str) -> str:
    """Returns the answer with the sign of its first nonzero term (member, entry, side) changed; "" without one."""
    text = _unwrapped(gold)
    match = _SIGN.search(text)
    if match is None or not re.search(r"[1-9A-Za-z]", text):
        return ""
    return text[: match.start()] + match[1] + ("" if match[2] else "-") + text[match.end() :]


def _unwrapped(gold: str) -> str:
    return re.sub(r"\\(left|right)(?![a-z])\s*", "", gold).replace(r"\$", "")


def _broken_structure(gold: str) -> Forms:
    plain = re.sub(r"\\(left|right)(?![a-z])\s*", "", gold).strip()
    if (matrix := _MATRIX.fullmatch(plain)) is not None:
        rows = matrix[1].split(_ROW_BREAK)
        write = lambda rows: rf"\begin{{pmatrix}}{_ROW_BREAK.join(rows)}\end{{pmatrix}}"  # noqa: E731
        return {"dropped_member": write(rows[:-1]), "permuted_members": write(reversed(rows))}
    if r"\cup" in plain:
        return {"dropped_member": re.split(r"\s*\\cup\s*", plain)[0]}
    if (members := _members(plain)) is None:
        return {}
    opening, items, closing = members
    write = lambda parts: opening + ", ".join(parts) + closing  # noqa: E731
    forms = {
        "dropped_member": items[0] if len(items) == 2 else write(items[:-1]),
        "added_member": write([*items, "77"]),
    }
    if opening in ("(", "["):
        forms["permuted_members"] = write(reversed(items)) if items[0] != items[-1] else ""
    if "[" in opening or "]" in closing or r"\infty" in plain:
        forms.pop("added_member")
        low, high = {"(": "[", "[": "("}[opening], {")": "]", "]": ")"}[closing]
        ends = [("(" if "infty" in items[0] else low), (")" if "infty" in items[1] else high)]
        forms["swapped_ends"] = f"{ends[0]}{items[0]}, {items[1]}{ends[1]}"
    return forms


def option_rewritings(letter: str, options: Mapping[str, str]) -> Forms:
    """Returns texts that name one option of a multiple choice, by kind; its text if no other option has it."""
    text = options[letter]
    forms = {
        "letter": letter,
        "parentheses": f"({letter})",
        "period": f"{letter}.",
        "text_command": rf"\text{{{letter}}}",
        "text_parentheses": rf"\text{{({letter})}}",
        "bold": f"**{letter}**",
        "sentence": f"The answer is {letter}.",
        "with_text": f"{letter}) {text}",
        "period_with_text": f"{letter}. {text}",
    }
    if len(text) > 1 and [other.casefold() for other in options.values()].count(text.casefold()) == 1:
        forms |= {"own_text": text, "sentence_with_text": f"The answer is {text}"}
    return forms


def option_perturbations(letter: str, options: Mapping[str, str]) -> Forms:
    """Returns texts that name another option, or two, by kind."""
    others = [other for other in options if other != letter]
    forms = {f"another_option_{place}": other for place, other in enumerate(others)}
    differing = [other for other in others if options[other].casefold() != options[letter].casefold()]
    forms |= {"two_options": f"{letter} or {others[0]}", "two_labels": f"({others[0]})({letter})"}
    if differing:
        other = differing[0]
        forms["another_with_text"] = f"{other}) {options[other]}"
        forms["anothers_text"] = f"{letter}) {options[other]}"
        if len(options[other]) > 1:
            forms["another_own_text"] = options[other]
    return forms
