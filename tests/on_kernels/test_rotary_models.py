"""ModernBERT, Nomic and GTE run on the Triton kernels alone: strict, batch-invariant, as CUDA graphs, without waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from device_stand_in import META, install
from family_cases import config_of_transformers, make_batch, run, theirs, twin
from fastbert import reference
from graph_cases import StandIn
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import VOCAB, generator, in_dtype, valid_of

FAMILIES = ("modernbert", "nomic_bert", "gte")
FAMILY = pytest.mark.parametrize("model_type", FAMILIES)
LENGTHS = [3, 1, 7, 70]  # windows reach 6 columns


def make(model_type: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Our model of two layers, in ModernBERT one with a window, strictly on the kernels."""
    return twin(theirs(model_type, num_hidden_layers=2), dtype=dtype, **{"backend": "triton", **options})


def texts_of(lengths: list[int], device: torch.device) -> tuple[Tensor, ...]:
    return torch.randint(VOCAB, (sum(lengths),), generator=generator(6)).to(device).split(lengths)


def encode(model: Any, texts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    lengths = [len(text) for text in texts]
    with torch.inference_mode():
        return model.forward_packed(torch.cat(texts), cu_seqlens_of(lengths)).split(lengths)


@FAMILY
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "holes"), (torch.bfloat16, "left")], ids=str)
def test_numerical_policy(model_type: str, dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """Catches a kernel that runs another family's layer, a mask with holes that is packed away, or more roundings."""
    model, batch = theirs(model_type, num_hidden_layers=2), make_batch(model_type, kind)
    valid = valid_of(batch["attention_mask"])
    ours = run(make(model_type, dtype, device=device), batch)[0].cpu()[valid]
    eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
    judge = reference.encode(dict(twin(exact).named_parameters()), twin(exact).config, **batch).last_hidden_state
    assert_as_accurate(model_type, ours, run(eager, batch)[0][valid], judge[valid])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # rows of no text
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("modernbert", torch.float32), ("modernbert", torch.bfloat16), ("nomic_bert", torch.bfloat16),
     ("gte", torch.float32)],
    ids=str,
)  # fmt: skip
def test_batch_invariance(
    model_type: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a text whose bits depend on the others, on their order, on their number or on a graph."""
    from fastbert.engine import capture

    stand_in = StandIn()
    ours = make(model_type, dtype, device=device, batch_invariant=True)
    texts = texts_of(LENGTHS, device)
    together, turned = encode(ours, texts), encode(ours, texts[::-1])[::-1]
    monkeypatch.setattr(capture, "capturer", lambda device: stand_in)
    assert all(map(torch.equal, together, turned))
    for i in (2, 3):
        assert torch.equal(encode(ours, (texts[i],))[0], together[i])
    assert stand_in.replays == 2 and not stand_in.errors


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")  # rows of no text
@FAMILY
def test_graphs(model_type: str, device: torch.device, stand_in: Any) -> None:
    """Catches a graph that keeps the angles, the columns or the lengths of the batch that it was captured with."""
    ours = make(model_type, device=device)
    for lengths in ([3, 11], [14]):
        texts = texts_of(lengths, device)
        with_graphs = encode(ours, texts)
        ours.cuda_graphs = False
        assert all(map(torch.equal, with_graphs, encode(ours, texts)))
        ours.cuda_graphs = True
    assert stand_in.replays == 2 and not stand_in.errors


@FAMILY
def test_no_call_waits(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a look at numbers of the device, which "meta" has none of, on the way to a graph or beside one."""
    graphs = install(monkeypatch.setattr)
    config = fastbert.BertConfig.from_dict(config_of_transformers(model_type, num_hidden_layers=2).to_dict())
    with META:
        model: Any = fastbert.BertModel(config, backend="triton", strict=True)
    model = model.eval().to(torch.bfloat16)
    with torch.inference_mode():
        for i in range(20):
            lengths = [1 + i, 7, 0, 30]
            ids = torch.zeros(sum(lengths), dtype=torch.int64, device=META)
            model.cuda_graphs = i % 4 != 0
            assert model.forward_packed(ids, cu_seqlens_of(lengths)).device == META
    assert graphs.replays == 15


@FAMILY
def test_kernels_are_named(model_type: str) -> None:
    """Catches an operation that `explain` does not give to its kernel, or that strict would refuse."""
    ours = make(model_type, torch.bfloat16)
    for invariant in (False, True):
        ours.policy = fastbert.ops.Policy("triton", strict=True, batch_invariant=invariant)
        rows = fastbert.explain(ours, device="cuda:0", arch=90).rows
        kernels = {row.op: row.kernel for row in rows}
        assert not any(row.raises for row in rows) and {row.backend for row in rows} == {"triton"}
        norm = "sum_norm" if model_type == "modernbert" else "layer_norm"  # which keeps the sum for the next block
        for op in ("embedding", "layer_norm", "rotary", "attention"):
            assert kernels[op] == f"fastbert_kernels.{norm if op == 'layer_norm' else op}", op
        ups = {(row.op, row.kernel) for row in rows if row.shapes.endswith(", gated")}
        assert ups == {("linear", "fastbert_kernels.gated_linear")} and "gated" not in kernels
    windows = [row.shapes for row in rows if row.op == "attention" and "within 6 columns" in row.shapes]
    assert bool(windows) == (model_type == "modernbert")
