"""Pixel quantities on the command line and in recipes: `8/255` as well as `0.0314`."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec


def parse_pixels(text: str) -> float:
    """A non-negative finite number from "0.0314", "8/255" or "0.5/255" (pixel units of [0, 1]).

    Raises ValueError naming the text when it is neither.
    """
    try:
        numerator, slash, denominator = text.partition("/")
        # Exact, then rounded once: 8/255 is the nearest double, whatever the digits given.
        value = float(Fraction(Decimal(numerator)) / Fraction(Decimal(denominator))) if slash else float(text)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{text!r} is neither a number nor a fraction such as 8/255") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text!r} is not a finite number of at least 0")
    return value


def format_pixels(value: float) -> str:
    """`8/255` where the value is a whole or half multiple of 1/255, else the shortest exact decimal."""
    for denominator in (1, 2, 4):
        multiple = round(value * 255 * denominator)
        if multiple and multiple / denominator / 255 == value:
            return f"{multiple / denominator:g}/255"
    return repr(value)


Pixels = Annotated[
    float,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PIXELS",
        instance_from_str=lambda args: parse_pixels(args[0]),
        is_instance=lambda value: isinstance(value, int | float),
        str_from_instance=lambda value: [format_pixels(float(value))],
    ),
]
