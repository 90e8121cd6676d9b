"""Two processes that train an accelerated model by DistributedDataParallel give the gradients of one."""

from __future__ import annotations

import pytest
import torch

from ddp_cases import Case, Gradients, gradients, in_processes
from helpers import rms_error

FIND = (("find_unused_parameters", True),)
CASES = {
    "a head": Case(),
    "in float32": Case(dtype=torch.float32),
    "checkpointing": Case(checkpointing=True),
    "frozen layers": Case(frozen=True),
    "views of buckets": Case(wrapper=(("gradient_as_bucket_view", True), ("broadcast_buffers", False))),
    "a static graph": Case(wrapper=(("static_graph", True),)),
    "masked tokens": Case("BertForMaskedLM", dtype=torch.float32),
    "an unused pooler": Case("BertModel", wrapper=FIND),
    "an unused pooler that nobody looks for": Case("BertModel"),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[tuple[Gradients, str]]]]:
    """For each case what two processes give, accelerated and not."""
    both = [case._replace(accelerated=accelerated) for case in CASES.values() for accelerated in (True, False)]
    found = in_processes(both, tmp_path_factory.mktemp("ddp"))
    return {name: found[2 * i : 2 * i + 2] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes(name: str, results: dict[str, list[list[tuple[Gradients, str]]]]) -> None:
    """Catches gradients that are not reduced, a parameter with one where the original has none, and the reverse."""
    case = CASES[name]
    (ours, error), (other, _) = results[name][0]
    theirs, their_error = results[name][1][0]
    assert error == their_error
    assert [key for key, grad in ours.items() if grad is None] == [key for key, grad in theirs.items() if grad is None]
    if error:
        assert "Expected to have finished reduction in the prior iteration" in error
        return
    joint, _ = gradients(case, 0, 1)
    for key, grad in joint.items():
        if grad is None or grad.abs().max() < (1e-13 if case.dtype == torch.float64 else 1e-5):
            continue
        reduced, by_other = ours[key], other[key]
        assert reduced is not None and by_other is not None and torch.equal(reduced, by_other), key
        assert rms_error(reduced, grad) < (1e-10 if case.dtype == torch.float64 else 2e-5), key
