"""Prints normal_table.h: the tail of the normal distribution in 32 pieces.

Q(t) = Phi(-t) exp(t^2 / 2) is smooth and between 0.5 and 0.026 for t in [0, 15). With w = t + 1,
each octave of w is cut into 8 intervals, and Q is interpolated in the 6 Chebyshev nodes of each
by a polynomial in the distance from the interval's left end. Needs mpmath.
"""

import mpmath as mp
import numpy as np

DEGREE, OCTAVES, PIECES = 5, 4, 8


def ratio(t: mp.mpf) -> mp.mpf:
    """Q(t)."""
    return mp.erfc(t / mp.sqrt(2)) / 2 * mp.exp(t * t / 2)


def coefficients(left: mp.mpf, width: mp.mpf) -> mp.matrix:
    """Of the polynomial for w in [left, left + width), by rising power."""
    count = DEGREE + 1
    nodes = [width / 2 * (1 + mp.cos(mp.pi * (2 * k + 1) / (2 * count))) for k in range(count)]
    powers = mp.matrix([[x**j for j in range(count)] for x in nodes])
    return mp.lu_solve(powers, mp.matrix([ratio(left + x - 1) for x in nodes]))


def main() -> None:
    """Print the header."""
    mp.mp.dps = 40
    # An entry's number is that of the interval modulo 32, as the low bits of w's exponent and
    # the high bits of its mantissa give it: the first octave, with exponent 127, stands last.
    pieces = [
        coefficients(mp.mpf(2) ** octave * (1 + mp.mpf(piece) / PIECES), mp.mpf(2) ** octave / 8)
        for octave in [*range(1, OCTAVES), 0]
        for piece in range(PIECES)
    ]
    print("// SPDX-License-Identifier: Apache-2.0")
    print("// Written by normal_table.py, which says what it is.")
    print("#pragma once\n\nnamespace tpcore {\n")
    print(f"static const float kNormalRatio[{DEGREE + 1}][{OCTAVES * PIECES}] = {{")
    for power in range(DEGREE + 1):
        values = [f"{mp.nstr(piece[power], 9)}f" for piece in pieces]
        print("    {" + ", ".join(values) + "},")
    print("};\n")
    print("// What the first row lost in rounding to float32.")
    lost = [piece[0] - mp.mpf(float(np.float32(mp.nstr(piece[0], 9)))) for piece in pieces]
    print(f"static const float kNormalRatioLow[{OCTAVES * PIECES}] = {{")
    print("    " + ", ".join(f"{mp.nstr(x, 4)}f" for x in lost) + ",")
    print("};\n\n}  // namespace tpcore")


if __name__ == "__main__":
    main()
