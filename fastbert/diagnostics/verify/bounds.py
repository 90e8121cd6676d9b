"""This module holds the error bounds of `verify`, as multiples of plain PyTorch's error in the same dtype."""

from __future__ import annotations

# The factors over all texts, and for one text. One short text rounds only a few times, so its error varies more.
FACTOR, FACTOR_OF_ONE_TEXT = 1.25, 4.0
# Vectors have one row for each text. Over a dozen texts, chance alone turns 1.15 times eager's error into 1.3 times.
FACTOR_OF_VECTORS = 2.0
# The factors of a part alone: in 16 bits, in 32 bits, and with one output row for each text. With fewer roundings, the
# order of the sums matters more. There is no floor, except if eager has almost no error.
FACTOR_ALONE_16, FACTOR_ALONE_32, FACTOR_ALONE_FEW = 1.5, 2.0, 3.0
# The factor of a head with few numbers for each text. It is divided by the square root of the total count.
SCATTER = 10.0
# Gradients of the whole model and of a part: the bound is FACTOR times eager's error plus this number of epsilons of
# the dtype. The bound of one parameter is a multiple of that, because a few of its numbers make most of its error by
# chance, as a rule a LayerNorm's weight of an outlier. Among correct models the largest excess was 2.5 times in 32
# bits, and 1.4 times in 16 bits.
FLOOR_OF_GRADIENTS_16, FLOOR_OF_GRADIENTS_32 = 1.0, 2.0
FACTOR_OF_ONE_PARAMETER_16, FACTOR_OF_ONE_PARAMETER_32 = 2.0, 3.0
# Eager in float64 is the reference itself, and gives no bound.
BOUND_IN_FLOAT64 = 1e-10
# The bound if eager overflows: the relative error sqrt(2 * (1 - cosine)) at a cosine of 0.999.
BOUND_WITHOUT_EAGER = 0.0447
# The limits of a model in 8 bits: the cosine to the reference at the 1st percentile, and the rank correlation of
# neighbours. They apply from this number of texts on. Among fewer texts, one swapped pair has too much weight.
LEAST_COSINE, LEAST_SPEARMAN, ENOUGH_TEXTS = 0.998, 0.999, 1000
