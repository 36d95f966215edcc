# mypy: disallow-untyped-defs=False
"""Elementary functions for the kernels: one machine instruction where that is enough, else safe.

`exp2`, `log2` and `reciprocal` are the special-function unit's own approximations (NVIDIA: an
error of about 2^-22, denormal numbers taken as zero). Triton's `tl.log2` is a polynomial of 25
instructions there, and its division takes 9.

The other functions are accurate to a few units in the last place over the whole range of float32,
also relative to a tiny result, and a NaN comes out as a NaN.

HIDDEN and OUTPUT are the strings of `DensityMLP.hidden` and `DensityMLP.output`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)

# The interpreter runs no inline assembly, and AMD's compiler emits the instruction by itself.
USE_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)

# Of `tl.dot`: products of float32 as three products on the matrix units, at float32's accuracy.
# AMD has no such mode, but matrix units for float32.
DOT_PRECISION = tl.constexpr("tf32x3" if torch.version.hip is None else "ieee")

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
_LN_2_HIGH = tl.constexpr(0.693359375)  # times an integer below 2^14: exact in float32
_LN_2_LOW = tl.constexpr(0.6931471805599453 - 0.693359375)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to an integer


@triton.jit
def exp2(x):
    """2^x, approximately."""
    if USE_PTX:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def log2(x):
    """log2(x), approximately: near x = 1 the absolute error counts, not the relative one."""
    if USE_PTX:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def reciprocal(x):
    """1 / x, approximately."""
    if USE_PTX:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def exp(x):
    """e^x = 2^n e^(x - n ln 2): rounding x log2(e) alone would cost |x| 2^-24."""
    n = (tl.minimum(tl.maximum(x * LOG2_E, -126.0), 127.0) + _ROUND) - _ROUND
    rest = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
    return exp2(n) * exp2(rest * LOG2_E)


@triton.jit
def _log1p_of_fraction(e):
    """log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)) by a polynomial, relative error 4e-9."""
    s = e * reciprocal(e + 2.0)
    z = s * s
    q = z * 0.2817833423614502 + 0.27960601449012756
    q = q * z + 0.40024909377098083
    q = q * z + 0.6666631698608398
    q = q * z + 2.0
    return q * s


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.maximum(x, 0.0) + _log1p_of_fraction(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = exp(-tl.abs(x))
    r = reciprocal(1.0 + e)
    return tl.where(x < 0.0, e * r, r)


@triton.jit
def relu(x):
    """max(x, 0), where `tl.maximum` would lose a NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def silu(x):
    """x / (1 + e^-x)."""
    return x * sigmoid(x)


@triton.jit
def activate(x, HIDDEN: tl.constexpr):
    """The hidden activation."""
    if HIDDEN == "softplus":
        y = softplus(x)
    elif HIDDEN == "relu":
        y = relu(x)
    else:
        tl.static_assert(HIDDEN == "silu")
        y = silu(x)
    return y


@triton.jit
def activation_slope(x, HIDDEN: tl.constexpr):
    """The derivative of the hidden activation at x; relu's is 0 at 0."""
    if HIDDEN == "softplus":
        y = sigmoid(x)
    elif HIDDEN == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(HIDDEN == "silu")
        s = sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    return y


@triton.jit
def output(raw, OUTPUT: tl.constexpr):
    """sigma of the last layer's first row."""
    if OUTPUT == "softplus":
        y = softplus(raw)
    elif OUTPUT == "exp":
        y = exp(raw)
    else:
        tl.static_assert(OUTPUT == "identity")
        y = raw
    return y


@triton.jit
def times_output_slope(d_sigma, sigma, OUTPUT: tl.constexpr):
    """The gradient by the raw density, given that by sigma: d_sigma times the output's slope.

    The slope follows from sigma itself: sigma for "exp", 1 - e^-sigma for "softplus". `sigma` is
    not looked at for "identity".
    """
    if OUTPUT == "softplus":
        q = sigma * -0.0010301340371370316 + 0.008062456734478474
        q = q * sigma + -0.04156935214996338
        q = q * sigma + 0.16665059328079224
        q = q * sigma + -0.4999990165233612
        q = q * sigma + 1.0
        # The polynomial, relative error 1e-8 up to 0.7, is for small sigma, where 1 - e^-sigma
        # loses digits.
        y = d_sigma * tl.where(sigma < 0.7, q * sigma, 1.0 - exp(-sigma))
    elif OUTPUT == "exp":
        y = d_sigma * sigma
    else:
        tl.static_assert(OUTPUT == "identity")
        y = d_sigma
    return y
