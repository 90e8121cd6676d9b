"""This module draws dropout masks inside kernels. `fastbert_kernels.masks` defines the masks.

One call of Philox4x32-7 gives the numbers of eight neighbouring columns. Values that depend only on a row or only on a
column stay (R, 1) or (1, G) as long as possible. So each call has 9 of the 14 multiplications.

A kernel has the arguments `key_low, key_high, site, threshold, keep_scale` from `arguments`. Its decorator names the
first four in `do_not_specialize`, so that no training step compiles it again.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from fastbert_kernels import masks
from fastbert_kernels.jit import jit
from fastbert_kernels.masks import Dropout

N_ROUNDS, GROUP = tl.constexpr(masks.N_ROUNDS), tl.constexpr(masks.GROUP)
MULTIPLIER_0, MULTIPLIER_1 = tl.constexpr(masks.MULTIPLIERS[0]), tl.constexpr(masks.MULTIPLIERS[1])
WEYL_0, WEYL_1 = tl.constexpr(masks.WEYL[0]), tl.constexpr(masks.WEYL[1])
LOW_HALF = tl.constexpr(0xFFFF)

DO_NOT_SPECIALIZE = ("key_low", "key_high", "site", "threshold")


@jit
def _wide(x, MULTIPLIER: tl.constexpr):
    """Returns the high and the low word of x * MULTIPLIER, for uint32 x: one instruction of the hardware."""
    product = x.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@jit
def philox(group, row, head, key_low, key_high, site):
    """Returns the four words, uint32, of each counter. The integers broadcast against one another."""
    c0, c1, c2, c3 = group.to(tl.uint32), row.to(tl.uint32), tl.cast(head, tl.uint32), site.to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32), key_high.to(tl.uint32)
    for _ in tl.static_range(N_ROUNDS):
        high_0, low_0 = _wide(c0, MULTIPLIER_0)
        high_1, low_1 = _wide(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += WEYL_0
        k1 += WEYL_1
    return c0, c1, c2, c3


@jit
def _keep_halves(word, threshold):
    """Returns the masks of both 16-bit numbers of a word, the low one first."""
    return (word & LOW_HALF) >= threshold, (word >> 16) >= threshold


@jit
def keep_columns(
    rows,  # (R,) packed rows
    groups,  # (G,) columns / 8
    head,  # 0 but in attention
    key_low,
    key_high,
    site,
    threshold,
):
    """Returns the mask (R, 8 * G), bool, True where an element is kept. Group g is columns 8 g to 8 g + 7."""
    w0, w1, w2, w3 = philox(groups[None, :], rows[:, None], head, key_low, key_high, site)
    limit = threshold.to(tl.uint32)
    e0, e1 = _keep_halves(w0, limit)
    e2, e3 = _keep_halves(w1, limit)
    e4, e5 = _keep_halves(w2, limit)
    e6, e7 = _keep_halves(w3, limit)
    # Each join adds an axis of two, the last one to be the one that varies fastest.
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), (rows.shape[0], groups.shape[0] * GROUP))


@jit
def _carries(word, addend):
    """Adds the 16-bit halves of two words, and returns the carries in bits 15 and 31. Other bits are undefined."""
    partial = (word & 0x7FFF7FFF) + (addend & 0x7FFF7FFF)
    return (word & addend) | (partial & (word | addend))


@jit
def keep_bits(group, row, head, key_low, key_high, site, threshold):
    """Returns the masks of a group's columns as bits of a uint32: column 2 i + h is bit 12 + i + 16 h, others are 0.

    A number is kept if adding 2^16 - threshold to it carries out of its 16 bits. Both numbers of a word are added at
    once, without their highest bits; the carry is the majority of both highest bits and of what reaches them.
    """
    w0, w1, w2, w3 = philox(group, row, head, key_low, key_high, site)
    addend = (0x10000 - threshold).to(tl.uint32) * 0x10001
    bits = (_carries(w0, addend) >> 3) & 0x10001000
    bits |= (_carries(w1, addend) >> 2) & 0x20002000
    bits |= (_carries(w2, addend) >> 1) & 0x40004000
    bits |= _carries(w3, addend) & 0x80008000
    return bits | tl.where(threshold == 0, 0xF000F000, 0).to(tl.uint32)  # 2^16 does not fit the addend


@jit
def keep_bits_from(column, row, head, key_low, key_high, site, threshold):
    """Does what `keep_bits` does for eight columns that begin anywhere, by the two groups that they lie in."""
    low = keep_bits(column >> 3, row, head, key_low, key_high, site, threshold)
    high = keep_bits((column >> 3) + 1, row, head, key_low, key_high, site, threshold)
    even, odd = ((low >> 12) & 15) | ((high >> 8) & 240), (low >> 28) | ((high >> 24) & 240)
    # An odd start makes even columns of odd ones, and odd ones of the even ones that follow them.
    starts_odd, shift = (column & 1) == 1, ((column >> 1) & 3).to(tl.uint32)
    new_even = tl.where(starts_odd, odd, even) >> shift
    new_odd = tl.where(starts_odd, even >> 1, odd) >> shift
    return ((new_even & 15) << 12) | (new_odd << 28)


@jit
def _place(group, column):
    """Tells where the bit of a column stands in the word of four groups, each shifted right by 4 for each before it."""
    return 12 + (column >> 1) + 16 * (column & 1) - 4 * group


@jit
def spread_columns(bits):
    """Spreads bits (R, W, G), up to four neighbouring groups in the last axis, to a mask (R, 8 * W * G), bool.

    The bits meet in one word, by a sum. Then each thread has those of its elements, in the layout of a matrix product,
    in which a group is spread over four threads: each of these draws one group, and none is drawn twice.
    """
    N_GROUPS: tl.constexpr = bits.shape[2]
    word = tl.sum(bits >> (tl.arange(0, N_GROUPS) * 4)[None, None, :].to(tl.uint32), axis=2)
    x = tl.arange(0, N_GROUPS * GROUP)  # (group, column % 2, column / 2)
    bit = _place(x >> 3, (x & 3) * 2 + ((x >> 2) & 1)).to(tl.uint32)
    keep = (word[:, :, None] & (1 << bit)[None, None, :]) != 0
    keep = tl.permute(tl.reshape(keep, (bits.shape[0], bits.shape[1] * N_GROUPS, 2, GROUP // 2)), (0, 1, 3, 2))
    return tl.reshape(keep, (bits.shape[0], bits.shape[1] * N_GROUPS * GROUP))


@jit
def spread_rows(bits):
    """Spreads bits (G, W, 8) of 8 * W columns, up to 64, to a mask (8 * G, 8 * W), bool: groups run along rows.

    As in `spread_columns`, but here eight threads share a group: each draws it for another column.
    """
    N_WORDS: tl.constexpr = bits.shape[1]
    tl.static_assert(N_WORDS <= 8)
    w, x = tl.arange(0, N_WORDS), tl.arange(0, GROUP * N_WORDS)  # x is (w, row)
    bits >>= (w & 3)[None, :, None].to(tl.uint32) * 4
    bit = _place((x >> 3) & 3, x & 7)
    if N_WORDS > 4:
        bits = bits.to(tl.uint64) << ((w >> 2) * 32)[None, :, None].to(tl.uint64)
        bit += (x >> 5) * 32
    word = tl.sum(bits, axis=1)
    keep = (word[:, None, :] & (tl.full(x.shape, 1, word.dtype) << bit.to(word.dtype))[None, :, None]) != 0
    keep = tl.permute(tl.reshape(keep, (bits.shape[0], N_WORDS, GROUP, GROUP)), (0, 2, 1, 3))
    return tl.reshape(keep, (bits.shape[0] * GROUP, N_WORDS * GROUP))


# The arguments of a kernel without dropout.
NONE: dict[str, Any] = dict.fromkeys((*DO_NOT_SPECIALIZE, "keep_scale"))


def arguments(dropout: Dropout | None) -> dict[str, Any]:
    """Returns the arguments with which a kernel draws the masks of a dropout; NONE without dropout."""
    if dropout is None:
        return NONE
    values = (*dropout.key, dropout.site, dropout.threshold, dropout.scale)
    return dict(zip((*DO_NOT_SPECIALIZE, "keep_scale"), values, strict=True))
