"""Prints normal_table.h: the tail of the normal distribution for GeLU, in eight pieces.

With Q(t) = Phi(-t) exp(t^2 / 2), which is smooth, GeLU takes log Q(t), and its derivative
K(t) = Q(t) - t / sqrt(2 pi). With w = 4 + t / 1.125, each of the octaves [4, 8) and [8, 16) of w is
cut into four pieces, and the functions are interpolated in the Chebyshev nodes of each by a
polynomial in the distance of t from the middle. Needs mpmath.
"""

from collections.abc import Callable

import mpmath as mp

STEP = mp.mpf("1.125")


def pieces() -> list[tuple[mp.mpf, mp.mpf]]:
    """Middle and half the width of each piece, in t.

    The number of a piece is that of the quarter of an octave modulo 8, as the low bit of w's
    exponent and the high bits of its mantissa give it: [8, 16), whose exponent is even, is first.
    """
    lefts = [(8 + 2 * i, 2) for i in range(4)] + [(4 + i, 1) for i in range(4)]
    return [((left + mp.mpf(width) / 2 - 4) * STEP, width * STEP / 2) for left, width in lefts]


def ratio(t: mp.mpf) -> mp.mpf:
    """Q(t)."""
    return mp.erfc(t / mp.sqrt(2)) / 2 * mp.exp(t * t / 2)


def log_ratio(t: mp.mpf) -> mp.mpf:
    """Log Q(t)."""
    return mp.log(ratio(t))


def derivative_ratio(t: mp.mpf) -> mp.mpf:
    """K(t)."""
    return ratio(t) - t / mp.sqrt(2 * mp.pi)


def coefficients(function: Callable, middle: mp.mpf, half: mp.mpf, degree: int) -> list[mp.mpf]:
    """Of the polynomial in t - middle, by rising power."""
    count = degree + 1
    nodes = [half * mp.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    powers = mp.matrix([[x**j for j in range(count)] for x in nodes])
    return list(mp.lu_solve(powers, mp.matrix([function(middle + x) for x in nodes])))


def show(name: str, what: str, rows: list[list[mp.mpf]]) -> None:
    """One row for each power, one column for each piece."""
    print(f"\n// {what}")
    print(f"TPCORE_TABLE {name}[{len(rows)}][8] = {{")
    for row in rows:
        print("    {" + ", ".join(f"{mp.nstr(x, 9, strip_zeros=False)}f" for x in row) + "},")
    print("};")


def by_power(function: Callable, degree: int) -> list[list[mp.mpf]]:
    """The coefficients of all pieces, power by power."""
    return [
        list(row)
        for row in zip(*(coefficients(function, *p, degree) for p in pieces()), strict=True)
    ]


def main() -> None:
    """Print the header."""
    mp.mp.dps = 40
    print("// SPDX-License-Identifier: Apache-2.0")
    print("// Written by normal_table.py, which says what it is; included by math.h only.")
    print("#pragma once\n\nnamespace tpcore {")
    constant, *higher = by_power(log_ratio, 6)
    # The constant in two parts: sums of the first with multiples of kLn2High are exact.
    coarse = [mp.nint(x * 512) / 512 for x in constant]
    fine = [x - y for x, y in zip(constant, coarse, strict=True)]
    show("kLogTail", "Of log Q: the constant in two parts, then by power.", [coarse, fine, *higher])
    show("kLogTailHalf", "Of log Q within 6e-5, for types of 16 bits.", by_power(log_ratio, 3))
    show("kSlope", "Of K.", by_power(derivative_ratio, 7))
    show("kSlopeHalf", "Of K within 4e-5.", by_power(derivative_ratio, 4))
    print("\n}  // namespace tpcore")


if __name__ == "__main__":
    main()
