"""exp, tanh, erf, the sigmoid and the normal distribution, branch-free in float32, so that loops vectorise.

float64 takes the C library's functions: it is for checking, and must be as good as numpy. float32 reduces
the range and evaluates a polynomial: exp, tanh and erf within 2 units in the last place; for weights, of
which only sums matter, in fewer steps: exp_below within 2.2e-7 + 1.4e-8 |x| of the value, the sigmoid within
3.5e-7 + 1.4e-8 |x|, Φ and φ within 1.8e-7, and their tails within 2e-6 of the value up to |x| = 6, 6e-6
beyond. NaN stays NaN and infinities go where they should. The coefficients are least-maximum fits
(iteratively reweighted least squares on Chebyshev nodes) of the function named beside them. All of it is
compiled without re-association: the order of the additions is the method.
"""
from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from kernels.jit import exact
from kernels.simd import bits, fma, from_bits

F = np.float32
ROUND = F(1.5 * 2**23)                   # adding it leaves the nearest integer in the low bits of the sum
ROUND_BITS = np.int32(ROUND.view(np.int32))
BIASED = F(ROUND + 127)                  # then they are the exponent of 2**n
LOG2_E = F(1 / math.log(2))
MINUS_HALF_LOG2_E = F(-0.5 / math.log(2))
LN2_HIGH = F(0.693359375)                # few bits, so that n * LN2_HIGH is exact
LN2_LOW = F(math.log(2) - 0.693359375)
EXP = [F(c) for c in (0.5, 0.166665181517601, 0.04166620597243309, 0.008368953131139278,
                      0.0013950600987300277)]
EXP2 = [F(c) for c in (0.693146824836731, 0.24022234976291656, 0.05550891533493996, 0.009671762585639954,
                       0.0013225707225501537)]
TANH = [F(c) for c in (-0.3333328366279602, 0.13331490755081177, -0.05374349653720856, 0.020650586113333702,
                       -0.005717044696211815)]
ERF = [F(c) for c in (0.12837915122509003, -0.3761250674724579, 0.11281955242156982, -0.026771284639835358,
                      0.004999601747840643, -0.0006021808367222548)]
ERFC = [F(c) for c in (-0.00017055092030204833, 1.1294951438903809, 0.6333866715431213, 0.10823660343885422,
                       -0.025091486051678658, 0.004160522948950529, -0.0004323021275922656,
                       2.0909474187646993e-05)]
MILLS = [F(c) for c in (0.13711832463741302, 0.13756747543811798, 0.11654458194971085, 0.11348748207092285,
                        -0.041405584663152695, 0.19417771697044373, -0.2747516930103302, 0.14541086554527283,
                        -0.028149180114269257)]
E0, E1, E2, E3, E4 = EXP                 # numba wants them one by one
P0, P1, P2, P3, P4 = EXP2
T0, T1, T2, T3, T4 = TANH
R0, R1, R2, R3, R4, R5 = ERF
C0, C1, C2, C3, C4, C5, C6, C7 = ERFC
M0, M1, M2, M3, M4, M5, M6, M7, M8 = MILLS
HALF_ROOT = math.sqrt(0.5)               # 1 / √2
DENSITY = 1 / math.sqrt(2 * math.pi)     # of the standard normal distribution at 0
FAR = F(13.25)                           # exp(-x²/2) is below the normal numbers from here on


@exact
def exp32(x):
    """2**n * exp(r) with x = n log 2 + r and |r| <= log(2) / 2; 2**n is two factors, for tiny results."""
    x = F(89) if x > F(89) else x
    x = F(-104) if x < F(-104) else x
    shifted = fma(x, LOG2_E, ROUND)
    n, whole = bits(shifted) - ROUND_BITS, shifted - ROUND
    half = n >> np.int32(1)
    one, shift = np.int32(127), np.int32(23)
    r = fma(whole, -LN2_LOW, fma(whole, -LN2_HIGH, x))
    q = fma(fma(fma(fma(E4, r, E3), r, E2), r, E1), r, E0)          # (exp(r) - 1 - r) / r**2
    y = fma(fma(q, r, F(1)), r, F(1))
    return y * from_bits((half + one) << shift) * from_bits((n - half + one) << shift)


@exact
def power_of_two32(shifted, r):
    """2**n * 2**r for |r| <= 1 / 2, where shifted is BIASED + n: 0 for n = -127."""
    q = fma(fma(fma(fma(P4, r, P3), r, P2), r, P1), r, P0)          # (2**r - 1) / r
    return fma(q, r, F(1)) * from_bits(bits(shifted) << np.int32(23))


@exact
def exp_below32(x):
    """x log2(e) = n + r, rounded once."""
    x = F(-88) if x < F(-88) else x
    shifted = fma(x, LOG2_E, BIASED)
    return power_of_two32(shifted, fma(x, LOG2_E, BIASED - shifted))


@exact
def sigmoid32(x):
    low = F(89) if x < F(-89) else -x                               # exp_below of 89 is infinite
    return F(1) / (F(1) + exp_below32(low))


@exact
def normal32(x):
    t = FAR if abs(x) > FAR else abs(x)
    square = t * t
    shifted = fma(square, MINUS_HALF_LOG2_E, BIASED)
    e = power_of_two32(shifted, fma(square, MINUS_HALF_LOG2_E, BIASED - shifted))     # exp(-t² / 2)
    z = F(1) / fma(t, F(11 / 32), F(1))
    p = fma(fma(fma(fma(fma(fma(fma(fma(M8, z, M7), z, M6), z, M5), z, M4), z, M3), z, M2), z, M1), z, M0)
    tail = e * (p * z)                                              # Mills: Φ(-t) / exp(-t² / 2)
    return tail if x < F(0) else F(1) - tail, F(DENSITY) * e


@exact
def tanh32(x):
    size = abs(x)
    s = x * x
    q = fma(fma(fma(fma(T4, s, T3), s, T2), s, T1), s, T0)        # (tanh(x) / x - 1) / x**2, for |x| < 0.625
    near = x * fma(q, s, F(1))
    e = exp_below32(F(-2) * size)
    far = (F(1) - e) / (F(1) + e)
    return near if size < F(0.625) else math.copysign(far, x)


@exact
def erf32(x):
    size = abs(x)
    s = x * x
    q = fma(fma(fma(fma(fma(R5, s, R4), s, R3), s, R2), s, R1), s, R0)     # erf(x) / x - 1, for |x| < 0.92
    near = fma(q, x, x)
    t = F(4) if size > F(4) else size
    p = fma(fma(fma(fma(fma(fma(fma(C7, t, C6), t, C5), t, C4), t, C3), t, C2), t, C1), t, C0)
    far = F(1) - exp_below32(-p)                                           # p = -log(erfc(t))
    return near if size < F(0.92) else math.copysign(far, x)


def exp(x):
    """e**x."""


def tanh(x):
    """Hyperbolic tangent."""


def erf(x):
    """The error function."""


def exp_below(x):
    """e**x for x up to 88 in half the work; where that is below the normal numbers, 0 or below them.

    For weights: a softmax takes the largest of its arguments from the others first.
    """


def sigmoid(x):
    """1 / (1 + exp(-x)), which is (1 + tanh(x / 2)) / 2."""


def normal(x):
    """Φ(x) and φ(x): the probability of less than x in the standard normal distribution, and its density."""


def _choose(name, for_float32, for_float64):
    @overload(name, jit_options={"fastmath": {"contract"}, "forceinline": True})
    def choose(x):
        if x == types.float32:
            return lambda x: for_float32(x)
        return lambda x: for_float64(x)


_choose(exp, exp32, math.exp)
_choose(tanh, tanh32, math.tanh)
_choose(erf, erf32, math.erf)
_choose(exp_below, exp_below32, math.exp)
_choose(sigmoid, sigmoid32, exact(lambda x: 1 / (1 + math.exp(-x))))
_choose(normal, normal32, exact(lambda x: (0.5 * math.erfc(-HALF_ROOT * x),
                                           DENSITY * math.exp(-0.5 * x * x))))
