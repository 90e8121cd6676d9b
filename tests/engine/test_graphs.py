"""CUDA graphs by token count. Without a GPU a stand-in captures: it runs the function again where a graph replays."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastbert
import fastbert.models.bert
from fastbert.engine import graphs
from fastbert.models import heads
from fastbert.ops import Policy, packing
from graph_cases import (
    CHANGES,
    LENGTHS,
    UNSUITABLE,
    StandIn,
    add_adapter,
    add_hook,
    cheap,
    encode,
    load,
    make,
    packed,
    patch_forward,
    random_lengths,
    real,
    scale_norm,
    scale_query,
    without_graphs,
    write_data,
)
from helpers import cu_seqlens_of, rms_error

# Rows of padding start as whatever is in memory, which the interpreter's numpy remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")


# Buckets


def test_buckets() -> None:
    """Catches a bucket that wastes more than it says, or an octave whose memory is not that of a bucket."""
    assert graphs.BUCKETS[0] == 32 and graphs.BUCKETS[-1] == graphs.LARGEST and len(graphs.BUCKETS) <= graphs.MAX_GRAPHS
    assert tuple(sorted(set(graphs.BUCKETS))) == graphs.BUCKETS
    for n_tokens in range(1, graphs.LARGEST + 1):
        bucket = graphs.bucket_of(n_tokens)
        assert bucket is not None and bucket >= n_tokens
        assert 1 << (bucket - 1).bit_length() in graphs.BUCKETS
        assert bucket - n_tokens < 32 or 16 * (bucket - n_tokens) < bucket
    assert graphs.bucket_of(0) is None and graphs.bucket_of(graphs.LARGEST + 1) is None


def test_waste() -> None:
    """Catches buckets whose padding, over token counts that are all as likely, is more than the notes say: 2.1 %."""
    counts = range(1, graphs.LARGEST + 1)
    rows = sum(graphs.bucket_of(n) or 0 for n in counts)
    assert rows / sum(counts) - 1 < 0.021


def test_token_budget_is_a_bucket() -> None:
    """Catches full batches of SentenceEncoder that are padded to a bucket far above."""
    from fastbert.pipelines.batching import TOKEN_BUDGET

    assert TOKEN_BUDGET["cuda"] in graphs.BUCKETS


@settings(max_examples=300)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40), st.integers(14, 19)), max_size=40),
    block_q=st.sampled_from([1, 2, 16]),
)
def test_no_batch_has_more_tiles_than_the_bound(lengths: list[int], block_q: int) -> None:
    """Catches a work list that overruns its static buffer."""
    from fastbert_kernels.attention import build_work_list, max_tiles

    n_tiles = build_work_list(cu_seqlens_of(lengths).tolist(), block_q).shape[0]
    assert n_tiles <= max_tiles(sum(lengths), block_q)


@pytest.mark.parametrize("block_q", [16, 64, 128])
def test_the_bound_on_tiles_is_reached(block_q: int) -> None:
    """Catches a bound with more empty programs in it than the worst batch needs."""
    from fastbert_kernels.attention import build_work_list, max_tiles

    lengths = [1, block_q + 1] * 7 + [1]
    n_tiles = build_work_list(cu_seqlens_of(lengths).tolist(), block_q).shape[0]
    assert n_tiles == 22 == max_tiles(sum(lengths), block_q)


def test_empty_tiles_do_nothing(device: torch.device, poisoned: Any) -> None:
    """Catches a program without rows that writes, or one that shifts what the others write."""
    from fastbert_kernels.attention import build_work_list, varlen_attention_forward

    lengths = [3, 70, 2]
    batch = packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device)
    qkv = torch.randn(sum(lengths), 96, device=device)
    tiles = build_work_list(cu_seqlens_of(lengths).tolist(), 64).to(device)
    full = torch.cat([tiles, torch.zeros(5, 4, dtype=torch.int32, device=device)])
    outs = [varlen_attention_forward(qkv, batch.cu_seqlens, batch.seq_ids, w, 2, 0.25) for w in (tiles, full)]
    poisoned.check()
    assert torch.equal(*outs)


# Results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_with_graphs_and_without(dtype: torch.dtype, stand_in: StandIn, device: torch.device) -> None:
    """Catches static inputs that differ from the plain path's, or are left over from the batch before."""
    model = make(device, dtype)
    for turn in range(2):
        for lengths in LENGTHS:
            expected = without_graphs(model, lengths, seed=turn)
            assert torch.equal(encode(model, lengths, seed=turn), expected), lengths
    assert stand_in.replays == 2 * len(LENGTHS)


def test_padding_changes_no_more_than_rounding(stand_in: StandIn, device: torch.device) -> None:
    """Catches a text that sees the rows of padding."""
    model = make(device)
    for lengths in LENGTHS:
        exact = model.forward_packed(*packed(lengths, device)).detach()  # with gradients: in exactly T rows
        assert rms_error(encode(model, lengths), exact) < 2e-6, lengths  # of two float32 results


def test_poisoned_padding(stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a NaN in a row of padding, or in memory that no kernel wrote, that reaches a text."""
    from fastbert_kernels import launch

    model = make(device)
    expected = [encode(model, lengths) for lengths in LENGTHS]
    model.graphs.clear()

    def empty(shape: tuple[int, ...], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, float("nan"), device=like.device, dtype=dtype or like.dtype)

    monkeypatch.setattr(launch, "empty", empty)
    for lengths, right in zip(LENGTHS, expected, strict=True):
        assert torch.equal(encode(model, lengths), right), lengths
        assert torch.equal(without_graphs(model, lengths), right), lengths


def test_segments_positions_and_dtypes(stand_in: StandIn, device: torch.device) -> None:
    """Catches given segments or positions that a graph ignores, keeps for the next batch, or reads as another dtype."""
    model = make(device)
    ids, cu_seqlens = packed([5, 9], device)
    segments, positions = torch.arange(14, device=device) % 2, torch.arange(14, device=device).flip(0)
    plain = encode(model, [5, 9])
    with torch.no_grad():
        given = model.forward_packed(ids, cu_seqlens, segments, positions)
        narrow = model.forward_packed(ids.int(), cu_seqlens, segments.int(), positions.int())
        again = model.forward_packed(ids, cu_seqlens)
        model.cuda_graphs = False
        expected = model.forward_packed(ids, cu_seqlens, segments, positions)
    assert torch.equal(given, expected) and torch.equal(narrow, expected)
    assert torch.equal(again, plain) and not torch.equal(given, plain)


def test_a_result_stays_as_it_is(stand_in: StandIn, device: torch.device) -> None:
    """Catches a result in the graph's own memory, which the next call overwrites."""
    model = make(device)
    first = encode(model, [9, 4])
    kept = first.clone()
    encode(model, [9, 4], seed=1)
    assert torch.equal(first, kept)


def test_inference_mode_and_no_grad_share_graphs(stand_in: StandIn, device: torch.device) -> None:
    """Catches static memory made in inference mode, which nobody may write to outside of it."""
    model = make(device)
    with torch.inference_mode():
        first = model.forward_packed(*packed([8], device))
    assert torch.equal(encode(model, [8]), first) and stand_in.captures == 1


def test_hidden_states(stand_in: StandIn, device: torch.device) -> None:
    """Catches hidden states that miss a layer or keep rows of padding, or a last one that differs from a graph's."""
    model = make(device)
    ids = packed([7, 7], device)[0].view(2, 7)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        last = model(ids).last_hidden_state
    assert len(output.hidden_states) == 3 and all(state.shape == (2, 7, 32) for state in output.hidden_states)
    assert torch.equal(output.last_hidden_state, last) and torch.equal(output.hidden_states[-1], last)


def test_hidden_states_go_when_they_are_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the layers: all hidden states kept where only the last was asked for."""
    model = make(device, num_hidden_layers=4)
    states: list[Any] = []
    forward = fastbert.models.bert.BertLayer.forward

    def watched(layer: Any, x: Tensor, batch: Any, policy: Any) -> Tensor:
        assert all(state() is None for state in states[:-1])
        out = forward(layer, x, batch, policy)
        states.append(weakref.ref(out))
        return out

    monkeypatch.setattr(fastbert.models.bert.BertLayer, "forward", watched)
    encode(model, [9, 4])
    assert len(states) == 4


@pytest.mark.parametrize(
    "lengths", [[0] * 70 + [3, 0], [0, 0], [100] * 164], ids=["many empty", "no token", "too many"]
)
def test_what_does_not_fit(lengths: list[int], stand_in: StandIn, device: torch.device) -> None:
    """Catches a batch written past the static memory."""
    model = make(device)
    model._encode = lambda ids, types, positions, batch, *rest, **options: [ids[:, None].expand(-1, 32).float()]
    out = encode(model, lengths)
    assert out.shape == (sum(lengths), 32) and stand_in.captures == 0
    assert torch.equal(out[:, 0].long(), packed(lengths, device)[0])


def test_sequences_with_tiles_of_their_own(
    stand_in: StandIn, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a work list with more tiles than the static one, from a policy that shares none, written past it."""
    from fastbert_kernels import attention

    def unshared(cu_seqlens: list[int], *rest: Any) -> Tensor:
        tiles = [(a, b, i, i + 1) for i, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False))]
        return torch.tensor(tiles, dtype=torch.int32)

    model = make(device)
    expected = encode(model, [1] * 30)
    monkeypatch.setattr(attention, "build_work_list", unshared)
    captures = stand_in.captures
    assert rms_error(encode(model, [1] * 30), expected) < 2e-6
    assert stand_in.captures == captures == stand_in.replays


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_heads(head: str, stand_in: StandIn, device: torch.device) -> None:
    """Catches a head that goes around the graphs, or gets rows of padding from them."""
    model = make(device, kind=getattr(heads, head))
    ids = packed([6] * 3, device)[0].view(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [0] * 6], device=device)
    with torch.no_grad():
        with_graphs = model(ids, mask).to_tuple()
        assert stand_in.replays == 1
        model.cuda_graphs = False
        assert model.bert.cuda_graphs is False and model.cuda_graphs is False
        for ours, expected in zip(with_graphs, model(ids, mask).to_tuple(), strict=True):
            assert torch.equal(ours, expected)
    assert stand_in.replays == 1


def test_sentence_encoder(stand_in: StandIn, device: torch.device, minilm: Any) -> None:
    """Catches vectors that depend on graphs, or an encode() that captures anew since it calls eval()."""
    options: dict[str, Any] = {"device": device, "backend": "triton", "num_hidden_layers": 1}
    encoder = fastbert.SentenceEncoder.from_pretrained(minilm, **options, token_budget=64)
    texts = ["A text.", "Another one, that is longer than the first.", "", "Four short words here."]
    first = encoder.encode(texts)
    captures = stand_in.captures
    assert captures > 0 and (encoder.encode(texts) == first).all()
    assert stand_in.captures == captures
    off = fastbert.SentenceEncoder.from_pretrained(minilm, **options, token_budget=64, cuda_graphs=False)
    assert off.model.cuda_graphs is False and (off.encode(texts) == first).all()


# What ends a graph, and what takes the plain path


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that goes on with the old weights, or one that is kept although it reads old memory."""
    model = make(device)
    before = encode(model, [9, 4])
    change(model)
    after = encode(model, [9, 4])
    assert torch.equal(after, without_graphs(model, [9, 4])) and not torch.equal(after, before)
    assert stand_in.captures == 2 and len(model.graphs) == 1
    assert torch.equal(encode(model, [9, 4]), after) and stand_in.captures == 2


def test_writes_that_nobody_counts(stand_in: StandIn, device: torch.device) -> None:
    """Catches eval() after a write through .data that the fused matrix of a graph does not follow, or a new capture."""
    model = make(device)
    encode(model, [9, 4])
    for name in ("query", "key", "value"):
        getattr(model.encoder.layer[1].attention.self, name).weight.data.mul_(2.0)
    model.eval()
    assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4])) and stand_in.captures == 1


def test_eval_alone_ends_no_graph(stand_in: StandIn, device: torch.device) -> None:
    """Catches a server that calls eval() before each batch, and captures each time."""
    model = make(device)
    for _ in range(3):
        encode(model.eval(), [9, 4])
    assert stand_in.captures == 1


def test_mode_dtype_and_policy(stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph that outlives train(), another dtype or another policy, or that keeps memory in training."""
    model = make(device)
    for change in (
        lambda: model.train().eval(),
        lambda: model.to(torch.bfloat16),
        lambda: setattr(model, "policy", Policy("triton")),
    ):
        encode(model, [9, 4])
        captures = stand_in.captures
        change()
        out = encode(model, [9, 4])
        assert stand_in.captures == captures + 1 and torch.equal(out, without_graphs(model, [9, 4]))
    assert len(model.graphs) == 1
    model.train()
    assert len(model.graphs) == 0


def test_inference_tensors(stand_in: StandIn, device: torch.device) -> None:
    """Catches weights without a count of writes: an error, or a fused matrix of old numbers."""
    with torch.inference_mode():
        model = make(device)
        first = encode(model, [9, 4])
        assert torch.equal(encode(model, [9, 4]), first) and stand_in.captures == 1
        scale_query(model)
        assert torch.equal(encode(model, [9, 4]), without_graphs(model, [9, 4]))


@pytest.mark.parametrize("change", UNSUITABLE, ids=lambda change: change.__name__)
def test_what_no_graph_may_hold(change: Callable[[Any], None], stand_in: StandIn, device: torch.device) -> None:
    """Catches code that a replay would leave out."""
    model = make(device)
    before = encode(model, [9, 4])
    change(model)
    after = encode(model, [9, 4])
    assert stand_in.captures == stand_in.replays == 1
    changed = change in (add_adapter, add_hook, patch_forward)
    assert (rms_error(after, before) > 0.01) == changed
    with torch.no_grad():
        assert model.graph_obstacle() is not None


def test_contexts_that_take_the_plain_path(stand_in: StandIn, device: torch.device) -> None:
    """Catches gradients, autocast, embeddings or a count of FLOPs that a replay would lose."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make(device, dtype=torch.float32)
    model.policy = Policy("triton")
    ids, cu_seqlens = packed([9, 4], device)
    assert model.forward_packed(ids, cu_seqlens).requires_grad
    with torch.no_grad():
        with torch.autocast(device.type, torch.bfloat16):
            model.forward_packed(ids, cu_seqlens)
        with FlopCounterMode(display=False) as flops:
            model.forward_packed(ids, cu_seqlens)
        model(inputs_embeds=torch.randn(1, 9, 32, device=device))
        assert flops.get_total_flops() > 0 and stand_in.captures == 0
        model.forward_packed(ids, cu_seqlens)
    assert stand_in.captures == 1


def test_float32_precision(stand_in: StandIn, device: torch.device) -> None:
    """Catches a graph captured in TF32 that is replayed where IEEE float32 is asked for."""
    model = make(device)
    encode(model, [9, 4])
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    try:
        encode(model, [9, 4])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert stand_in.captures == 2
    encode(model, [9, 4])
    assert stand_in.captures == 2


def test_no_padding_where_there_are_no_graphs() -> None:
    """Catches rows of a bucket in plain PyTorch, where they would only cost."""
    model = make(torch.device("cpu"))
    model.policy = Policy("torch")
    rows: list[int] = []
    encode_rows = model._encode
    model._encode = lambda ids, *rest, **options: rows.append(len(ids)) or encode_rows(ids, *rest, **options)
    encode(model, [9, 4])
    assert rows == [13]


# The pool


def test_the_pool_is_bounded(stand_in: StandIn, device: torch.device) -> None:
    """Catches graphs or buffers that pile up over batches of random lengths, and a pool that drops the wrong one."""
    model = make(device)
    cheap(model)
    model.graphs.limit = 5
    for seed in range(200):
        lengths = random_lengths(seed, 3000)
        out = encode(model, lengths, seed)
        assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
        assert len(model.graphs) <= 5
        assert graphs.bucket_of(sum(lengths)) in model.graphs.captured(), "the graph that was used last is gone"
    assert len(model.graphs._buffers) <= 8  # one an octave, from 32 to 4096
    encode(model, [32])
    captures = stand_in.captures
    for n_tokens in (512, 32, 1024, 32, 2048, 32, 4096, 32):
        encode(model, [200] * (n_tokens // 200) + [n_tokens % 200])
    assert stand_in.captures - captures <= 4, "the bucket in use was dropped"


def test_the_largest_of_an_octave_comes_first(stand_in: StandIn, device: torch.device) -> None:
    """Catches intermediate memory that grows with every new bucket, since none finds room in what the others left."""
    model = make(device)
    rows = cheap(model)
    encode(model, [70])
    assert model.graphs.captured() == (96, 128) and rows[0] == 128
    encode(model, [100])
    assert stand_in.captures == 2


def test_copies_capture_for_themselves(stand_in: StandIn, device: torch.device) -> None:
    """Catches a copy that shares static memory with its model, or that cannot be pickled for its locks."""
    model = make(device)
    expected = encode(model, [9, 4])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.graphs is not model.graphs and len(other.graphs) == 0
        assert torch.equal(encode(other, [9, 4]), expected)
    model.cuda_graphs = False
    assert copy.deepcopy(model).cuda_graphs is False and len(model.graphs) == 0


def test_a_capture_that_fails(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a crash, silence, or a try at every batch where a driver cannot capture."""
    made = StandIn(RuntimeError("operation not permitted when stream is capturing"))
    monkeypatch.setattr(graphs, "capturer", lambda device: made)
    model = make(device)
    with caplog.at_level(logging.WARNING, "fastbert"):
        first = encode(model, [9, 4])
        assert torch.equal(encode(model, [9, 4]), first)
    assert len(caplog.records) == 1 and "operation not permitted" in caplog.text
    made.error = None
    assert torch.equal(first, without_graphs(model, [9, 4])) and made.captures == 0
    report = fastbert.warmup(model, max_tokens=40)
    assert report.buckets == (32, 64) and not report.notes


def test_errors_of_the_model(stand_in: StandIn, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a strict policy's error, or one of mixed dtypes, taken for a driver that cannot capture."""
    relu = make(device, hidden_act="relu")
    mixed = make(device)
    mixed.encoder.layer[0].intermediate.dense.double()
    mixed.policy = Policy("triton")
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            with pytest.raises(fastbert.BackendError, match="no Triton kernel for 'relu'"):
                encode(relu, [9, 4])
            with pytest.raises(TypeError, match="expected one dtype"):
                encode(mixed, [9, 4])
    assert "CUDA graphs" not in caplog.text and not stand_in.busy


# Threads and streams


def test_threads(stand_in: StandIn, device: torch.device) -> None:
    """Catches a thread's batch in another thread's static memory."""
    model = make(device)
    cheap(model)
    cases = [(random_lengths(seed, 1500), seed) for seed in range(120)]
    with ThreadPoolExecutor(6) as pool:
        outs = list(pool.map(lambda case: encode(model, *case), cases))
    for (lengths, seed), out in zip(cases, outs, strict=True):
        assert torch.equal(out[:, 0].long(), packed(lengths, device, seed)[0])
    assert stand_in.captures == len(model.graphs), "two threads captured the same bucket"


def test_two_models_capture_one_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two captures at a time in one process, which CUDA forbids."""
    inside, most = [0], [0]
    guard = threading.Lock()

    class Counting(StandIn):
        def capture(self, function: Callable[[], None]) -> Any:
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            captured = super().capture(function)
            threading.Event().wait(0.002)
            with guard:
                inside[0] -= 1
            return captured

    monkeypatch.setattr(graphs, "capturer", lambda device: Counting())
    models = [make(device) for _ in range(3)]
    for model in models:
        cheap(model)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda model: [encode(model, [n]) for n in (20, 50, 100, 180)], models))
    assert most[0] == 1 and all(len(model.graphs) == 5 for model in models)


class FakeStream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


def test_another_stream_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that writes to the static memory while another still copies a result out of it."""
    streams = [FakeStream(), FakeStream()]
    current = [streams[0]]
    recorded: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            recorded.append("finished")

    class Memory:
        def record_stream(self, stream: Any) -> None:
            recorded.append((self, stream))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    memory: Any = Memory()
    capturer = graphs.CudaCapturer(torch.device("cuda", 0))
    capturer.finish()
    for stream, n_waits in ((streams[0], 0), (streams[0], 0), (streams[1], 1), (streams[1], 1), (streams[0], 2)):
        current[0] = stream
        capturer.begin([memory])
        capturer.end()
        assert len(streams[0].waited) + len(streams[1].waited) == n_waits
    used = [streams[0], streams[0], streams[1], streams[1], streams[0]]
    assert recorded == [entry for stream in used for entry in ((memory, stream), stream)]
    capturer.finish()
    assert recorded[-1] == "finished"


@pytest.mark.parametrize("fails", [False, True], ids=["captures", "fails"])
def test_the_order_of_a_capture(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a capture of what never ran, or on the stream it ran on, in another pool, or one that keeps a stream."""
    log: list[Any] = []
    current = ["caller's"]
    streams = iter(["aside", "capturing"])

    class Stream:
        def __init__(self, name: str | None = None) -> None:
            self.name = name or next(streams)

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Inside:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.stream.name

        def __exit__(self, *args: Any) -> None:
            current[0] = self.before

    class Capture(Inside):
        def __init__(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> None:
            super().__init__(stream)
            log.append((pool, capture_error_mode))

        def __exit__(self, *args: Any) -> None:
            if fails:  # as torch.cuda.graph does, which then leaves its stream current
                raise RuntimeError("capture failed")
            super().__exit__()

    class Device:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: Any) -> None: ...

    fakes = {
        "device": Device, "Stream": Stream, "stream": Inside, "graph": Capture, "CUDAGraph": object,
        "graph_pool_handle": lambda: "pool", "current_stream": lambda: Stream(current[0]),
        "set_stream": lambda stream: current.__setitem__(0, stream.name),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capturer = graphs.CudaCapturer(torch.device("cuda", 0))
    first = ["aside waits for caller's", "aside", "caller's waits for aside", ("pool", "thread_local"), "capturing"]
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="capture failed"):
                capturer.capture(lambda: log.append(current[0]))
        else:
            capturer.capture(lambda: log.append(current[0]))
        assert current == ["caller's"]
    assert log == first * 2


# On a GPU


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
    assert (fastbert.compile_events() - before).captures == len(model.graphs) > 0


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
def test_gpu_a_capture_of_somebody_else(cuda: torch.device) -> None:
    """Catches a graph that is replayed, or captured, inside of a user's own capture."""
    model = real(cuda)
    ids, cu_seqlens = packed([90, 4], cuda)
    batch = packing.from_cu_seqlens(cu_seqlens, 94, cuda)
    segments = torch.zeros_like(ids)
    with torch.no_grad():
        exact = model._encode(ids, segments, batch.position_ids, batch)[-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model.encode_packed(batch, ids, segments, check=False)[-1]
        graph.replay()
    assert torch.equal(out, exact) and len(model.graphs) == 0
