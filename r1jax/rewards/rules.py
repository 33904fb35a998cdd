"""Rewards that read only the text: the format of an assistant turn and the language of its chain of thought."""

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
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_MARKUP = re.compile("|".join(re.escape(tag) for tag in (*_TAGS, *END_OF_SEQUENCE)))
# No branch may run over a second opener: that keeps the scan linear on text of any kind.
_CODE = re.compile(r"```[^`]*(?:`{1,2}[^`]+)*```|`[^`\n]*`")
_LATEX = re.compile(
    r"\$\$[^$]*\$\$|\$(?!\s)[^$\n]*(?<!\s)\$(?!\d)|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\\[A-Za-z]+",
    re.DOTALL,
)
_WORD = re.compile(r"[^\W_](?:[\w'’-]*[^\W_])?")
_HAN_RANGES = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_HAN = re.compile(f"[{_HAN_RANGES}]")
_REPEATED = re.compile(rf"[{_HAN_RANGES}]|[^\s{_HAN_RANGES}]+")


def format_score(text: str, require_answer_tag: bool = True) -> float:
    """Returns 1.0 if the assistant turn has the asked form, else 0.0.

    The form is one `<think>...</think>` and then one `<answer>...</answer>`, neither empty, nothing else anywhere but
    white space and end-of-sequence tokens at the end. With `require_answer_tag` False (R1's chat format) any text that
    is not empty may follow the thought. `text` includes what the prompt prefilled of the turn.
    """
    body = _without_end(text).strip()
    if not body.startswith("<think>") or body.count("<think>") != 1 or body.count("</think>") != 1:
        return 0.0
    thought, rest = body[len("<think>") :].split("</think>")
    rest = rest.strip()
    if not thought.strip() or not rest:
        return 0.0
    if not require_answer_tag:
        return 1.0
    if body.count("<answer>") != 1 or body.count("</answer>") != 1:
        return 0.0
    if not rest.startswith("<answer>") or not rest.endswith("</answer>"):
        return 0.0
    return float(bool(rest[len("<answer>") : -len("</answer>")].strip()))


def chain_of_thought(text: str) -> str:
    """Returns what stands inside the first `<think>` block, up to the end if it never closes; without one, the whole text."""
    start = text.find("<think>")
    if start < 0:
        return text.split("</think>", 1)[0]
    return text[start + len("<think>") :].split("</think>", 1)[0]


def language_consistency(text: str, target: str, lexicon: Mapping[str, str] | None = None) -> float:
    """Returns the share of the chain of thought's words that are in the target language, in [0, 1].

    Source: DeepSeek-R1, eq. 7. Digits, symbols, LaTeX, code, tags and single letters are no words; each Han character is one.
    Without `lexicon` the script decides: Latin letters count for `en` and `fr`, Han for `zh`, other scripts for none.
    With `lexicon` (word -> language) only its words count. No words at all give 0. Raises ValueError for another target.
    """
    if target not in LANGUAGES:
        raise ValueError(f"language_consistency: target={target!r} must be one of {', '.join(LANGUAGES)}")
    languages = _word_languages(chain_of_thought(text), lexicon)
    if not languages:
        return 0.0
    accepted = {target} if lexicon is not None else {"zh"} if target == "zh" else {"latin"}
    return sum(language in accepted for language in languages) / len(languages)


def repetition_penalty(text: str, ngram: int) -> float:
    """Returns unique / all - 1 over the runs of `ngram` words in a row, in (-1, 0]; 0 for a text of fewer words.

    Case does not matter; a word is what stands between white space, and each Han character is one. Source: Yeo et al.,
    arXiv 2502.03373, appendix C.2, in the form of open-r1 and TRL (the share of repeated n-grams).
    """
    words = _REPEATED.findall(text.lower())
    runs = len(words) - ngram + 1
    if runs < 1:
        return 0.0
    return len(set(zip(*(words[start:] for start in range(ngram)), strict=False))) / runs - 1


def detect_language(prompt: str, lexicon: Mapping[str, str] | None = None) -> str:
    """Returns `en`, `zh` or `fr`: the language of most words of a prompt.

    Ties and prompts without words give `en`; `fr` is only told from `en` by a lexicon.
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


def _word_languages(text: str, lexicon: Mapping[str, str] | None) -> list[str]:
    """Returns one language (with a lexicon) or script per word of the text."""
    for pattern in (_MARKUP, _CODE, _LATEX):
        text = pattern.sub(" ", text)
    if lexicon is not None:
        return [lexicon[word] for word in (token.lower() for token in _WORD.findall(text)) if word in lexicon]
    languages = ["zh"] * len(_HAN.findall(text))
    for word in _WORD.findall(_HAN.sub(" ", text)):
        letters = [character for character in word if character.isalpha()]
        if len(letters) < 2 or any(character.isdigit() for character in word):
            continue
        languages.append("latin" if unicodedata.name(letters[0], "").startswith("LATIN") else "other")
    return languages
