"""Units of measure: their names, and the ratio of two units.

Dimensions and scales come from sympy.physics.units, which is imported when both sides of a comparison have a unit.
"""

import functools
from collections.abc import Mapping
from fractions import Fraction

Unit = tuple[tuple[str, Fraction], ...]  # (key of _QUANTITIES, power), sorted, without powers of 0

_QUANTITIES = {  # key -> (formula in names of sympy.physics.units or "", names, which are case-sensitive)
    "m": ("meter", "m meter meters metre metres 米"),
    "cm": ("centimeter", "cm cms centimeter centimeters centimetre centimetres 厘米"),
    "mm": ("millimeter", "mm millimeter millimeters millimetre millimetres 毫米"),
    "km": ("kilometer", "km kms kilometer kilometers kilometre kilometres 千米 公里"),
    "dm": ("decimeter", "dm decimeter decimeters decimetre decimetres 分米"),
    "um": ("micrometer", "micrometer micrometers micron microns 微米"),
    "nm": ("nanometer", "nanometer nanometers nanometre nanometres 纳米"),
    "in": ("inch", "in inch inches 英寸"),
    "ft": ("foot", "ft foot feet 英尺"),
    "yd": ("yard", "yd yds yard yards 码"),
    "mi": ("mile", "mi mile miles 英里"),
    "ly": ("lightyear", "ly lightyear lightyears"),
    "au": ("astronomical_unit", "AU"),
    "g": ("gram", "g gram grams 克"),
    "kg": ("kilogram", "kg kgs kilogram kilograms kilo kilos 千克 公斤"),
    "mg": ("milligram", "mg milligram milligrams 毫克"),
    "t": ("tonne", "t tonne tonnes 吨"),
    "ton": ("", "ton tons"),
    "lb": ("pound", "lb lbs pound pounds 磅"),
    "oz": ("", "oz ounce ounces 盎司"),
    "s": ("second", "s sec secs second seconds 秒"),
    "ms": ("millisecond", "millisecond milliseconds 毫秒"),
    "us": ("microsecond", "microsecond microseconds"),
    "ns": ("nanosecond", "nanosecond nanoseconds"),
    "min": ("minute", "min mins minute minutes 分钟 分"),
    "h": ("hour", "h hr hrs hour hours 小时"),
    "day": ("day", "d day days 天 日"),
    "week": ("7 day", "wk week weeks 周 星期"),
    "month": ("", "month months 个月 月"),
    "year": ("year", "yr yrs year years 年 岁"),
    "L": ("liter", "L l liter liters litre litres 升"),
    "mL": ("milliliter", "mL ml milliliter milliliters millilitre millilitres cc 毫升"),
    "gal": ("", "gal gallon gallons"),
    "quart": ("quart", "qt quart quarts"),
    "pint": ("", "pint pints"),
    "cup": ("", "cup cups"),
    "N": ("newton", "N newton newtons 牛顿 牛"),
    "J": ("joule", "J joule joules 焦耳 焦"),
    "kJ": ("1000 joule", "kilojoule kilojoules 千焦"),
    "cal": ("", "cal calorie calories"),
    "kcal": ("", "kcal"),
    "W": ("watt", "W watt watts 瓦 瓦特"),
    "kW": ("1000 watt", "kilowatt kilowatts 千瓦"),
    "MW": ("1000000 watt", "megawatt megawatts"),
    "Wh": ("3600 joule", "Wh"),
    "kWh": ("3600000 joule", "kWh"),
    "eV": ("electronvolt", "eV electronvolt electronvolts"),
    "Pa": ("pascal", "Pa pascal pascals 帕"),
    "atm": ("atmosphere", "atm atmosphere atmospheres"),
    "bar": ("bar", "bar bars"),
    "mmHg": ("", "mmHg torr"),
    "Hz": ("hertz", "Hz hertz 赫兹 赫"),
    "C": ("coulomb", "C coulomb coulombs 库仑"),
    "uC": ("coulomb / 1000000", "microcoulomb microcoulombs"),
    "V": ("volt", "V volt volts 伏特 伏"),
    "A": ("ampere", "A amp amps ampere amperes 安培 安"),
    "Ohm": ("ohm", "Omega ohm ohms 欧姆 欧"),
    "F": ("farad", "F farad farads"),
    "H": ("henry", "H henry henries"),
    "T": ("tesla", "T tesla teslas"),
    "Wb": ("weber", "Wb weber webers"),
    "K": ("kelvin", "K kelvin kelvins"),
    "mol": ("mole", "mol mole moles 摩尔"),
    "M": ("", "molar"),
    "rad": ("radian", "rad rads radian radians 弧度"),
    "degrees": ("degree", "degree degrees deg degs 度"),
    "sr": ("steradian", "sr"),
    "dB": ("", "dB"),
    "mph": ("mile / hour", "mph"),
    "kph": ("kilometer / hour", "kph kmh kmph"),
    "acre": ("", "acre acres"),
    "hectare": ("", "ha hectare hectares"),
    "celsius": ("", "celsius 摄氏度"),
    "fahrenheit": ("", "fahrenheit 华氏度"),
    "dollar": ("", "dollar dollars USD usd buck bucks 美元 $"),
    "cent": ("dollar / 100", "cent cents penny pennies ¢ 美分"),
    "euro": ("", "euro euros EUR €"),
    "sterling": ("", "GBP £"),
    "yuan": ("", "yuan RMB rmb CNY 元 块 块钱 人民币"),
    "yen": ("", "JPY ¥ yen"),
    "rupee": ("", "rupee rupees Rs INR"),
    "percent": ("", "percent pct"),
    "am": ("", "am a.m."),
    "pm": ("", "pm p.m."),
    "bit": ("bit", "bit bits"),
    "byte": ("byte", "byte bytes B"),
    "units": ("", "unit units 单位"),  # whatever is measured
    "revolution": ("", "rev revs revolution revolutions rpm"),
}  # fmt: skip
NAMES = {name: key for key, (_, names) in _QUANTITIES.items() for name in names.split()}
_PREFIXES = {"k": 3, "M": 6, "G": 9, "T": 12, "m": -3, "u": -6, "n": -9, "p": -12, "c": -2, "d": -1}  # powers of ten
_PREFIXED = frozenset("m g s N J W Pa Hz C V A F H T K mol L eV Omega bar".split())
# Abbreviations that are units even in italics; other letters with a prefix are products (kT, mV^2).
PLAIN = frozenset(NAMES) | frozenset("kW MW kN kJ kPa MPa kHz MHz GHz keV MeV GeV mA mV kV ms us um nm".split())
CURRENCY_SIGNS = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "¢": "cent"}
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
POWERED_WORDS = {"squared": 2, "cubed": 3}
HAN_POWERS = {"平方": 2, "立方": 3}


def named(name: str) -> str | None:
    """Returns the key of the unit that a word names, None if it names none; abbreviations are case-sensitive."""
    key = NAMES.get(name)
    if key is None and name[:1] in _PREFIXES and name[1:] in _PREFIXED:
        return f"{name[0]} {NAMES[name[1:]]}"
    if key is None and len(name) > 3:
        key = NAMES.get(name.lower())
    return key


def unit(powers: Mapping[str, Fraction]) -> Unit:
    """Returns the unit of keys and powers."""
    return tuple(sorted((key, power) for key, power in powers.items() if power))


def ratio(first: Unit, second: Unit) -> Fraction | None:
    """Returns the exact ratio of the first unit to the second; None if their dimensions differ."""
    if first == second:
        return Fraction(1)
    powers = dict(first)
    for key, power in second:
        powers[key] = powers.get(key, Fraction(0)) - power
    scale, dimensions = Fraction(1), {}
    for key, power in powers.items():
        if power.denominator != 1:
            return None
        factor, parts = _dimension(key)
        scale *= factor**power.numerator
        for name, exponent in parts:
            dimensions[name] = dimensions.get(name, 0) + exponent * power
    return scale if not any(dimensions.values()) else None


@functools.cache
def _dimension(key: str) -> tuple[Fraction, tuple[tuple[str, int], ...]]:
    """Returns (scale, powers of base dimensions) of a unit; a unit that sympy does not know is its own dimension."""
    import sympy
    from sympy.physics import units
    from sympy.physics.units.systems import SI

    prefix, _, base = key.rpartition(" ")
    if prefix:
        scale, parts = _dimension(base)
        return scale * Fraction(10) ** _PREFIXES[prefix], parts
    formula = _QUANTITIES[key][0]
    if not formula:
        return Fraction(1), ((key, 1),)
    scale, dimensions = Fraction(1), {}
    sign = 1
    for part in formula.split():
        if part == "/":
            sign = -1
        elif part.isdigit():
            scale *= Fraction(part) ** sign
        elif part in ("radian", "degree", "dollar"):
            dimensions[part] = dimensions.get(part, 0) + sign
        else:
            quantity = getattr(units, part)
            factor = sympy.nsimplify(quantity.scale_factor)
            if not factor.is_Rational:
                return Fraction(1), ((key, 1),)
            scale *= Fraction(int(factor.p), int(factor.q)) ** sign
            for name, power in SI.get_dimension_system().get_dimensional_dependencies(quantity.dimension).items():
                name = str(getattr(name, "name", name))
                dimensions[name] = dimensions.get(name, 0) + sign * int(power)
    return scale, tuple(sorted(dimensions.items()))
