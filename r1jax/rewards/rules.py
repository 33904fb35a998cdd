"""Rewards that read only the text: the format of an assistant turn and the language of its chain of thought."""

import functools
import re
import unicodedata
from collections.abc import Mapping

END_OF_SEQUENCE = (
    "<eos>",
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
)
LANGUAGES = ("en", "zh", "fr")
_CODES = {
    "en": "en",
    "eng": "en",
    "zh": "zh",
    "zho": "zh",
    "chi": "zh",
    "cmn": "zh",
    "fr": "fr",
    "fra": "fr",
    "fre": "fr",
}
_NAMES = {  # names of languages as data sets spell them, in lower case
    **dict.fromkeys(("english", "anglais", "英语", "英語", "英文"), "en"),
    **dict.fromkeys(("chinese", "mandarin", "mandarin chinese", "simplified chinese", "traditional chinese"), "zh"),
    **dict.fromkeys(("中文", "汉语", "漢語", "简体中文", "繁體中文", "繁体中文", "普通话", "chinois"), "zh"),
    **dict.fromkeys(("french", "français", "francais", "法语", "法語", "法文"), "fr"),
}
_TAG = re.compile(r"([a-z]{2,3})(?:-[a-z0-9]{1,8})*(?:\.[a-z0-9-]+)?")  # a BCP-47 tag, or a locale with its encoding
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_END = re.compile("|".join(map(re.escape, END_OF_SEQUENCE)))
_MARKUP = re.compile("|".join(map(re.escape, (*_TAGS, *END_OF_SEQUENCE))))
# No branch may run past a second opening mark; this keeps the scan linear on every text.
_CODE = re.compile(r"```[^`]*(?:`{1,2}[^`]+)*(?:```|\Z)|`[^`\n]*`")  # an unclosed fence runs to the end
_ADDRESS = re.compile(r"(?:https?://|www\.)[!-~]+|[\w.+-]{1,64}@[A-Za-z0-9-]+\.[A-Za-z0-9.-]+")
_LATEX = re.compile(
    r"(?<!\\)\$\$[^$]*\$\$|(?<!\\)\$(?!\s)[^$\n]*(?<![\s\\])\$(?!\d)|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|"
    r"\\begin\{(\w+\*?)\}(?:(?!\\begin\{).)*?\\end\{\1\}|\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+",
    re.DOTALL,
)
# Commands whose braces hold words or names, with those braces, which may contain one level of braces.
_MATH_TEXT = re.compile(
    r"\\(?:text(?!color|size)[a-z]*|math[a-z]+|operatorname\*?|[mhf]box|label|ref|eqref|cite|tag|color|textcolor|unit|si|ce)(?![A-Za-z])"
    r"\s*\{(?:[^{}]|\{[^{}]*\})*\}"
)
# A call as programs and formulas write it, without a space before the bracket.
_CALL = re.compile(
    r"(?<![^\W_])[A-Za-z_][A-Za-z_0-9]{0,60}(?:\.[A-Za-z_][A-Za-z_0-9]{0,60}){0,4}\("
    r"((?:\"[^\"\n]*\"|'[^'\n]*'|[^()\"'\n]){0,200})\)"
)
_PROSE = re.compile(r"[A-Za-z]{2,}[,;:]?\s+[A-Za-z]{2,}|[^\x00-\x7f]{2}")
_MAX_NESTED_CALLS = 6
_CODE_WORDS = re.compile(r"(?<=[\w)\]]\s)(?:for|in|if|else|and|or|not|is|lambda|await)\b")
_WORD = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?")
_HAN = r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9d"
_CJK_RUN = re.compile(f"[{_HAN}{_KANA}]+")
_IS_KANA = re.compile(f"[{_KANA}]")
_REPEATED = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
# Words of mathematics and units, which are the same in every language.
_SYMBOLS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan log ln lg exp lim max min sup inf gcd lcm mod det dim ker deg sgn sqrt "
    "print printf println cout cin len str int elif endl argmax argmin mm cm dm km mg kg ml mL cL dL Hz kHz MHz GHz Pa kPa kW kWh kJ mol rad μm".split()
)


def format_score(text: str, require_answer_tag: bool = True) -> float:
    """Returns 1.0 if the assistant turn has the required form, else 0.0.

    The form is one `<think>...</think>` and then one `<answer>...</answer>`, and nothing else but white space and
    end-of-sequence tokens at the end. Both must hold visible text; end-of-sequence tokens do not count as text. With
    `require_answer_tag` False (R1's chat format) any visible text may follow the thought. `text` includes the part of
    the turn that the prompt prefilled.
    """
    body = _without_end(text).strip()
    if not body.startswith("<think>") or body.count("<think>") != 1 or body.count("</think>") != 1:
        return 0.0
    thought, rest = body[len("<think>") :].split("</think>")
    rest = rest.strip()
    if not _has_content(thought) or not _has_content(rest):
        return 0.0
    if not require_answer_tag:
        return 1.0
    if body.count("<answer>") != 1 or body.count("</answer>") != 1:
        return 0.0
    if not rest.startswith("<answer>") or not rest.endswith("</answer>"):
        return 0.0
    return float(_has_content(rest[len("<answer>") : -len("</answer>")]))


def chain_of_thought(text: str) -> str:
    """Returns the content of the first `<think>` block, closed or not; without one, the text before `</think>`."""
    start = text.find("<think>")
    if start < 0:
        return text.split("</think>", 1)[0]
    return text[start + len("<think>") :].split("</think>", 1)[0]


@functools.lru_cache(1 << 10)
def canonical_language(text: str) -> str:
    """Returns `en`, `zh` or `fr` for a name ("English", "français", "中文") or code ("EN", "zh-CN", "fra", "en_US").

    Raises ValueError for any other language, listing the known ones.
    """
    spelling = unicodedata.normalize("NFKC", str(text)).casefold().partition("(")[0].strip()
    if spelling in _NAMES:
        return _NAMES[spelling]
    tag = _TAG.fullmatch(spelling.replace("_", "-"))
    if tag is None or tag[1] not in _CODES:
        raise ValueError(
            f"language {text!r} is none that the language reward knows: {', '.join(LANGUAGES)} (also by name, or as zh-CN)"
        )
    return _CODES[tag[1]]


def language_consistency(text: str, target: str, lexicon: Mapping[str, str] | None = None) -> float:
    """Returns the share of the chain of thought's words that are in the target language, in [0, 1].

    Source: DeepSeek-R1, eq. 7, which does not define a word. Here each Han character is a word. Digits, LaTeX with
    the words in its text, code, calls, addresses, tags, units, names of functions, single Latin or Greek letters and
    up to four capitals (triangle ABC) are not words. Without `lexicon` the script decides: Latin letters count as
    `en` and `fr`, Han as `zh`, other scripts as no known language. With `lexicon` (word -> language) only its words
    count. A text without words gives 0. `target` may be spelled as in `canonical_language`; raises ValueError for an
    unknown language.
    """
    target = canonical_language(target)
    languages = _word_languages(chain_of_thought(text), lexicon)
    if not languages:
        return 0.0
    accepted = {target} if lexicon is not None else {"zh"} if target == "zh" else {"latin"}
    return sum(language in accepted for language in languages) / len(languages)


def repetition_penalty(text: str, ngram: int) -> float:
    """Returns unique / all - 1 over the n-grams of `ngram` words, in (-1, 0]; 0 for a text of fewer words.

    Case is ignored. Words are separated by white space, and each Han character is a word. Source: Yeo et al., arXiv
    2502.03373, appendix C.2, in the form of open-r1 and TRL (the share of repeated n-grams).
    """
    words = _REPEATED.findall(text.lower())
    runs = len(words) - ngram + 1
    if runs < 1:
        return 0.0
    return len(set(zip(*(words[start:] for start in range(ngram)), strict=False))) / runs - 1


def detect_language(prompt: str, lexicon: Mapping[str, str] | None = None) -> str:
    """Returns `en`, `zh` or `fr`: the language of most words of a prompt.

    Ties and prompts without words give `en`. Only a lexicon can distinguish `fr` from `en`.
    """
    languages = _word_languages(prompt, lexicon)
    counts = {name: languages.count(name if lexicon is not None or name == "zh" else "latin") for name in LANGUAGES}
    return max(LANGUAGES, key=counts.__getitem__)


def _without_end(text: str) -> str:
    stripped = text.rstrip()
    while stripped.endswith(END_OF_SEQUENCE):
        for token in END_OF_SEQUENCE:
            stripped = stripped.removesuffix(token)
        stripped = stripped.rstrip()
    return stripped


def _has_content(text: str) -> bool:
    """Returns whether a text has a visible character outside its end-of-sequence tokens."""
    return any(character.isprintable() and not character.isspace() for character in _END.sub("", text))


def _word_languages(text: str, lexicon: Mapping[str, str] | None) -> list[str]:
    """Returns one language (with a lexicon) or script per word of the text."""
    for pattern in (_MARKUP, _CODE, _ADDRESS, _MATH_TEXT, _LATEX):
        text = pattern.sub(" ", text)
    for _ in range(_MAX_NESTED_CALLS):
        text, left = _without_calls(text), text
        if text == left:
            break
    if lexicon is not None:
        return [lexicon[word] for word in (token.lower() for token in _WORD.findall(text)) if word in lexicon]
    languages = []
    for run in _CJK_RUN.findall(text):  # Han among kana is Japanese
        languages += ["other" if _IS_KANA.search(run) else "zh"] * len(run)
    scripts = map(_script, _WORD.findall(_CJK_RUN.sub(" ", text)))
    return languages + [script for script in scripts if script]


def _without_calls(text: str) -> str:
    """Returns a text without its innermost calls, such as `solve(x)`.

    Brackets with prose, "time(in hours)", and plurals, "number(s)", are not calls and stay.
    """

    def replaced(call: re.Match) -> str:
        before, after = (
            text[max(0, call.start() - 2) : call.start()].rstrip(" ")[-1:],
            text[call.end() : call.end() + 2].strip()[:1],
        )
        plural = (
            call[1] in ("s", "es") and before < "\u2e80" and (not after or after.isascii() and after not in "=+-*/<>")
        )
        return call[0] if plural or _is_prose(call[1]) else " "

    return _CALL.sub(replaced, text)


def _is_prose(arguments: str) -> bool:
    outside = re.sub(r"\"[^\"]*\"|'[^']*'", "0", arguments)
    return bool(_PROSE.search(_CODE_WORDS.sub(",", outside)))


@functools.lru_cache(1 << 16)
def _script(word: str) -> str:
    """Returns `latin` or `other`, or "" for a symbol, a single letter or an acronym, which belong to no language."""
    word = unicodedata.normalize("NFKC", word)  # full-width and mathematical letters become plain ones
    if word in _SYMBOLS or "_" in word or any(character.isdigit() for character in word):
        return ""
    names = [unicodedata.name(character, "") for character in word if character.isalpha()]
    latin = all(name.startswith("LATIN") for name in names)
    if len(names) < 2 and (latin or names[0].startswith("GREEK")):
        return ""
    if latin and len(names) <= 4 and word.isupper():
        return ""
    return "latin" if latin else "other"
