"""The bounds on errors that `verify` allows, as multiples of the error of plain PyTorch in the same dtype."""

from __future__ import annotations

# Over all texts, and for one text: one short text rounds only a few times, so its error scatters more.
FACTOR, FACTOR_OF_ONE_TEXT = 1.25, 4.0
# Vectors have one row for each text. Over a dozen texts, chance alone turns 1.15 times eager's error into 1.3 times.
FACTOR_OF_VECTORS = 2.0
# A part alone: in 16 bits, in 32, and where it gives one row for each text. The fewer the roundings, the more the order
# of the sums shows. There is no floor, except where eager makes no error to speak of.
FACTOR_ALONE_16, FACTOR_ALONE_32, FACTOR_ALONE_FEW = 1.5, 2.0, 3.0
# A head that gives few numbers for each text: divided by the square root of how many numbers there are in all.
SCATTER = 10.0
# Gradients, of the whole model and of a part: FACTOR times eager's error and so many units of the dtype's epsilon. One
# parameter may have so many times that: few of its numbers, a LayerNorm's weight of an outlier as a rule, make most of
# its error, and chance rules them. Among right models the largest excess was 2.5 times in 32 bits, 1.4 in 16.
FLOOR_OF_GRADIENTS_16, FLOOR_OF_GRADIENTS_32 = 1.0, 2.0
FACTOR_OF_ONE_PARAMETER_16, FACTOR_OF_ONE_PARAMETER_32 = 2.0, 3.0
# Eager in float64 is the reference itself, and gives no bound.
BOUND_IN_FLOAT64 = 1e-10
# Where eager overflows: the relative error sqrt(2 * (1 - cosine)) at a cosine of 0.999.
BOUND_WITHOUT_EAGER = 0.0447
# A model in 8 bits: the cosine to the reference at the 1st percentile, and the rank correlation of neighbours. They
# count from this many texts on: among few, a pair that changes places weighs too much.
LEAST_COSINE, LEAST_SPEARMAN, ENOUGH_TEXTS = 0.998, 0.999, 1000
