"""CUDA graphs on a GPU keep bits and memory, with threads and with changed weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastbert
import fastbert.models.bert
from fastbert.engine import PackedInputs
from fastbert.ops import packing
from graph_cases import (
    encode,
    load,
    packed,
    random_lengths,
    real,
    scale_norm,
    scale_query,
    without_graphs,
    write_data,
)

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    """Catches a capture that records other kernels than those of the plain path."""
    model, before = real(cuda, dtype), fastbert.compile_events()
    for seed in range(60):
        lengths = random_lengths(seed, 4000)
        expected = without_graphs(model, lengths, seed)
        for _ in range(2):
            assert torch.equal(encode(model, lengths, seed), expected), lengths
    assert (fastbert.compile_events() - before).captures == len(model.engine.graphs) > 0


@pytest.mark.gpu
def test_gpu_no_growth(cuda: torch.device) -> None:
    """Catches memory that grows over batches of random lengths."""
    model = real(cuda)
    fastbert.warmup(model, max_tokens=4096)
    peaks = []
    for start in (0, 500, 1000):
        torch.cuda.reset_peak_memory_stats()
        for seed in range(start, start + 500):
            encode(model, random_lengths(seed, 4096), seed)
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[2] <= peaks[1] * 1.02


@pytest.mark.gpu
@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "plain"])
def test_gpu_threads_on_streams(with_graphs: bool, cuda: torch.device) -> None:
    """Catches static memory, or a fused matrix, that one stream reads while another writes it."""
    model = real(cuda)
    cases = [(random_lengths(seed, 3000), seed) for seed in range(100)]
    expected = [without_graphs(model, *case) for case in cases]
    model.cuda_graphs = with_graphs
    torch.cuda.synchronize()

    def work(start: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [encode(model, *case) for case in cases[start::4]]
            torch.cuda.current_stream().synchronize()
        return outs

    with ThreadPoolExecutor(4) as pool:
        for start, outs in enumerate(pool.map(work, range(4))):
            for out, right in zip(outs, expected[start::4], strict=True):
                assert torch.equal(out, right)


@pytest.mark.gpu
def test_gpu_one_model_on_each_of_two() -> None:
    """Catches state of one device that is used on the other, or the current device taken for the model's."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = [real(torch.device("cuda", index)) for index in range(2)]
    for seed in range(20):
        lengths = random_lengths(seed, 2000)
        first, second = (encode(model, lengths, seed) for model in models)
        assert torch.equal(first.cpu(), second.cpu()) and second.device.index == 1


@pytest.mark.gpu
def test_gpu_changed_weights(cuda: torch.device) -> None:
    """Catches a graph that reads memory of weights that are gone."""
    model = real(cuda)
    for change in (scale_query, scale_norm, write_data, load):
        encode(model, [90, 4])
        change(model)
        assert torch.equal(encode(model, [90, 4]), without_graphs(model, [90, 4])), change.__name__


@pytest.mark.gpu
@pytest.mark.parametrize("with_graphs", [True, False], ids=["graphs", "plain"])
def test_gpu_notes(with_graphs: bool, cuda: torch.device) -> None:
    """Catches pinned memory that a kernel of Triton's does not write to, or notes that the host never sees."""
    model = real(cuda)
    model.cuda_graphs = with_graphs
    ids, cu_seqlens = packed([90, 4], cuda)
    with torch.no_grad():
        right = model.forward_packed(ids, cu_seqlens.cpu())
        bad = ids.clone()
        bad[17] = 101
        assert model.forward_packed(bad, cu_seqlens.cpu()).isfinite().all()
        with pytest.raises(IndexError, match="input_ids: .* got 101 in an earlier call, batch 2 of this model"):
            fastbert.wait_for_checks(model)
        assert torch.equal(model.forward_packed(ids, cu_seqlens.cpu()), right)
        model.encoder.layer[0].attention.self.query.weight.data.mul_(2.0)
        model.forward_packed(ids, cu_seqlens.cpu())
        torch.cuda.synchronize()
        assert torch.equal(model.forward_packed(ids, cu_seqlens.cpu()), without_graphs(model, [90, 4]))


@pytest.mark.gpu
def test_gpu_nobody_waits(cuda: torch.device) -> None:
    """Catches a call that waits for the GPU, as CUDA itself says."""
    model = real(cuda)
    fastbert.warmup(model, max_tokens=256)
    ids = torch.zeros(4, 32, dtype=torch.int64, device=cuda)
    mask = torch.ones(4, 32, dtype=torch.int64).tril(20)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for _ in range(20):
                model(ids)
                model(ids, mask)
                model.forward_packed(ids.flatten(), torch.tensor([0, 100, 128], dtype=torch.int32))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_gpu_a_capture_of_somebody_else(cuda: torch.device) -> None:
    """Catches a graph that is replayed, or captured, inside of a user's own capture."""
    model = real(cuda)
    ids, cu_seqlens = packed([90, 4], cuda)
    batch = packing.from_cu_seqlens(cu_seqlens, 94, cuda)
    token_type_ids = torch.zeros_like(ids)
    with torch.no_grad():
        inputs = PackedInputs(ids, token_type_ids, batch.position_ids)
        exact = model.engine.modules.run(model, batch, inputs, False)[-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model.encode_packed(batch, ids, token_type_ids, check=False)[-1]
        graph.replay()
    assert torch.equal(out, exact) and len(model.engine.graphs) == 0
