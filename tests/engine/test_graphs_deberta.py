"""DeBERTa runs as a CUDA graph, with the bits of the plain path. Without a GPU a stand-in captures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from family_cases import run, theirs, twin
from fastbert.ops import Policy, attention_plan, distances, packing
from graph_cases import StandIn, encode, without_graphs
from model_cases import VOCAB, assert_close, generator, valid_of

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

V3: dict[str, Any] = {
    "relative_attention": True, "position_buckets": 8, "max_relative_positions": 16, "share_att_key": True,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
    "embedding_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
}  # fmt: skip
KINDS = {"v3": V3, "v2-xlarge": {**V3, "conv_kernel_size": 3, "conv_act": "gelu"}}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
LENGTHS = ([3, 0, 7], [1, 70, 2])  # Several texts in a tile, an empty one, and one of several tiles.


@pytest.fixture(autouse=True)
def needed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs ask for the rows of distances that their batches need, as large ones do."""
    monkeypatch.setattr(distances, "FEW_TOKENS", 0)


def make(kind: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return twin(theirs("deberta-v2", **KINDS[kind]), dtype=dtype, backend="triton", device=device, **options)


@pytest.mark.parametrize(("kind", "batch_invariant"), [("v3", False), ("v2-xlarge", False), ("v2-xlarge", True)])
def test_same_bits_with_graphs_and_without(
    batch_invariant: bool, kind: str, stand_in: StandIn, device: torch.device
) -> None:
    """Catches tiles, a reach of texts or neighbours of tokens that a graph keeps from the batch before."""
    model = make(kind, device, torch.bfloat16, batch_invariant=batch_invariant)
    for lengths in LENGTHS:
        expected = without_graphs(model, lengths)
        assert torch.equal(encode(model, lengths), expected), lengths
        assert torch.equal(encode(model, lengths[::-1]), without_graphs(model, lengths[::-1])), lengths
    assert stand_in.replays == 2 * len(LENGTHS)


@EVERY_KIND
def test_graphs_as_transformers(kind: str, stand_in: StandIn, device: torch.device) -> None:
    """Catches padding that a text sees, columns of a mask with holes in a graph, and weights as they were."""
    model = theirs("deberta-v2", **KINDS[kind])
    ours = make(kind, device)
    batch = {"input_ids": torch.randint(1, VOCAB, (3, 40), generator=generator(4))}
    batch["attention_mask"] = (torch.arange(40) < torch.tensor([[40], [1], [23]])).long()
    for turn in ("first", "changed", "holes", "few tokens, far apart"):
        if turn == "changed":
            with torch.no_grad():
                for each in (ours, model):
                    each.encoder.rel_embeddings.weight[:, ::2].mul_(2.0)
                    if kind != "v3":
                        each.encoder.conv.conv.weight[..., 0].mul_(2.0)
        if turn == "holes":
            batch["attention_mask"][0, 5:9] = 0
        if turn.startswith("few"):
            batch["attention_mask"][0, 2:38] = 0
        valid, replays = valid_of(batch["attention_mask"]), stand_in.replays
        ours_on_cpu = run(ours, batch)[0].cpu()
        assert_close(turn, ours_on_cpu[valid].double(), run(model, batch)[0][valid], 2e-6)
        assert stand_in.replays > replays


def test_poisoned_padding(stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a NaN in a row of padding that reaches a text, through the convolution or the products with distances."""
    from fastbert_kernels import launch

    model = make("v2-xlarge", device)
    expected = [encode(model, lengths) for lengths in LENGTHS]
    model.engine.graphs.clear()

    def empty(shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), device=like.device, dtype=dtype or like.dtype)

    monkeypatch.setattr(launch, "empty", empty)
    for lengths, right in zip(LENGTHS, expected, strict=True):
        assert torch.equal(encode(model, lengths), right), lengths


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("height", [16, 24, 64, 1000])
def test_tiles_are_cut(height: int, invariant: bool, device: torch.device) -> None:
    """Catches a row that no tile holds after cutting, or two tiles, or that sees other keys than before."""
    policy = Policy("triton", batch_invariant=invariant)
    for lengths in ([3, 200, 1, 0, 70], [5] * 30, [1]):
        n_rows = sum(lengths) + 9
        batch = packing.from_lengths(lengths, device)
        rows = torch.zeros(n_rows, dtype=torch.int64, device=device)
        batch = attention_plan.batch_in_rows(batch, rows, torch.float32, 32, policy)
        tiles, spans = attention_plan.tiles_of(batch, height, share=not invariant)
        seen: dict[int, tuple[int, int]] = {}
        for first, end, first_key, end_key, shared in tiles.tolist():
            assert end - first <= height
            for row in range(first, end):
                span = int(spans[row]) if shared else 0
                assert row not in seen
                seen[row] = (first_key + (span & 0xFFFF), first_key + (span >> 16)) if shared else (first_key, end_key)
        offsets = batch.cu_seqlens_cpu.tolist()
        assert seen == {row: (a, b) for a, b in zip(offsets, offsets[1:], strict=False) for row in range(a, b)}
