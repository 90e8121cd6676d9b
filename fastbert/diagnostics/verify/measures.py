"""This module compares three runs on the same tokens for `verify`: errors, cosines and neighbours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.diagnostics.verify.bounds import BOUND_IN_FLOAT64, BOUND_WITHOUT_EAGER, FACTOR, FACTOR_OF_ONE_TEXT
from fastbert.diagnostics.verify.findings import ErrorReport, StateReport, VectorReport

# The most texts whose neighbours are compared: every text with every other.
MOST_COMPARED = 2000

_COSINES = "worst_token_cosine", "worst_sentence_cosine", "sentence_cosine_p1", "sentence_cosine_p50"


def measure(ours: Tensor, eager: Tensor, exact: Tensor) -> Tensor:
    """Compares the states of one text, (n, H) each.

    The result, (5,), holds the squared errors of fastbert and of eager, the squared reference, the worst cosine of a
    token, and the cosine of the means over tokens.
    """
    ours, eager, exact = (x.cpu().double() for x in (ours, eager, exact))
    if ours.shape[0] == 0:
        return torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64, device="cpu")
    squares = [(x - y).square().sum() for x, y in ((ours, exact), (eager, exact), (exact, torch.zeros_like(exact)))]
    return torch.stack([*squares, _cosine(ours, exact).amin(), _cosine(ours.mean(0), exact.mean(0))])


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Returns the cosine along the last dimension; 1 if both vectors are equal, also for zeros."""
    return torch.where((x == y).all(-1), 1.0, F.cosine_similarity(x, y, dim=-1))


def error_report(
    measures: Tensor, dtype: torch.dtype, alone: float | None = None, factor: float = FACTOR, each_text: bool = True
) -> ErrorReport:
    """Sums up the measures of all texts, (texts, 5), and sets their bounds.

    factor: the allowed multiple of eager's error, besides a floor. alone: the allowed multiple for a part alone, or
    None for the whole model. each_text: whether every text has its own bound. Few numbers, perhaps near zero, are not
    enough for this.
    """
    errors, eager_errors = _relative(measures[:, 0], measures[:, 2]), _relative(measures[:, 1], measures[:, 2])
    totals = measures[:, :3].sum(0)
    error, eager_error = float(_relative(totals[0], totals[2])), float(_relative(totals[1], totals[2]))
    floor = 0.5 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        bound = BOUND_IN_FLOAT64
    elif math.isfinite(eager_error):
        bound = factor * eager_error + floor if alone is None else max(alone * eager_error, floor)
    else:
        bound, eager_error = BOUND_WITHOUT_EAGER, math.nan
    own = (alone or factor) * eager_errors.nan_to_num(0.0, posinf=0.0) + floor
    bounds = FACTOR_OF_ONE_TEXT * own.clamp(min=bound) if each_text else torch.full_like(errors, math.inf)
    worst = int((errors / bounds if each_text else errors).nan_to_num(torch.inf).argmax())
    finite = bool(measures[:, 0].isfinite().all())
    return ErrorReport(finite, error, eager_error, bound, worst, float(errors[worst]), float(bounds[worst]))


def state_report(name: str, measures: Tensor, whole: ErrorReport, alone: ErrorReport | None) -> StateReport:
    """Returns the report of one state: its errors, with the cosines from its measures, (texts, 5)."""
    token, sentence = measures[:, 3].amin(), measures[:, 4]
    p1, p50 = sentence.quantile(torch.tensor([0.01, 0.5], dtype=torch.float64, device="cpu")).tolist()
    cosines = dict(zip(_COSINES, (float(token), float(sentence.amin()), p1, p50), strict=True))
    return StateReport(**vars(whole), name=name, **cosines, alone=alone)


def _relative(squared_error: Tensor, square: Tensor) -> Tensor:
    """Returns the RMS error over the RMS of the reference, or over 1 if the reference is zero."""
    return (squared_error / torch.where(square == 0, 1.0, square)).sqrt()


def vector_report(what: str, ours: Tensor, exact: Tensor, eager: Tensor) -> VectorReport:
    """Compares vectors and their neighbours. ours, exact, eager: (texts, dim) float64."""
    at = torch.tensor([0.0, 0.01, 0.1, 0.5], dtype=torch.float64, device="cpu")
    cosines = [tuple(_cosine(x, exact).quantile(at).tolist()) for x in (ours, eager)]
    n = len(exact)
    chosen = torch.linspace(0, n - 1, min(n, MOST_COMPARED)).round().long()
    expected = _neighbours(exact[chosen])
    (a, b, c), (d, e, f) = (_agreement(_neighbours(x[chosen]), expected) for x in (ours, eager))
    return VectorReport(what, n, len(chosen), cosines[0], cosines[1], a, d, b, e, c, f)


def _neighbours(vectors: Tensor) -> Tensor:
    """Returns for each text the other texts in ascending order of cosine: (n, dim) -> (n, n - 1)."""
    n = len(vectors)
    unit = F.normalize(vectors, dim=1)
    others = ~torch.eye(n, dtype=torch.bool)
    return (unit @ unit.T)[others].view(n, n - 1).argsort(stable=True, dim=1)


def _agreement(ours: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Compares two orders of neighbours: rank correlation, share of the same nearest one, share of the ten nearest."""
    n = len(ours)
    if n < 3:
        return math.nan, math.nan, math.nan
    ranks = [order.argsort(1).double() - (n - 2) / 2 for order in (ours, exact)]
    spearman = float(F.cosine_similarity(ranks[0], ranks[1], dim=1).mean())
    same = float((ours[:, -1] == exact[:, -1]).double().mean())
    near = min(10, n - 1)
    shared = (ours[:, -near:, None] == exact[:, None, -near:]).any(2).double().mean()
    return spearman, same, float(shared)
