"""Finds the options that a text claims or denies, in English, in Chinese, and in short forms of other languages.

Each sentence is cut into marks: groups of options ("A, C and D"), cues that claim what follows ("the answer is", "I
choose", "故选"), verdicts on the text before ("is correct", "错误"), words that deny, doubt, explain or turn. A group
is claimed or denied by its neighbours.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

MAX_CHARACTERS = 4000  # claims are looked for in the last so many characters of a text
MAX_SENTENCE_CHARACTERS = 500  # the last so many characters of a sentence are read
MAX_OBJECT_CHARACTERS = 200  # so many characters after a cue are read


def _words(text: str) -> str:
    """Returns a pattern that matches one of several words, which may be patterns; `_` is the space in a phrase."""
    return r"\b(?:" + "|".join(text.split()).replace("_", r"\s+") + r")\b"


_DROPPED = str.maketrans("{}_【】", "     ", '*`"“”$#‘’「」『』')
_COMMANDS = re.compile(
    r"\\(?:text[a-z]*|math[a-z]+|mbox|fbox|boxed|operatorname)\s*(?=\{)|\\[()\[\]]|\\(?:left|right|quad|qquad|[,;:! ])"
)
_SENTENCE = re.compile(r"[^\n。．!?！？；;]*?(?:[!?！？]|[\n。；;]|(?<!\s[a-z])\.(?=\s|$)|$)")

_LETTER = r"(?-i:(?<![A-Za-z0-9_'’.])(?!I\s+[a-z])[A-J](?![A-Za-z0-9_'’+°²]|-[A-Za-z]|\.[A-Za-z0-9]))"
_LETTERS = r"(?-i:(?<![A-Za-z0-9])[A-J]{2,5}(?![A-Za-z0-9]))"  # several letters without anything between them
_LABEL = rf"(?:[(\[]\s*[A-Ja-j]\s*[)\]]|{_LETTER}[)\]]?)"
_NOUN = r"(?:options?|choices?|answers|letters?|alternatives?|statements?|opci[oó]n(?:es)?|lettre|choix|选项)"
_ONE = rf"(?:{_NOUN}\s+)?{_LABEL}"
_AND = (
    r"(?:\s*,)?\s*(?:/|&|\+|、|和|或者?|与|及|以及|还是|(?<=[\s)\]])(?:and/or|and|or|und|oder|et|ou|y|o|e)(?=[\s(\[,]))"
    r"(?:\s*,?\s*(?:also|even|else|maybe|possibly|perhaps|then)\b\s*,?)?\s*"
)
_GROUP = (  # options joined by words, or by commas if only punctuation follows
    rf"{_ONE}(?:\s*,\s*{_ONE}){{0,9}}(?:{_AND}{_ONE}){{1,9}}|"
    rf"{_ONE}(?:\s*,\s*{_ONE}){{1,9}}(?=\s*(?:[.;:!?)。；]|都|均|$))|{_ONE}|{_LETTERS}"
)
_FILL = (  # words that may come between a verb and its object
    r"(?:\s|:|"
    + _words(
        "also clearly indeed definitely certainly obviously therefore thus hence then actually really simply just still surely now so "
        "most likely probably always all the a an my our final single only correct right best proper be that of given_by found_to_be "
        "la le el die der das lo um?a? richtige bonne seule correcta donc entonces"
    )
    + r"|(?-i:\bA\s(?=[a-z]))|应该?|就|才|都|均|全|也){0,8}"
)
_BE = _words(
    "is are was were looks? seems? appears? must_be would_be should_be has_to_be will_be turns_out_to_be proves_to_be est sont es son ist sind è é"
)
_HEAD = (
    r"(?:"
    + _words(
        "answers? ans options? choices? response solution selection pick alternative conclusion result letter correct_one correct r[ée]ponse "
        "respuesta opci[oó]n correcta resposta risposta soluci[oó]n Antwort L[oö]sung Ergebnis richtig ответ"
    )
    + r"|正确答案|答案|选项|正确的|正解|答え|정답|答)"
)
_COPULA = (
    r"(?:"
    + _words("is are was be becomes remains equals est sera es ser[ií]a ist lautet w[aä]re [eè]")
    + r"|é\b|['’]s\b|:|=|→|⇒|-+>|=>|\s-\s|应该?是|应为|应选|应该?选|就是|便是|则是|为|是|选择?|は|은|는)"
)
_DENY = (
    _words(
        "not never cannot neither nor none refuse unable no(?!\\s*[,:!]) without rather_than instead_of unlike except besides doubt avoid "
        "reject(?:ed|ing)? eliminat(?:e|ed|es|ing) exclud(?:e|ed|ing) rul(?:e|ed|es|ing)_out discard(?:ed|ing)? "
        "nicht kein pas ni nunca non"
    )
    + r"|\w+n['’]t\b|[✗✘❌]|而不是|而非|并非|并不是|不是|不应?该?选|不能选|不(?!如)|排除|除了|除"
)
_FALSE = (  # words before a claim that deny it, "the wrong answer is B"; ignored if a false option is asked for
    _words(
        "wrong incorrect false untrue worst distractor trap tempting fauss?e mauvaise falsche incorrect[ao] "
        "(?:least|second|not)_(?:likely|best|correct|true)"
    )
    + r"|不正确|错误?|误|干扰"
)
_RIGHT = _words(
    "right correct true valid best better answer solution choice pick one possible it correcte? bonne juste vraie? exacte? correct[ao] "
    "verdader[ao] cert[ao] richtig korrekt giusta esatta réponse respuesta Antwort"
)
_NOT_SO = rf"(?:{_FILL}{_RIGHT}|(?=\s*(?:[.,;!]|$)))"  # after "is not" these deny an option; "is not even" does not
_BAD = (
    _BE
    + _FILL
    + _words(
        "wrong incorrect false invalid out impossible eliminated ruled_out excluded untrue unlikely "
        "fausse? faux incorrecte? incorrect[ao] fals[ao] falsch errad[ao] sbagliata"
    )
    + rf"|(?:{_BE}{_FILL}\b(?:not|never|nicht|pas)\b|\b(?:is|are|was)n['’]t\b|n['’]est\s+pas\b|\b(?:no\s+es|non?\s+[eè]|não\s+é)\b){_NOT_SO}"
    + rf"|(?:\b(?:ca|wo|could|would|should)n['’]t|\b(?:can|could|must|would)\s*not)\b(?:\s+be{_NOT_SO}|\s+(?:work|fit|hold|match)|\s*[.!]?$)"
    + r"|\b(?:do|does|did)(?:n['’]t|\s+not)\s+(?:work|fit|hold|match|satisfy|apply|make\s+sense)\b|\b(?:fails?|falsch)\b"
    + rf"|{_BE}{_FILL}\bno\s+(?:answer|option|solution)\b"
    + r"|[:=–—→-]\s*(?:wrong|incorrect|false|no|×)(?!\w)|[:=–—→-]?\s*[✗✘❌]"
    + rf"|(?:并不|并非|不是)(?!\s*{_LABEL})|{_FILL}是?(?:错误?的?|不(?:正确|对|符合|成立|满足|合|行)|有误|误)"
)
_GOOD = (
    _BE
    + _FILL
    + _RIGHT
    + r"|is\s*[.!]?$|"
    + _words("works fits holds satisfies matches it_is richtig korrekt")
    + r"|[:=–—→-]\s*(?:correct|right|true|yes)(?!\w)|[:=–—→-]?\s*[✓✔✅√]"
    + rf"|{_FILL}(?:是|为)?(?:完全)?(?:正确|对(?!应|比|于)|符合|成立|满足)|是(?:本题)?(?:的)?(?:正确)?答案"
)
_VERDICT = re.compile(  # a verdict on the options just before it
    rf"\s*(?:选?项|,\s*[^,\n.]{{1,30}},)?\s*(?:(?P<bad>{_BAD})|(?P<good>{_GOOD}))", re.IGNORECASE
)
_MARKS = {  # kind of mark -> pattern; the first one that matches counts
    "undo": r"\b(?:that|this|it)\s*(?:is|was|['’]s)\s+(?:also\s+)?(?:wrong|incorrect|false|not\s+(?:right|correct|true|it))\b|"
    r"这是错的|这不对",
    "group": _GROUP,
    "head": rf"{_HEAD}(?P<between>(?:(?!{_LABEL}|{_DENY}|{_FALSE}|\b(?:might|could|may)\b|可能|也许|或许)[^.,;:=\n。，；：是为选]){{0,40}}?)"
    rf"\s*{_COPULA}(?:{_FILL}{_COPULA})?",
    "named": r"(?:正确答案|答案|答え|答|정답|답|正解|\[答案\]|\b(?:answer|réponse|respuesta|Antwort)(?=\s)|"
    rf"\b(?:ist|est)\s+(?:die|la)\s+(?:richtige\s+|bonne\s+)?(?:Antwort|réponse))\s*(?={_LABEL})",
    "maybe": _words(
        "might could may maybe perhaps possibly possible plausible either both between if whether unless unsure suppose supposing "
        "hypothetically let['’]?s_say assum(?:e|ing) one_of peut-être quiz[aá]s tal_vez vielleicht entweder soit initial(?:ly)? first almost used_to was_going_to"
    )
    + r"|可能|也许|或许|如果|假设|若|不确定",
    "false": _FALSE,
    "deny": _DENY,
    "choose": _words(
        "choos(?:e|ing) chose pick(?:ed|ing)? select(?:ed|ing)? go(?:ing)?_(?:with|for) went_with opt(?:ing)?_for settle_(?:on|for) "
        "vote(?:_is)?(?:_for)? lock(?:ing)?_in meant? mark(?:ing)? circle answer(?:ing)? conclud(?:e|ing) stick_with prefer say only "
        "choisis choisirais dirais dir[ií]a elijo elegir[ií]a escojo selecciono w[aä]hle nehme scelgo escolho marco"
    )
    + r"|应该?选择?|故选择?|可选|选择|选取|选出|选|填入?|只有",
    "lead": r"(?:\b(?:it|this|that)['’]s\b|c['’]est\b|"
    + _words(
        "(?:it|this|that|which)_(?:is|was|must_be|has_to_be|would_be|should_be|will_be|can_only_be|leaves?(?:_us)?|gives?(?:_us)?|means|makes(?:_it)?|matches|equals) "
        "leav(?:es|ing) match(?:es|ing) corresponds?_to points?_to namely get got left_with I_think I_believe final finally in_the_end in_conclusion overall "
        "ultimately then so thus hence therefore donc daher folglich entonces luego ergo is es est ist"
    )
    + r")\s*[,:]?|\(\s*(?=(?:option|choice|answer)\s)|\bi\.e\.,?|\b(?:no|yes|wait|actually|rather)\s*[,:]|:|[∴⇒→✓✔✅√]|[-=]>|"
    r"(?:所以|因此|综上所述|综上|故|即|于是)[,，]?|而是|应该?是|就是|对应|是",
    "turn": _words("but however actually wait yet though although instead sondern mais sino pero aber")
    + r"|但|不过|而|不如",
    "why": _words(
        "because since as(?!\\s+(?:follows|well)) for while whereas given due_to car puisque porque pues weil denn da"
    )
    + r"|因为|由于|∵",
    "skip": _words(
        f"{_NOUN} the la le el die lo clearly indeed definitely certainly just that which simply probably likely most also as my "
        "answer final correct right best would be we have I a o letra lettera [A-Za-z]+ly"
    )
    + r"|选项|项",
    "stop": r"[,，(—]|\s-+\s",
    "word": r"[A-Za-z\u00c0-\u04ff][\w'’-]*|\d[\d.,]*|\S",
}
_MARK = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _MARKS.items()), re.IGNORECASE)
_WORTH_READING = re.compile(rf"{_LABEL}|{_HEAD}|{_LETTERS}|{_MARKS['undo']}", re.IGNORECASE)
_ARTICLE = re.compile(
    r"A\s+(?!"
    + _words(
        "is are was isn wasn doesn won and or not nor because since as for but rather instead in would must works fits holds seems looks "
        "with which that to by from on at it too also than could can cannot might may does has gives fails turns the equals et ou y o oder und ist es est"
    )
    + r")[a-z]"
)
_AFTER = ("that", "which", "the", "as", "项", "选项", "because")
_SURELY = re.compile(r"[A-Za-z]+ly\b", re.IGNORECASE)
_CUES = ("head", "named", "choose", "lead")  # marks that claim the options after them
_NEAR = 4  # a denial counts if it is among so many marks before an option


class Question(NamedTuple):
    """The question whose options are looked for in a text."""

    known: Collection[str]  # letters of the options
    read: Callable[[str], str | None]  # text -> the option that it names by label or words; None for none or several
    asks_false: bool = False  # the question asks for a false option, so that "B is false" does not deny B


class Mark(NamedTuple):
    kind: str
    start: int
    end: int
    letters: tuple[str, ...] = ()


class Claim(NamedTuple):
    """Options that a text claims or denies."""

    letters: tuple[str, ...]  # () in a claim: the text doubts, or the claimed options cannot be read
    denied: bool = False
    turned: bool = True  # it is the first claim of its sentence, or follows a word such as "but"


def plain(text: str) -> str:
    """Returns a text with full-width and circled signs as ASCII, without emphasis, dollars and LaTeX text commands."""
    text = unicodedata.normalize("NFKC", text[-MAX_CHARACTERS:])
    text = _COMMANDS.sub(" ", text).translate(_DROPPED)
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def decided(text: str, question: Question, agree: bool = False) -> tuple[bool, str | None]:
    """Returns (whether a text claims anything, the one option that its last claim names). `text` comes from `plain`.

    The option is None if that claim names several, doubts, or is denied later. With `agree` it is None too if any other
    claim names another option.
    """
    named, claimed = None, set()
    every: list[Claim] = []
    for sentence in reversed(list(_SENTENCE.finditer(text))):
        every = _claims(text, sentence, question) + every
        if not agree and any(not claim.denied for claim in every):
            break  # earlier sentences do not count
    for claim in every:
        if claim.denied:
            named = None if named in claim.letters else named
            continue
        clash = not claim.turned and named is not None and named not in claim.letters
        named = claim.letters[0] if len(claim.letters) == 1 and not clash else None
        claimed |= {*claim.letters}
    return any(not claim.denied for claim in every), None if agree and len(claimed) > 1 else named


def contradicts(text: str, letter: str, known: Collection[str]) -> bool:
    """Returns whether a text, as `plain` returns it, claims another option than `letter`, or doubts or denies that."""
    every = [
        c for sentence in _SENTENCE.finditer(text) for c in _claims(text, sentence, Question(known, lambda _: None))
    ]
    return any(letter in claim.letters if claim.denied else claim.letters != (letter,) for claim in every)


def opening(line: str, question: Question) -> str | None:
    """Returns the one option that a plain line begins with and then only explains: "B, because 8 is even", "B (8)"."""
    marks = _marks(line, 0, min(len(line), MAX_SENTENCE_CHARACTERS), question.known)
    if not marks or marks[0].kind != "group" or len(marks[0].letters) != 1:
        return None
    [letter] = marks[0].letters
    rest = line[marks[0].end :]
    reason = next((m.start for m in marks[1:] if m.kind in ("why", "deny")), len(line))
    others = {*letters_of(line[marks[0].end : reason], question.known)} - {letter}
    if [m.kind for m in marks if line[m.start].isalnum()][-1:] == ["deny"]:
        return None
    ends = len(marks) == 1 or marks[1].kind in ("stop", "why", "deny") or rest.strip() == "!"
    named = {question.read(rest.strip(marks)) for marks in (" ,-—.!", " ,-(—).!")}  # brackets may belong to the text
    return letter if ends and not others and named <= {None, letter} else None


def letters_of(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Returns the known letters of options in a text, without the article A and the pronoun I."""
    letters = []
    for match in re.finditer(rf"{_LABEL}|{_LETTERS}", text):
        if not _ARTICLE.match(text, match.start()):
            letters += [letter for letter in match[0].strip("()[] ").upper() if letter in known]
    return tuple(dict.fromkeys(letters))


def _claims(text: str, sentence: re.Match, question: Question) -> list[Claim]:
    """Returns the claims and denials of one sentence, in order; the claims of a question count as doubts."""
    start = max(sentence.start(), sentence.end() - MAX_SENTENCE_CHARACTERS)
    if not _WORTH_READING.search(text, start, sentence.end()):
        return []
    marks = _marks(text, start, sentence.end(), question.known)
    asked = sentence[0].strip().rstrip("。").endswith(("?", "吗", "呢"))
    claims: list[tuple[int, Claim]] = []
    for place, mark in enumerate(marks):
        claim = None
        if mark.kind == "group":
            claim = _of_group(text, marks, place, question)
        elif mark.kind == "undo":
            claim = Claim(tuple(question.known), True)
        elif mark.kind == "head" and not any(later.kind in ("group", "head") for later in marks[place + 1 : place + 4]):
            claim = _of_words(text, marks, place, sentence.end(), question)
        if claim is not None:
            since = claims[-1][0] if claims else 0
            turned = not claims or any(m.kind in ("turn", "deny") for m in marks[since:place])
            letters = () if asked and not claim.denied else claim.letters
            claims.append((place, Claim(letters, claim.denied, turned)))
    return [claim for _, claim in claims]


def _marks(text: str, start: int, end: int, known: Collection[str]) -> list[Mark]:
    """Returns the marks of text[start:end] in order; verdicts are recognised only after a group."""
    marks: list[Mark] = []
    while start < end:
        match = _VERDICT.match(text, start, end) if marks and marks[-1].kind == "group" else None
        match = match or _MARK.search(text, start, end)
        if match is None:
            break
        kind, start = match.lastgroup or "", match.end()  # every alternative has a name
        kind, letters = "head" if kind == "between" else kind, ()
        if kind == "group":
            single = len(match[0]) == 1  # the next word decides whether it is an article or a pronoun
            letters = letters_of(text[match.start() : match.end() + 20] if single else match[0], known)
            if single:
                letters = letters[:1] if letters[:1] == (match[0],) else ()
            kind = "group" if letters else "word"
        marks.append(Mark(kind, match.start(), match.end(), letters))
    return marks


def _of_group(text: str, marks: Sequence[Mark], place: int, question: Question) -> Claim | None:
    """Returns the claim about a group of options that its sentence makes; None for a mere mention."""
    group, before = marks[place], _clause(marks, place)
    kinds = [m.kind for m in before if m.kind != "false" or not question.asks_false]
    kinds = ["deny" if kind == "false" else kind for kind in kinds]
    denied, doubted = "deny" in kinds[-_NEAR:], "maybe" in kinds
    cue = next((m for m in reversed(before) if m.kind != "skip"), None)
    if cue is None or (cue.kind == "word" and text[group.start] in "(["):
        cue = _head_before(marks, place)
    if cue is None and place and _SURELY.match(text, marks[0].start) and before == list(marks[:place]):
        cue = marks[0]._replace(kind="lead")
    after = next((m for m in marks[place + 1 :] if m.kind != "skip"), None)
    if after and question.asks_false and after.kind in ("bad", "good") and _of_truth(text[after.start : after.end]):
        return None
    if after and (verdict := _verdict(text, marks, place, after, cue)):
        return verdict if verdict.denied or not verdict.letters else Claim(() if doubted else verdict.letters, denied)
    if cue and cue.kind in _CUES:
        if "deny" in kinds:
            return Claim(group.letters, True)
        if cue.kind in ("lead", "named") and _goes_on(text, marks[place + 1 : place + 2]):
            return None  # the group is the subject of a statement: "so B is too small"
        return Claim(()) if doubted else Claim(_confirmed(text, marks, place, question.read))
    if denied or doubted:
        return Claim(group.letters, True) if denied else Claim(())
    turned = place and marks[place - 1].kind in ("turn", "lead")
    return Claim(group.letters) if turned and any(m.kind == "deny" for m in marks[:place]) else None


def _verdict(text: str, marks: Sequence[Mark], place: int, after: Mark, cue: Mark | None) -> Claim | None:
    """Returns the claim of the mark after a group about it, else None. After a cue ": no" is an option's text."""
    behind_cue = cue is not None and cue.kind in _CUES and cue.kind != "lead"
    if after.kind == "bad" and not (behind_cue and not text[after.start : after.end].lstrip()[0].isalnum()):
        return Claim(marks[place].letters, True)
    if after.kind == "good":
        return Claim(marks[place].letters)
    soon = [m.kind for m in marks[place + 1 : place + 4]]  # "is also possible"
    return Claim(()) if after.kind == "maybe" or (after.kind == "lead" and "maybe" in soon) else None


def _of_truth(verdict: str) -> bool:
    """Returns whether a verdict calls an option true or false as a statement, and not as the answer."""
    about_answer = re.search(
        r"answer|solution|choice|option|pick|r[ée]ponse|respuesta|Antwort|答案", verdict, re.IGNORECASE
    )
    return not about_answer and re.search(r"[^\s\W]{4}|[对错误✓✔✅✗✘❌]|正确|符合", verdict) is not None


def _confirmed(text: str, marks: Sequence[Mark], place: int, read: Callable[[str], str | None]) -> tuple[str, ...]:
    """Returns the letters of a claimed group; () if the text after its one label is that of another option."""
    group = marks[place]
    if len(group.letters) != 1:
        return group.letters
    line = _line_end(text, group.start)
    if read(text[group.start : line][:MAX_OBJECT_CHARACTERS]) == group.letters[0]:
        return group.letters
    behind = text[group.end : line].lstrip()
    if not (behind.startswith((".", ":", ")", "=")) or text[group.end - 1] in ")]"):
        return group.letters
    until = next((m.start for m in marks[place + 1 :] if m.kind in ("why", "deny", "turn", "stop")), marks[-1].end)
    behind_label = text[group.end : until].strip(" .:)=,;")
    if not behind_label:
        following = behind.lstrip(".:)= ").rstrip(". ")[:MAX_OBJECT_CHARACTERS]
        return () if following and read(following) not in (None, group.letters[0]) else group.letters
    return group.letters if read(f"({group.letters[0]}) {behind_label}") == group.letters[0] else ()


def _of_words(text: str, marks: Sequence[Mark], place: int, end: int, question: Question) -> Claim | None:
    """Returns the claim of "the answer is" with the words of an option; None if it only describes: "is even"."""
    head = marks[place]
    if text[head.end : end].strip() == "" and text[end - 1 : end] == "\n":  # the answer is on the next line
        end = _line_end(text, end)
    line = _line_end(text, head.end)
    words = text[head.end : end].strip(" \n.:")
    cut = next((m.start for m in marks[place + 1 :] if m.kind in ("why", "stop")), end)
    denied = any(m.kind == "deny" for m in marks[place + 1 : place + 2])
    if denied:
        words = text[marks[place + 1].end : end].strip(" \n.")
    for option_text in (text[head.end : line], words, text[head.end : cut]):
        if letter := question.read(option_text.strip(" \n:")[:MAX_OBJECT_CHARACTERS]):
            return Claim((letter,), denied)
    reason = any(m.kind == "why" for m in marks[:place])
    return None if reason or denied or not re.search(r"\d", words[:60]) else Claim(())


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


def _clause(marks: Sequence[Mark], place: int) -> list[Mark]:
    """Returns the marks between the beginning of a clause and a place in it."""
    start = place
    while start and marks[start - 1].kind not in ("stop", "turn", "why", "group"):
        start -= 1
    return list(marks[start:place])


def _head_before(marks: Sequence[Mark], place: int) -> Mark | None:
    """Returns the cue before a group even if words come between: "the answer is, of course, B", "is Paris (B)"."""
    for mark in reversed(marks[max(0, place - 2 * _NEAR) : place]):
        if mark.kind not in ("word", "skip", "stop"):
            return mark if mark.kind == "head" else None
    return None


def _goes_on(text: str, following: Sequence[Mark]) -> bool:
    """Returns whether a verb may follow: the next mark is a word and not one that begins a reason or a label."""
    return any(
        m.kind in ("word", "skip", "lead") and text[m.start].isalpha() and text[m.start : m.end].lower() not in _AFTER
        for m in following
    )
