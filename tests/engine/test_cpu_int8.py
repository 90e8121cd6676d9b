"""precision="int8" on CPUs has exact kernels, and the encoder that they make up is as accurate as its emulation."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import BackendError, BertConfig, BertForTokenClassification, BertModel, SentenceEncoder
from fastbert.diagnostics.explain.entry import explain
from fastbert.diagnostics.verify.entry import verify
from fastbert.ops import dispatch
from fastbert.ops.quantized import rotate
from fastbert_kernels import cpu
from helpers import (
    Outputs,
    assert_as_accurate,
    assert_same_in_threads,
    cu_seqlens_of,
    docstrings,
    guarded,
    minilm_folder,
    only_variant,
    rms_error,
    tokens_of_calls,
)

pytestmark = pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))

ACTIVATED = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 400,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = ([1], [4], [1, 20, 9, 9, 0, 25], [130, 3, 64], [400, 7])


@pytest.fixture(params=[name for name in cpu.VARIANTS if name.startswith("avx512_")])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each library with these kernels, as if it were the best."""
    with only_variant(request.param):
        why_not = cpu.int8_obstacle()
        if why_not is not None:
            pytest.skip(f"{request.param}: {why_not}")
        yield request.param


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """Outputs full of NaN, between guard bands."""
    buffers = Outputs()
    monkeypatch.setattr(cpu.library, "empty", buffers.empty)
    return buffers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 1), (0, 5), (3, 33), (9, 64), (5, 1536)])
def test_quantised_rows(n_rows: int, k: int, rotated: bool, dtype: torch.dtype, variant: str, outputs: Outputs) -> None:
    """Catches too coarse a step, a rotation in another order, a tail that counts as zeros, a read past the row."""
    k = -(-k // 32) * 32 if rotated else k
    x = (torch.randn(n_rows, k) + 3).to(dtype)
    q, affine = cpu.quantize_forward(guarded(x, extra_columns=9), rotated)
    x = rotate(x) if rotated else x.float()
    restored = q.double() * affine[:, :1].double() + affine[:, 1:].double()
    if n_rows:
        step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 255
        assert ((restored - x).abs() <= 0.501 * step + 1e-5 * x.abs().amax()).all()
        assert (q.amin(1) == 0).all() and (k == 1 or (q.amax(1) == 255).all())
        outputs.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(bad: float, variant: str) -> None:
    """Catches a NaN that becomes a number, or that spreads to a neighbour's row."""
    for rotated in (False, True):
        x = torch.randn(3, 64)
        x[1, 7] = bad
        q, affine = cpu.quantize_forward(x, rotated)
        weight = cpu.pack_int8(torch.ones(40, 64, dtype=torch.int8), torch.ones(40), None)
        for activation in ("none", "gelu"):
            out = cpu.linear_int8_forward(q, affine, weight, torch.float32, activation)
            assert not out[1].isfinite().any() and out[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(cpu.ACTIVATIONS))
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "k", "n_cols"), [(1, 1, 1), (0, 5, 7), (4, 16, 64), (9, 33, 131), (70, 384, 96), (7, 16384, 49)]
)
def test_linear_is_exact(
    n_rows: int, k: int, n_cols: int, with_residual: bool, activation: str, dtype: torch.dtype, variant: str,
    outputs: Outputs,
) -> None:  # fmt: skip
    """Catches a sum that overflows, a wrong edge of a tile, four of K in another order, a column of the padding."""
    q = torch.full((n_rows, -(-k // 4) * 4), 201, dtype=torch.uint8)[:, :k]  # what follows K counts for nothing
    q.copy_(torch.randint(256, (n_rows, k)))
    q[: n_rows // 2] = 255
    data = torch.randint(-127, 128, (n_cols, k), dtype=torch.int8)
    data[n_cols // 2 :] = 127
    affine, scale = torch.rand(n_rows, 2) - 0.3, torch.rand(n_cols) / 64 / k
    bias = torch.randn(n_cols)
    residual = torch.randn(n_rows, n_cols).to(dtype) if with_residual else None
    x = q.double() * affine[:, :1].double() + affine[:, 1:].double()
    before = F.linear(x, data.double() * scale.double()[:, None], bias.double())
    exact = ACTIVATED[activation](before)
    eager = ACTIVATED[activation](before.float())
    if residual is not None:
        exact, eager = exact + residual.double(), eager + residual.float()
        residual = guarded(residual, extra_columns=3)
    weight = cpu.pack_int8(data, scale, bias)
    ours = cpu.linear_int8_forward(q, guarded(affine.flatten()).view(-1, 2), weight, dtype, activation, residual)
    if n_rows:
        # In float32 from exact integers: a few roundings, and what a GELU for 8 bits leaves out.
        error = (ours.double() - exact).abs().max() / max(before.abs().max(), exact.abs().max())
        assert error <= (1e-6 if activation != "gelu" else 3e-6) + (2**-8 if dtype == torch.bfloat16 else 0)
        if dtype == torch.bfloat16 and exact.abs().max() > 1e-3:
            assert_as_accurate(activation, ours, eager.to(dtype), exact)
        outputs.check()


def test_gelu_over_its_whole_range(variant: str) -> None:
    """Catches a polynomial that leaves its range, a tail that is not 0 or x, or a NaN that is lost."""
    ends = torch.tensor([-1e30, -200.0, -20.0, 20.0, 200.0, 1e30, float("inf"), float("nan"), 0.0])
    x = torch.cat([torch.linspace(-12, 12, 20001), ends])
    affine = torch.stack([torch.zeros_like(x), x], 1)
    weight = cpu.pack_int8(torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None)
    q = torch.zeros(len(x), 4, dtype=torch.uint8)
    for activation in ("gelu", "gelu_tanh"):
        ours = cpu.linear_int8_forward(q, affine, weight, torch.float32, activation)[:, 0]
        exact = ACTIVATED[activation](x.double())
        torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=3e-6, equal_nan=True)


def make(dtype: torch.dtype = torch.float32, kind: Any = BertModel, **changes: Any) -> Any:
    """A model in int8. changes: of the configuration, or backend, strict, precision."""
    options = {"backend": "cpu", "precision": "int8"}
    options.update({name: changes.pop(name) for name in ("backend", "strict", "precision") if name in changes})
    torch.manual_seed(1)
    model = kind(BertConfig(**{**SIZES, **changes}), **options)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.2)
    return model.eval().to(dtype)


def encode(model: BertModel, lengths: list[int], seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    ids = torch.randint(1, 101, (n,), generator=random)
    with torch.no_grad():
        return model.forward_packed(ids, cu_seqlens_of(lengths), torch.arange(n) % 2)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return tokens_of_calls(monkeypatch, "encoder_int8_forward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_no_worse_than_the_emulation(lengths: list[int], activation: str, dtype: torch.dtype, runs: list[int]) -> None:
    """Catches weights in the wrong order, a residual or an activation left out, or chunks whose memory overlaps."""
    exact = encode(make(torch.float64, precision=None, backend="torch", hidden_act=activation), lengths)
    emulated = encode(make(dtype, backend="torch", hidden_act=activation), lengths)
    ours = encode(make(dtype, hidden_act=activation), lengths)
    assert runs == [sum(lengths)] and ours.dtype == dtype
    assert 1e-4 < rms_error(ours, exact) <= 1.25 * rms_error(emulated, exact) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_text_has_the_same_bits_in_any_batch(dtype: torch.dtype, variant: str) -> None:
    """Catches a step that another row decides, or arithmetic that depends on tile, chunk or number of threads."""
    model, lengths = make(dtype), [33, 1, 200, 7, 64, 90]
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 101, (n,), generator=random) for n in lengths]
    before = torch.get_num_threads()
    with torch.no_grad():
        batch = model.forward_packed(torch.cat(texts), cu_seqlens_of(lengths)).split(lengths)
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                for text, expected in zip(texts, batch, strict=True):
                    assert torch.equal(model.forward_packed(text, cu_seqlens_of([len(text)])), expected)
        finally:
            torch.set_num_threads(before)


def test_states_embeddings_and_heads(runs: list[int]) -> None:
    """Catches states of the wrong layer, embeddings or a head that go around the kernel, or shared copies."""
    model, ids = make(), torch.randint(1, 101, (3, 12))
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [1, 0] * 6])
    with torch.no_grad():
        output = model(ids, mask, output_hidden_states=True)
        assert torch.equal(model(ids, mask).last_hidden_state, output.last_hidden_state)
        assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[2], output.last_hidden_state)
        exact = make(torch.float64, precision=None)(ids, mask, output_hidden_states=True)
        for ours, right in zip(output.hidden_states, exact.hidden_states, strict=True):
            assert rms_error(ours, right) < 0.03
        embeds = model(inputs_embeds=model.embeddings.word_embeddings(ids), attention_mask=mask).last_hidden_state
        torch.testing.assert_close(embeds, output.last_hidden_state, rtol=0, atol=0.05)
        assert runs == [26] * 3
        assert model(ids[:0], mask[:0]).last_hidden_state.shape == (0, 12, 64)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids, mask).last_hidden_state, output.last_hidden_state)
        head = make(kind=BertForTokenClassification)
        assert head(ids).logits.isfinite().all() and runs[-1] == 36


def test_follows_the_weights() -> None:
    """Catches 8-bit weights that stay as they were when a parameter is written to, replaced or loaded."""
    model = make()

    def right() -> None:
        other = make()
        other.load_state_dict(model.state_dict())
        assert torch.equal(encode(model, [9, 5]), encode(other, [9, 5]))

    right()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(1.5)
    right()
    model.encoder.layer[0].attention.self.key.weight = nn.Parameter(torch.randn(64, 64) * 0.3)
    right()
    model.encoder.layer[0].intermediate.dense.bias.data.mul_(3.0)  # which nothing counts
    model.eval()
    right()
    model.load_state_dict(make().state_dict())
    right()


def test_threads_share_a_model() -> None:
    """Catches two threads that write to one workspace."""
    model = make()
    assert_same_in_threads(lambda seed: encode(model, [40, 9, 30], seed), 6, 10)


def test_stands_aside_with_a_word(runs: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Catches a hook that never runs, a fallback in silence, or a strict model that does not raise."""
    model, plain, strict = make(), make(precision=None), make(strict=True)
    dispatch._log_once.cache_clear()
    seen: list[Any] = []
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        for one in (model, strict):
            one.encoder.layer[1].register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(encode(model, [9, 5]), encode(plain, [9, 5]), rtol=1e-4, atol=1e-4)
        with pytest.raises(BackendError, match=r"precision='int8'.*has hooks"):
            encode(strict, [9, 5])
    logged = [record.getMessage() for record in caplog.records if "falls back to 'unquantised'" in record.getMessage()]
    assert len(seen) == 1 and len(logged) == 1 and "hooks" in logged[0] and not runs
    odd = make()
    odd.encoder.layer[0].output.LayerNorm.eps = 1e-3
    encode(odd, [3])
    assert not runs and "differ in eps" in explain(odd).notes[0]
    with pytest.raises(RuntimeError, match="has no gradient"):
        make().requires_grad_(True)(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="is for inference"), torch.no_grad():
        make().train()(torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("missing", ["avx512_vnni", "avx512f"])
def test_processors_without_vnni(missing: str, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Catches a call of a kernel that the library does not have."""
    request.addfinalizer(cpu.library.load.cache_clear)
    flags = cpu.library.processor_flags() - {missing}
    monkeypatch.setattr(cpu.library, "processor_flags", lambda: flags)
    cpu.library.load.cache_clear()
    assert "no AVX-512 VNNI" in str(cpu.int8_obstacle())
    torch.testing.assert_close(encode(make(), [9, 5]), encode(make(precision=None), [9, 5]), rtol=1e-4, atol=1e-4)
    assert any("no AVX-512 VNNI" in note for note in explain(make()).notes)
    with pytest.raises(BackendError, match="no AVX-512 VNNI"):
        encode(make(strict=True), [9, 5])


def test_what_explain_says() -> None:
    """Catches a report of the unquantised path, or of Triton's kernels, where these run."""
    report = explain(make())
    rows = [row for row in report.rows if row.op == "quantized_linear"]
    assert len(rows) == 4 and {row.backend for row in rows} == {"cpu"}
    assert all(row.kernel == f"fastbert_kernels.cpu, {cpu.instructions()}" for row in rows)
    assert [note.split(",")[0] for note in report.notes] == ["one call: without gradients"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_on_real_weights(dtype: torch.dtype) -> None:
    """Catches a scheme that turns the vectors of trained weights further than was measured when it was chosen."""
    texts, folder = docstrings(200), str(minilm_folder())
    exact = SentenceEncoder.from_pretrained(folder, dtype="float32").encode(texts, convert_to_tensor=True)
    encoder = SentenceEncoder.from_pretrained(folder, dtype=dtype, precision="int8", backend="cpu")
    cosine = F.cosine_similarity(encoder.encode(texts, convert_to_tensor=True).float(), exact)
    assert cosine.quantile(0.01) >= 0.998 and cosine.min() < 0.99999


def test_verify() -> None:
    """Catches a false alarm over 8 bits, or a report that is not about the kernels."""
    encoder = SentenceEncoder.from_pretrained(str(minilm_folder()), precision="int8", backend="cpu")
    report = verify(encoder, docstrings(30))
    assert report.ok, str(report)
    assert report.quantized is not None and report.quantized.cosine_p1 > 0.998
