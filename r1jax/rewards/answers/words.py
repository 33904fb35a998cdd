"""English and Chinese words in answers: numbers, conjunctions, conditions, set phrases, changes of a number."""

import re
from fractions import Fraction

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL: dict[str, int] = {word: value for value, word in enumerate(_ONES.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15}
SCALES |= {"quintillion": 10**18, "sextillion": 10**21, "lakh": 10**5, "crore": 10**7}
SCALES |= {f"{word}s": value for word, value in SCALES.items()}
_PARTS = "half third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth"
PARTS = {word: value for value, word in enumerate(_PARTS.split(), 2)} | {
    "quarter": 4, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
}  # fmt: skip
PARTS |= {f"{word}s": value for word, value in PARTS.items()} | {"halves": 2}
GROUPS = {"dozen": 12, "dozens": 12, "score": 20, "gross": 144, "pair": 2, "pairs": 2}
POWERS = {"squared": 2, "cubed": 3}
MULTIPLES = {"half": Fraction(1, 2), "twice": 2, "double": 2, "triple": 3, "thrice": 3}
NUMBER_WORDS = frozenset({*SMALL, *SCALES, *PARTS, *GROUPS, "hundred", "hundreds", "point"})

_HAN_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_UNITS = {"十": 10, "百": 100, "千": 1000}
_HAN_SCALES = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_HAN_NUMBER = re.compile("[零〇一二三四五六七八九两兩十百千万萬亿億]+")
_HAN_PART = re.compile("(.+)分之(.+)")
_DIGITS_HAN = re.compile(r"(\d+(?:\.\d+)?)([十百千万萬亿億]+)")

JOINTS = {"and": "and", "or": "or", "&": "and", "和": "and", "或": "or", "或者": "or", "与": "and", "及": "and", "以及": "and",
          "et": "and", "und": "and", "oder": "or", "ou": "or", "y": "and"}  # fmt: skip
APPROXIMATELY = frozenset("approximately about roughly around approx exactly circa 约 大约 约为 约等于".split())
SIGNS = {"minus": -1, "negative": -1, "plus": 1, "positive": 1, "负": -1}
# Words that begin a condition or a reason; the answer comes before them.
CONDITIONS = frozenset(
    "where for if when whenever with since because assuming provided given such 其中 因为 当 若 如果 由于 使得".split()
)
ALTERNATIVES = frozenset("otherwise else elsewhere".split())
NEGATIONS = frozenset(
    "no not never neither nor cannot can't isn't aren't wasn't weren't don't doesn't didn't won't wouldn't shouldn't couldn't wrong incorrect false untrue impossible "
    "不 不是 不能 并非 refuted mistaken unlikely doubtful disproved erroneous discarded dismissed ignore ignored contradiction contradicts contradictory refutes "
    "nicht nie niemals kein keine keinen pas jamais ne non nunca jamás sin".split()
)
# Words that turn a number beside them into another number, a bound, a guess or a denial.
CHANGING = (
    frozenset(
        "not no never neither nor none nothing without except excluding but only-if anything isn't aren't wasn't don't doesn't cannot can't unlike false wrong incorrect "
        "more less greater smaller larger fewer bigger higher lower than above below under over beyond within between among from through thru to until till up "
        "upto down least most minimum maximum min max almost nearly "
        "half halves double doubled twice thrice triple tripled quadruple times time-of multiplied divided multiply divide by plus minus negative add added subtract subtracted "
        "exceed exceeds exceeding surpass surpasses exclude excludes excluded rule rules ruled out reject rejected rejects avoid avoids bound bounds upper lower too small large "
        "negation opposite complement omit omitted remove removed removing besides instead barring fail fails failed unless should fair off short "
        "squared square-root cubed cube root roots power powers exponent factorial percent-of ratio reciprocal inverse log ln modulo mod remainder "
        "sum product difference quotient cubes "
        "maybe perhaps possibly probably might could may either guess guessing idea unsure uncertain unknown think-not broken "
        "or and if every all any each-of some several many "
        "dozen dozens score gross pair-of plus-or-minus per-cent-of "
        "first second third fourth fifth next previous last "
        "mehr weniger mindestens höchstens als mal halb hälfte doppelt tausend millionen million hundert dutzend plus moins fois demi moitié mille milliers cents douzaine "
        "más menos veces mitad doble mil millones docena hundredfold "
        "不 不是 非 没有 除 至少 至多 最多 最少 大于 小于 超过 不足 以上 以下 左右 或 和 倍 一半 平方 立方 分之 几 多".split()
    )
    | NEGATIONS
)
# Parts of Chinese words with the same effect.
CHANGING_HAN = "不 非 没 除 至少 至多 最多 最少 大于 小于 超 以上 以下 左右 或 倍 半 平方 立方 分之 几 多 负 错".split()
DOUBTS = frozenset(
    "wrong incorrect should maybe perhaps possibly or but however instead actually also right valid correct answer works not no rather really likely".split()
)
# First words of a remark in brackets after an answer that does not give another answer.
REMARK_OPENINGS = frozenset(
    "since because as where for if when that which in the each per rounded to approximately approx about after from by using see given assuming taking choosing rejecting ignoring at i ie i.e with "
    "of only units all exactly 因为 其中 约".split()
)
# A number after one of these is a label.
LABELS = frozenset(
    "room question problem step part chapter page option case exercise figure equation example section item line row column lemma theorem number no. choice "
    "level grade version round task test table stage method approach way solution-no attempt january february march april june july august september october november december".split()
)
OPENINGS = frozenset(
    "therefore so thus hence then finally ok okay well consequently accordingly 所以 因此 故 于是 那么".split()
)
HEDGES = frozenset("maybe perhaps possibly probably might either guess unsure idea not".split())
ARTICLES = frozenset("the a an".split())
SHORT_WORDS = frozenset(  # words of two or three letters; other runs of two or three letters are products
    "am an and any are as at be but by can did do for had has he her his how if in is it its may me my no nor not now of off on one or our out "
    "per she six so ten the to too two up us was we who why yes yet you all odd red boy cat day dog man men new old own put say see set top way "
    "get got let use add say tie ice car sun mon tue wed thu fri sat jan feb mar apr jun jul aug sep oct nov dec dne nan nil both only pm".split()
)

EMPTY, REALS, NO_LIMIT, MANY = "no solution", "all real numbers", "does not exist", "infinitely many"
_PHRASES = {
    EMPTY: "no solution|no solutions|no real solution|no real solutions|no solution exists|no solutions exist|there is no solution|there are no solutions|"
    "there is no real solution|there are no real solutions|no roots|no real roots|no root|empty set|the empty set|null set|no such number exists|"
    "has no solution|no values|no value|no integer solutions|no such value exists|无解|没有解|无实数解|无实根|空集|方程无解|the equation has no solution|"
    "keine lösung|keine lösungen|pas de solution|aucune solution|sin solución|no hay solución|ninguna solución|nessuna soluzione|"
    "no valid solution|no valid solutions|no possible solution|no feasible solution|no answer|does not have a solution|inconsistent|solution does not exist",
    REALS: "all real numbers|all reals|all real|any real number|all real x|all real values|all real values of x|every real number|the set of all real numbers|"
    "set of all real numbers|the real numbers|real numbers|all the real numbers|reals|the reals|set of real numbers|the set of real numbers|"
    "x is any real number|x can be any real number|全体实数|所有实数|任意实数|一切实数|实数集|all numbers|any real value|all values of x|all x",
    NO_LIMIT: "dne|does not exist|limit does not exist|the limit does not exist|doesn't exist|do not exist|not exist|极限不存在|不存在|non existent|nonexistent",
    MANY: "infinitely many|infinitely many solutions|infinite number of solutions|infinite solutions|an infinite number|infinite number|"
    "infinitely many solutions exist|there are infinitely many solutions|there are infinitely many|an infinite number of solutions|无穷多|无数个|无穷多个|无数|"
    "无穷多解|无数解|has infinitely many solutions|infinitely many values",
    "infinity": "infinity|infinite|positive infinity|plus infinity|inf|oo|正无穷|无穷大|无穷|正无穷大",
    "-infinity": "negative infinity|minus infinity|负无穷|负无穷大",
    "undefined": "undefined|not defined|is undefined|无意义|未定义",
    "yes": "yes|是|是的", "no": "no|否|不是", "true": "true|正确|对|correct", "false": "false|错误|错|incorrect",
    "odd": "odd|奇数|奇函数", "even": "even|偶数|偶函数",
}  # fmt: skip
PHRASES = {spelling: meaning for meaning, spellings in _PHRASES.items() for spelling in spellings.split("|")}


def changes(word: str) -> bool:
    """Returns whether a word changes, bounds, doubts or denies the number beside it."""
    if "\u4e00" <= word[:1] <= "\u9fff":
        return any(part in word for part in CHANGING_HAN)
    return word in CHANGING


def han_number(text: str) -> Fraction | None:
    """Returns the number of Chinese numerals, alone or after digits: 十二, 3万, 二分之一; None for another text."""
    if part := _HAN_PART.fullmatch(text):
        bottom, top = (han_number(side) if not side.isdigit() else Fraction(side) for side in part.groups())
        return None if not bottom or top is None else top / bottom
    if behind := _DIGITS_HAN.fullmatch(text):
        value = Fraction(behind[1])
        for character in behind[2]:
            value *= (_HAN_UNITS | _HAN_SCALES)[character]
        return value
    if not _HAN_NUMBER.fullmatch(text):
        return None
    total = section = digit = 0
    for character in text:
        if character in _HAN_DIGITS:
            digit = _HAN_DIGITS[character]
        elif character in _HAN_UNITS:
            section, digit = section + (digit or 1) * _HAN_UNITS[character], 0
        else:
            total, section, digit = (total + section + digit) * _HAN_SCALES[character], 0, 0
    return Fraction(total + section + digit)


def number(words: list[str]) -> Fraction | None:
    """Returns the number that English words and numerals express together, else None.

    Reads "minus 5", "negative seven", "1.5 million", "two hundred and six", "three quarters", "one half", "six and a
    half".
    """
    if not words:
        return None
    if words[0] in SIGNS:
        value = number(words[1:])
        return None if value is None or value < 0 else SIGNS[words[0]] * value
    if "and" in words:  # six and two thirds, two hundred and six
        place = words.index("and")
        whole, rest = number(words[:place]), number(words[place + 1 :])
        if whole is not None and rest is not None and (0 < rest < 1 or (words[place - 1] == "hundred" and rest < 100)):
            return whole + rest
        return None
    if words[-1] in PARTS and len(words) > 1 and words[-1] not in ("second", "seconds"):
        top = Fraction(1) if words[:-1] in (["a"], ["an"]) else _whole(words[:-1])
        return None if top is None else top / PARTS[words[-1]]
    if len(words) > 1 and words[-1] in POWERS and (base := number(words[:-1])) is not None and abs(base) < 10**9:
        return base ** POWERS[words[-1]]
    if words[0] in MULTIPLES and len(words) > 1 and (value := number(words[1 + (words[1] == "of") :])) is not None:
        return value * MULTIPLES[words[0]]
    if words in (["half"], ["quarter"]):
        return Fraction(1, PARTS[words[0]])
    if len(words) > 1 and words[-1] in GROUPS and words[-1] != "pair" and words[-1] != "pairs":
        value = Fraction(1) if words[:-1] == ["a"] else number(words[:-1])
        return None if value is None else value * GROUPS[words[-1]]
    return _whole(words)


def _whole(words: list[str]) -> Fraction | None:
    """Returns the number of words such as two hundred six, 1.5 million, twenty five, three point five; else None."""
    total = current = Fraction(0)
    last = None  # size of the last number word; the next one must be smaller
    for place, word in enumerate(words):
        if word == "point" and place:
            digits = [SMALL.get(digit, 10) for digit in words[place + 1 :]]
            if not digits or max(digits) > 9:
                return None
            return total + current + Fraction(int("".join(map(str, digits))), 10 ** len(digits))
        if word in SMALL:
            value, size = Fraction(SMALL[word]), (1 if SMALL[word] < 10 else 10 if SMALL[word] % 10 == 0 else 5)
            if last is not None and not (last > 10 or (last == 10 and SMALL[word] < 10)):
                return None
            current, last = current + value, size
        elif re.fullmatch(r"\d+(?:\.\d+)?", word):
            if last is not None:
                return None
            current, last = Fraction(word), 1
        elif word in ("hundred", "hundreds", *SCALES):
            if last is None and word[-1] == "s":
                return None
            scale = SCALES.get(word, 100)
            if scale == 100:
                current, last = (current or 1) * 100, 100
            else:
                total, current, last = total + (current or 1) * scale, Fraction(0), scale
        elif word in ("a", "an") and place == 0 and len(words) > 1:
            continue
        else:
            return None
    return None if last is None else total + current
