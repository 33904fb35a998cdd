r"""Brings formulas of people and models to one notation: Unicode and styled LaTeX become plain LaTeX.

The main tables are `_UNICODE` (characters) and `_STYLE` (commands that change the look and not the value). Every
pattern is linear in the text's length.
"""

import functools
import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₙₓₖₘ", "0123456789+-()aenxkm")
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi psi omega"
).split()
_UNICODE = {  # character -> LaTeX; applied before NFKC folds widths and styles
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "－": "-", "﹣": "-",
    "×": r"\times ", "✕": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": "/",
    "⁄": "/", "∕": "/", "／": "/", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≃": r"\approx ", "≅": r"\cong ", "≡": r"\equiv ", "∝": r"\propto ", "∈": r"\in ", "∉": r"\notin ",
    "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∅": r"\emptyset ", "⌀": r"\emptyset ", "ø": r"\emptyset ",
    "Ø": r"\emptyset ", "∨": r"\lor ", "∧": r"\land ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∠": r"\angle ", "△": r"\triangle ",
    "⊥": r"\perp ", "∥": r"\parallel ", "→": r"\to ", "⇒": r"\to ", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ",
    "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "°": r"^\circ ", "˚": r"^\circ ",
    "º": r"^\circ ", "℃": r"^\circ\mathrm{C}", "℉": r"^\circ\mathrm{F}", "Ω": r"\Omega ", "µ": r"\mu ",
    "′": "'", "’": "'", "‘": "'", "″": "''", "“": '"', "”": '"', "、": ",", "，": ",", "；": ";", "：": ":", "。": ".",
    "％": "%", "＄": "$", "￥": "¥", "…": r"\ldots ", "ⅇ": "e", "ⅈ": "i", "ϕ": r"\phi ", "ϵ": r"\epsilon ", "∣": "|", "∶": ":",
    "【": "[", "】": "]", "「": '"', "」": '"',
}  # fmt: skip
_UNICODE |= {chr(0x3B1 + place): rf"\{name} " for place, name in enumerate(n for n in _GREEK[:17])}
_UNICODE |= {chr(0x3C3 + place): rf"\{name} " for place, name in enumerate(_GREEK[17:])}
_UNICODE |= {"ς": r"\sigma ", "Γ": r"\Gamma ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ", "Σ": r"\Sigma "}
_UNICODE |= {"Φ": r"\Phi ", "Ψ": r"\Psi ", "Π": r"\Pi ", "Ξ": r"\Xi "}
_TABLE = str.maketrans(_UNICODE)
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑₙₓₖₘ]+")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")

_WITH_COLOUR = re.compile(r"\\(?:textcolor|color|colorbox)\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}")
_STYLE = re.compile(  # commands without a meaning; the content of their braces stays
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|scriptscriptstyle|limits|nolimits|"
    r"bf|rm|it|sf|tt|cal|em|mathit|mathsf|mathtt|mathnormal|underline|underbrace|emph|uline|boxed|fbox|"
    r"normalsize|small|large|Large|LARGE|huge|Huge|phantom|hspace|vspace|hfill|strut|ensuremath|bold|textsf|texttt|textsc|"
    r"mathop|mathrel|mathord|mathbin|nonumber|notag|tag)(?![A-Za-z])\*?"
)
_EMPTY_DELIMITER = re.compile(r"\\(?:left|right)\s*\.")
_SPACING = re.compile(
    r"(?<!\\)\\(?:[!,;:> \n]|qquad|quad|(?:neg)?(?:thin|med|thick)space(?![A-Za-z])|enspace(?![A-Za-z]))|~"
)
_THIN_SPACE = re.compile(r"(?<=\d)\s*(?:\\[,;:!> ]|~|\{\s*\\[,;: ]\s*\})\s*(?=\d{3}(?!\d))")
_TEXT_COMMA = re.compile(r"\\(?:text|mbox|mathrm|textrm)\s*\{\s*,\s*\}")
_BRACED_COMMA = re.compile(r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)")
_COMMA_SPACE = re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3})")
_ROWS = re.compile(r"\\begin\s*\{(?:[pbvBV]?(?:small)?matrix|array|cases)\*?\}")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")  # escaped twice
_ALIGNED = re.compile(r"\\(?:begin|end)\s*\{(?:equation|align|aligned|gather|gathered|split|multline)\*?\}")
_SYSTEM = re.compile(
    r"\\left\s*\\\{\s*\\begin\s*\{array\}\s*\{[lcr| ]*\}(.*?)\\end\s*\{array\}\s*\\right\s*\.", re.DOTALL
)
_UNION = re.compile(r"([)\]])\s*U\s*([(\[])")
_AMPERSAND_BEFORE_EQUALS = re.compile(r"(?<!\\)&\s*(?==)")
_NEXT_STEP = re.compile(r"\\\\\s*&?\s*(?==)")
_LINE_BREAK = re.compile(r"\\\\(?:\[[^\]]*\])?")
_AMPERSAND = re.compile(r"(?<!\\)&(?=\s*(?:=|\\[a-z]|<|>|$))|&\s*(?==)")
_HIDDEN = re.compile(
    r"\\(?:tag|label|phantom|hphantom|vphantom|hspace|vspace)\*?\s*\{[^{}]*\}|\\(?:blacksquare|qed|checkmark|therefore|because)(?![A-Za-z])"
)
_END_MARKS = re.compile("[✓✔✅∴∵■□∎☑]")
_NOTHING = re.compile(r"(?<![\\])\{\s*\}")
_BRACED_SIGN = re.compile(r"(?<![\\A-Za-z\}_^])\{\s*([:=<>+-])\s*\}")
# A formula between delimiters; its content is in the one group that matched.
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)|(?<![\\$])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?![\d$])|(?<![\\$\d])\$\s+([^$\n]*?[\\=^_][^$\n]*?)\s+\$(?![\d$])|"
    r"\\begin\{(?:equation|align|gather)\*?\}(.+?)\\end\{(?:equation|align|gather)\*?\}",
    re.DOTALL,
)
_MATH_MARK = re.compile(r"\\[()\[\]]")
_DOLLARS = re.compile(r"(?<!\\)\$")
_COMMANDS = {  # other names of one command
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge", "leqslant": "le",
    "geqslant": "ge", "leqq": "le", "geqq": "ge", "lt": "<", "gt": ">", "neq": "ne", "infin": "infty", "varnothing": "emptyset",
    "O": "emptyset", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "vert": "|", "lvert": "|",
    "rvert": "|", "mid": "|", "Vert": "|", "degree": "^\\circ ", "degrees": "^\\circ ", "textdegree": "^\\circ ", "ast": "*", "star": "*", "div": "/",
    "vee": "lor", "wedge": "land", "lnot": "neg", "smallsetminus": "setminus", "backslash": "setminus", "colon": ":", "rightarrow": "to",
    "Rightarrow": "to", "implies": "to", "varepsilon": "epsilon", "varphi": "phi", "vartheta": "theta", "ohm": "Omega", "prime": "'",
    "textnormal": "text", "mbox": "text", "hbox": "text", "textrm": "text", "textbf": "text", "textit": "text", "textup": "text",
    "bm": "mathbf", "boldsymbol": "mathbf", "pmb": "mathbf", "overrightarrow": "vec", "overset": "overset", "bar": "overline", "arg": "arg", "thickapprox": "approx",
    "simeq": "approx", "sim": "approx", "euro": "€", "pounds": "£", "yen": "¥", "cdotp": "cdot", "bullet": "cdot", "RR": "mathbb{R}",
    "R": "mathbb{R}", "reals": "mathbb{R}", "Z": "mathbb{Z}", "N": "mathbb{N}", "Q": "mathbb{Q}", "C": "mathbb{C}", "dots": "ldots",
    "cdots": "ldots", "lang": "langle", "rang": "rangle", "widehat": "hat", "lor": "lor", "land": "land", "percent": "%",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_PLAIN = frozenset("<>{}[]()|*/:'%€£¥")


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    r"""Returns a text in one notation: `½` becomes `\frac{1}{2}`, `√` becomes `\sqrt`, `\dfrac` becomes `\frac`.

    Colours, sizes and spacing are removed.
    """
    if not text.isascii():
        text = _END_MARKS.sub(" ", _INVISIBLE.sub("", text))
        text = _VULGAR.sub(_vulgar_fraction, text)
        text = _RAISED.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
        text = _LOWERED.sub(lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
        text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    return _latex(text)


def _vulgar_fraction(match: re.Match) -> str:
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _latex(text: str) -> str:
    if not any(mark in text for mark in "\\{&~"):  # no LaTeX
        return _UNION.sub(r"\1\\cup \2", text)
    text = _SYSTEM.sub(r"\\begin{cases}\1\\end{cases}", text)
    text = _UNION.sub(r"\1\\cup \2", text)
    if _ROWS.search(text):
        text = _ALIGNED.sub(" ", _AMPERSAND_BEFORE_EQUALS.sub(" ", text))
    else:
        text = _DOUBLED.sub(r"\\", text)
        text = _ALIGNED.sub(" ", text)
        text = _NEXT_STEP.sub(" ", text)
        text = _LINE_BREAK.sub(", ", _AMPERSAND.sub(" ", text))
    text = _TEXT_COMMA.sub(",", text)
    text = _COMMA_SPACE.sub(",", text)
    text = _THIN_SPACE.sub("", text)
    text = _BRACED_SIGN.sub(r"\1", text)
    text = _BRACED_COMMA.sub(r"\\decimalcomma ", text)
    text = _EMPTY_DELIMITER.sub(" ", text)
    text = _HIDDEN.sub(" ", text)
    text = _WITH_COLOUR.sub(" ", text)
    text = _COMMAND.sub(_one_name, text)
    text = _STYLE.sub(" ", text)
    text = _NOTHING.sub(" ", text)
    return _SPACING.sub(" ", text)


def _one_name(match: re.Match) -> str:
    if match[1] in ("imath", "jmath"):
        return match[1][0]
    other = _COMMANDS.get(match[1])
    if other is None:
        return match[0]
    if other == "{" or other == "}":
        return rf"\{other}"
    return other if other[0] in _PLAIN or other[0] == "^" else rf"\{other}"


def without_delimiters(text: str) -> str:
    r"""Returns a text without `$`, `\(` and `\[` around formulas; a dollar sign before an amount becomes `\$`."""
    text = _MATH_MARK.sub(" ", text)
    marks = [match.start() for match in _DOLLARS.finditer(text)]
    if len(marks) == 1:
        return text.replace("$", r"\$") if not text.rstrip(" .").endswith("$") else text.replace("$", " ")
    return _DOLLARS.sub(" ", text)


def without_wrapping(text: str) -> str:
    """Returns a text without the emphasis, quotation marks, and full stop around all of it."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip('*`"').strip()
        if text.endswith(("\\", ",", ";")) or (text.endswith(".") and not text.endswith("..")):
            text = text[:-1]
    return text
