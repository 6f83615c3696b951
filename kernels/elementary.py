"""exp, tanh, erf and the normal distribution, for kernels: branch-free in float32, so that loops vectorise.

float64 takes the C library's functions: it is for checking, and must be as good as numpy. float32 reduces
the range and evaluates a polynomial, within 2 units in the last place (normal_cdf and normal_pdf: of 1); NaN
stays NaN and infinities go where they should. The coefficients are least-maximum fits (iteratively reweighted
least squares on Chebyshev nodes) of the function named beside them. All of it is compiled without
re-association: the order of the additions is the method.
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
LN2_HIGH = F(0.693359375)                # few bits, so that n * LN2_HIGH is exact
LN2_LOW = F(math.log(2) - 0.693359375)
EXP = [F(c) for c in (0.5, 0.166665181517601, 0.04166620597243309, 0.008368953131139278,
                      0.0013950600987300277)]
TANH = [F(c) for c in (-0.3333328366279602, 0.13331490755081177, -0.05374349653720856, 0.020650586113333702,
                       -0.005717044696211815)]
ERF = [F(c) for c in (0.12837915122509003, -0.3761250674724579, 0.11281955242156982, -0.026771284639835358,
                      0.004999601747840643, -0.0006021808367222548)]
ERFC = [F(c) for c in (-0.00017055092030204833, 1.1294951438903809, 0.6333866715431213, 0.10823660343885422,
                       -0.025091486051678658, 0.004160522948950529, -0.0004323021275922656,
                       2.0909474187646993e-05)]
TAIL = [F(c) for c in (0.693147148816168, 0.7978865549164749, 0.3182902566613228, 0.036406658214259376,
                       -0.004905520289895342, 7.774288219242388e-05, 0.00015497934358282066,
                       -4.1430642180879614e-05, 5.587118798137706e-06, -4.0584634349704097e-07,
                       1.256959652074058e-08)]
E0, E1, E2, E3, E4 = EXP                 # numba wants them one by one
T0, T1, T2, T3, T4 = TANH
R0, R1, R2, R3, R4, R5 = ERF
C0, C1, C2, C3, C4, C5, C6, C7 = ERFC
L0, L1, L2, L3, L4, L5, L6, L7, L8, L9, L10 = TAIL
HALF_ROOT = math.sqrt(0.5)               # 1 / √2
LOG_DENSITY = -0.5 * math.log(2 * math.pi)


@exact
def exp_rest(x, n):
    """exp(x - n log 2), for the nearest whole n."""
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x))
    q = fma(fma(fma(fma(E4, r, E3), r, E2), r, E1), r, E0)          # (exp(r) - 1 - r) / r**2
    return fma(fma(q, r, F(1)), r, F(1))


@exact
def exp32(x):
    """2**n * exp(r) with x = n log 2 + r and |r| <= log(2) / 2; 2**n is two factors, for tiny results."""
    x = F(89) if x > F(89) else x
    x = F(-104) if x < F(-104) else x
    shifted = fma(x, LOG2_E, ROUND)
    n = bits(shifted) - ROUND_BITS
    half = n >> np.int32(1)
    one, shift = np.int32(127), np.int32(23)
    y = exp_rest(x, shifted - ROUND)
    return y * from_bits((half + one) << shift) * from_bits((n - half + one) << shift)


@exact
def exp_below32(x):
    """As exp32, with one factor, which is 0 for n = -127."""
    x = F(-88) if x < F(-88) else x
    shifted = fma(x, LOG2_E, BIASED)
    return exp_rest(x, shifted - BIASED) * from_bits(bits(shifted) << np.int32(23))


@exact
def normal_cdf32(x):
    t = abs(x)
    p = fma(fma(fma(fma(L10, t, L9), t, L8), t, L7), t, L6)
    p = fma(fma(fma(fma(fma(fma(p, t, L5), t, L4), t, L3), t, L2), t, L1), t, L0)
    below = exp_below32(-p)                                         # p = -log(Φ(-t)), or more from t = 6 on
    return below if x < F(0) else F(1) - below


@exact
def normal_pdf32(x):
    return exp_below32(fma(x * x, F(-0.5), F(LOG_DENSITY)))


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
    """e**x for x up to 88 in two thirds of the work; where that is below the normal numbers, 0 or below them.

    For weights: a softmax takes the largest of its arguments from the others first.
    """


def normal_cdf(x):
    """Φ(x), the probability of less than x."""


def normal_pdf(x):
    """φ(x), the density of the standard normal distribution."""


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
_choose(normal_cdf, normal_cdf32, exact(lambda x: 0.5 * math.erfc(-HALF_ROOT * x)))
_choose(normal_pdf, normal_pdf32, exact(lambda x: math.exp(LOG_DENSITY - 0.5 * x * x)))
