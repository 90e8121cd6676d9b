"""This module defines dropout masks, so that every kernel on every device draws the same masks.

A mask is a function only of a seed, a site and a place, and not of tiles, threads or the backend. The forward and the
backward pass draw it independently. Eight neighbours share one call of Philox4x32-7:

    key      = (seed mod 2^32, seed / 2^32)
    counter  = (column / 8, row, head, site)
    number   = 16 bits of the four words, the low half of a word first: element e = column mod 8 takes word e / 2
    keep     = number >= threshold,    threshold = round(p * 2^16);    what is kept is divided by 1 - threshold / 2^16

row: the packed row of a token; in attention that of the query. column: the feature; in attention the place of the key
within its sequence. head: 0 except in attention.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, doi:10.1145/2063384.2063405. Seven rounds
are the fewest that pass the statistical tests of this paper.
"""

from __future__ import annotations

from typing import NamedTuple

N_ROUNDS = 7
GROUP = 8  # Elements for one call of Philox.
RANGE = 1 << 16  # Numbers are below this.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# The sites of dropout in a layer. The site of layer i is SITES_A_LAYER * i plus one of these. INNER is the input of the
# last product of a gated feed-forward layer.
ATTENTION, ATTENTION_OUTPUT, OUTPUT, INNER = 0, 1, 2, 3
SITES_A_LAYER = 4
EMBEDDINGS = (1 << 31) - 1  # The site of the embeddings.


class Dropout(NamedTuple):
    """A `Dropout` defines the elements that a kernel sets to zero.

    threshold: numbers below it are dropped, 0 to 65,536. seed: below 2^63. site: below 2^31.
    """

    threshold: int
    seed: int
    site: int

    @property
    def scale(self) -> float:
        """Returns the factor of kept elements, or 0 if none is kept."""
        return 0.0 if self.threshold == RANGE else RANGE / (RANGE - self.threshold)

    @property
    def key(self) -> tuple[int, int]:
        """Returns both words of the key as signed 32-bit numbers, so that their type never depends on the value."""
        return _signed(self.seed & 0xFFFFFFFF), _signed(self.seed >> 32)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def threshold_of(p: float) -> int:
    """Returns the threshold for a probability from 0 to 1."""
    return round(p * RANGE)


def site_of(layer: int, kind: int) -> int:
    """Returns the site of one of a layer's dropouts: ATTENTION, ATTENTION_OUTPUT, OUTPUT or INNER."""
    return SITES_A_LAYER * layer + kind
