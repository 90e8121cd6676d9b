"""An encoder's memory has a known peak, and does not grow while batches of all lengths go by."""

from __future__ import annotations

import gc

import pytest
import torch

from fastbert import BertConfig, BertModel
from fastbert.bench import memory
from fastbert.engine import buckets
from helpers import cu_seqlens_of

TINY = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 128,
}  # fmt: skip
LARGE = {
    "vocab_size": 1000, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip


def encode(model: BertModel, lengths: list[int]) -> None:
    ids = torch.ones(sum(lengths), dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model.forward_packed(ids, cu_seqlens_of(lengths))


def random_lengths(draw: torch.Generator) -> list[int]:
    n_seqs = int(torch.randint(1, 9, (), generator=draw))
    return torch.randint(1, 129, (n_seqs,), generator=draw).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_growth_over_ten_thousand_batches(cuda_graphs: bool) -> None:
    """Catches graphs, plans, packed weights or buffers that are kept for every length that ever came."""
    model = BertModel(BertConfig(**TINY)).to("cuda", torch.bfloat16).eval()
    model.cuda_graphs = cuda_graphs
    for n_tokens in buckets.BUCKETS[: buckets.BUCKETS.index(1024) + 1]:  # so that no bucket is captured later
        encode(model, [min(128, n_tokens - start) for start in range(0, n_tokens, 128)])
    draw = torch.Generator().manual_seed(0)
    for _ in range(1000):
        encode(model, random_lengths(draw))
    torch.cuda.synchronize()
    gc.collect()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved()
    for _ in range(9000):
        encode(model, random_lengths(draw))
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == allocated
    # A capture gives PyTorch's free memory back to the driver, so that what is reserved right after it says nothing of
    # what the batches need: the most it ever was does, and one segment more, of 20 MiB, for blocks that lie badly.
    assert torch.cuda.max_memory_reserved() <= reserved + 20 * 2**20


@pytest.mark.skipif(memory.peak_obstacle() is not None, reason=str(memory.peak_obstacle()))
def test_no_growth_on_a_cpu() -> None:
    """Catches memory that grows on a CPU, where oneDNN keeps a program for each number of rows that it meets."""
    model = BertModel(BertConfig(**TINY), backend="cpu").eval()
    draw = torch.Generator().manual_seed(0)
    for _ in range(600):
        encode(model, random_lengths(draw))
    gc.collect()
    before = memory.own_peak()
    for _ in range(600):
        encode(model, random_lengths(draw))
    assert memory.own_peak() - before < 10e6


@pytest.mark.gpu
def test_peak_of_bert_large_at_64k_tokens() -> None:
    """Catches hidden states that are kept though nobody asked for them, and copies of activations.

    Alive at most: x, and either q, k, v and their context (4 H a token), or the intermediate and what is made of it
    (5 H), and a residual. 9 H leaves room for the library's workspaces.
    """
    model = BertModel(BertConfig(**LARGE), add_pooling_layer=False).to("cuda", torch.bfloat16).eval()
    lengths = [512] * 128
    encode(model, lengths[:4])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode(model, lengths)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 9 * sum(lengths) * 1024 * 2, f"{peak / 2**20:.0f} MiB"
