"""The encoder runs in one call of a C++ kernel, or stands aside where it must."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbert import BertConfig, BertForTokenClassification, BertModel, SentenceEncoder
from fastbert.bench.devices import fast_at_bfloat16
from fastbert.diagnostics.explain.entry import explain
from fastbert.engine import cpu_encoder
from fastbert.engine.cpu_encoder import bfloat16_obstacle
from fastbert.ops import packed_linear
from fastbert.training.precision import takes_bf16
from fastbert_kernels import cpu
from helpers import (
    assert_as_accurate,
    assert_same_in_threads,
    cu_seqlens_of,
    docstrings,
    minilm_folder,
    only_variant,
    tokens_of_calls,
)

pytestmark = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 98,
    "max_position_embeddings": 200,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = ([4], [1, 20, 9, 9, 0, 25], [130, 3, 64], [200])


def make(dtype: torch.dtype = torch.float32, backend: str = "auto", kind: Any = BertModel, **sizes: Any) -> Any:
    torch.manual_seed(1)
    model = kind(BertConfig(**{**SIZES, **sizes}), backend=backend)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.eval().to(dtype)


def inputs(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, cu_seqlens, types) of random texts."""
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return torch.randint(1, 101, (n,), generator=random), cu_seqlens_of(lengths), torch.arange(n) % 2


def encode(model: BertModel, lengths: list[int], seed: int = 0) -> Tensor:
    with torch.no_grad():
        return model.forward_packed(*inputs(lengths, seed))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return tokens_of_calls(monkeypatch)


def skip_without(dtype: torch.dtype) -> None:
    if not cpu.multiplies(dtype) or (dtype == torch.bfloat16 and cpu.has_amx()):
        pytest.skip(f"the kernel does not run {dtype} here")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_as_accurate_as_eager(lengths: list[int], activation: str, dtype: torch.dtype, runs: list[int]) -> None:
    """Catches weights in the wrong order, a residual or an activation left out, or a workspace whose parts overlap."""
    skip_without(dtype)
    model, eager = make(dtype, hidden_act=activation), make(dtype, "torch", hidden_act=activation)
    exact = encode(copy.deepcopy(eager).double(), lengths)
    ours = encode(model, lengths)
    assert runs == [sum(lengths)]
    assert_as_accurate("encoder", ours, encode(eager, lengths), exact)


def test_each_instruction_set_gives_the_encoder() -> None:
    """Catches an encoder that is wrong in the library for a processor with fewer instructions."""
    model, exact = make(), encode(make(backend="torch").double(), [30, 7])
    eager = encode(make(backend="torch"), [30, 7])
    tried = 0
    for name in cpu.VARIANTS:
        with only_variant(name):
            if cpu.obstacle() is None:
                tried += 1
                assert_as_accurate(name, encode(copy.deepcopy(model), [30, 7]), eager, exact)
    assert tried


def test_follows_the_weights(runs: list[int]) -> None:
    """Catches packed weights that stay as they were when a parameter is written to, replaced, moved or trained."""
    model = make()

    def right() -> None:
        other = BertModel(model.config, backend="torch").eval().to(model.dtype)
        other.load_state_dict(model.state_dict())
        n_runs = len(runs)
        torch.testing.assert_close(encode(model, [9, 5]), encode(other, [9, 5]), rtol=1e-4, atol=1e-4)
        assert len(runs) == n_runs + 1

    right()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.mul_(1.5)
    right()
    model.encoder.layer[0].attention.self.key.weight = nn.Parameter(torch.randn(64, 64) * 0.3)
    right()
    model.encoder.layer[0].intermediate.dense = nn.Linear(64, 98).eval()
    right()
    model.embeddings.word_embeddings.weight.data = torch.randn(101, 64)
    right()
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # which nothing counts
    model.eval()
    right()
    model.train()(torch.ones(1, 5, dtype=torch.int64)).last_hidden_state.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-4 * parameter.grad)
    model.eval()
    right()
    model.load_state_dict(make().state_dict())
    right()


def test_stands_aside(runs: list[int]) -> None:
    """Catches gradients, hooks, states, adapters, autocast or dropout that are passed over."""
    model = make()
    ids, cu_seqlens, token_type_ids = inputs([9, 5])
    expected = encode(model, [9, 5])
    assert runs == [14]
    model.forward_packed(ids, cu_seqlens, token_type_ids).sum().backward()
    assert model.encoder.layer[0].output.dense.weight.grad is not None
    with torch.no_grad():
        seen: list[Any] = []
        hook = model.encoder.layer[1].register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(
            model.forward_packed(ids, cu_seqlens, token_type_ids), expected, rtol=1e-4, atol=1e-4
        )
        assert len(seen) == 1
        hook.remove()
        assert len(model(ids[None], output_hidden_states=True).hidden_states) == 3
        with torch.autocast("cpu", torch.bfloat16):
            model.forward_packed(ids, cu_seqlens, token_type_ids)
        model.forward_packed(ids[:3], cu_seqlens_of([3]), token_type_ids[:3])  # too few rows to be as exact as PyTorch
        plain = model.encoder.layer[0].output.dense
        model.encoder.layer[0].output.dense = nn.Sequential(plain)
        torch.testing.assert_close(
            model.forward_packed(ids, cu_seqlens, token_type_ids), expected, rtol=1e-4, atol=1e-4
        )
        model.encoder.layer[0].output.dense = plain
        model.encoder.layer[0].output.LayerNorm.eps = 1e-3
        model.train().forward_packed(ids, cu_seqlens, token_type_ids)
        assert runs == [14]
        model.eval()
        model.encoder.layer[0].output.LayerNorm.eps = model.config.layer_norm_eps
        model.forward_packed(ids, cu_seqlens, token_type_ids)
        assert runs == [14, 14]


def obstacles(model: Any, n_tokens: int | None = None) -> list[str]:
    """Every reason why the model does not run in one call."""
    return list(model.engine.one_call.obstacles(model, n_tokens, False, False))


def test_what_it_cannot_run_is_said() -> None:
    """Catches an obstacle without its reason, or a sub-path for a configuration that the kernel does not know."""
    for changes, reason in (
        ({"dtype": torch.float64}, "do not multiply torch.float64"),
        ({"backend": "torch"}, "the backend is 'torch'"),
        ({"num_attention_heads": 8}, "head size 8"),
        ({"dtype": torch.bfloat16, "intermediate_size": 33}, "odd" if cpu.multiplies(torch.bfloat16) else "bfloat16"),
    ):
        model = make(**changes)
        assert reason in "; ".join(obstacles(model))
        encode(model, [5, 6])
    model = make()
    assert any("gradients" in obstacle for obstacle in obstacles(model))
    with torch.no_grad():
        assert obstacles(model) == []
        assert "3 tokens" in obstacles(model, 3)[0]
        model.encoder.register_forward_hook(lambda *_: None)
        assert len(obstacles(model, 3)) == 2, "every reason, not the first"


def test_bfloat16_with_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches long batches kept from oneDNN where the processor's matrix units run them several times as fast."""
    for has_amx in (False, True):
        monkeypatch.setattr(cpu, "has_amx", lambda has_amx=has_amx: has_amx)
        assert cpu_encoder.takes_rows(cpu_encoder.ROWS_WITHOUT_AMX, torch.bfloat16, 64)
        assert cpu_encoder.takes_rows(4000, torch.bfloat16, 64) != has_amx
        assert cpu_encoder.takes_rows(4000, torch.float32, 64)


def test_positions_and_ids_of_any_kind(runs: list[int]) -> None:
    """Catches int32 ids or strided ones read as contiguous int64, and positions that are counted anew."""
    model, ids = make(), torch.randint(1, 101, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [1, 0] * 6])
    plain = make(backend="torch")
    with torch.no_grad():
        for layout in (ids, ids.int(), ids.t().contiguous().t()):
            ours, theirs = model(layout, mask, 1 - mask), plain(layout, mask, 1 - mask)
            torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=1e-4, atol=1e-4)
        with pytest.raises(IndexError):
            model(ids + 100)
        assert model(ids[:0], mask[:0]).last_hidden_state.shape == (0, 12, 64)
    assert runs[:3] == [26] * 3


def test_heads_and_copies(runs: list[int]) -> None:
    """Catches a head that goes around the kernel, and workspaces or addresses that travel with a copy."""
    model = make(kind=BertForTokenClassification)
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        expected = model(ids).logits
        assert runs == [20]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.bert.engine.cpu_encoder._workspaces == []
            torch.testing.assert_close(other(ids).logits, expected)
    assert runs == [20] * 3


def test_threads_share_a_model() -> None:
    """Catches two threads in one workspace."""
    model = make()
    assert_same_in_threads(lambda seed: encode(model, [40, 9, 30], seed), 8, 20)


def test_workspaces_do_not_pile_up() -> None:
    """Catches memory that stays: a workspace for every size that ever came, or one of any size."""
    model = make()
    for n in (10, 150, 30, 200):
        encode(model, [n])
    assert len(model.engine.cpu_encoder._workspaces) == 1
    model.eval()
    assert model.engine.cpu_encoder._workspaces == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_weights(dtype: torch.dtype, runs: list[int]) -> None:
    """Catches an error that only trained weights and texts of mixed length show."""
    skip_without(dtype)
    texts = docstrings(40)
    vectors = {}
    for name, kind, backend in (("ours", dtype, "auto"), ("eager", dtype, "torch"), ("exact", torch.float64, "torch")):
        encoder = SentenceEncoder.from_pretrained(str(minilm_folder()), dtype=kind, backend=backend)
        vectors[name] = encoder.encode(texts, convert_to_tensor=True)
    assert runs
    assert_as_accurate("vectors", vectors["ours"], vectors["eager"], vectors["exact"])


@pytest.mark.parametrize("k", [cpu_encoder.EXACT_FROM, 384, 768, 1536])
def test_few_rows_are_exact(k: int) -> None:
    """Catches rows that are taken although F.linear is more exact than the policy allows, or that need not be left."""
    torch.manual_seed(k)
    weight, bias = torch.randn(384, k) / k**0.5, torch.randn(384)
    x = torch.randn(60, k)
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    packed = cpu.pack_weight(weight)
    ours = torch.cat([cpu.linear_forward(rows, packed, 384, bias) for rows in x.split(3)])
    eager = torch.cat([nn.functional.linear(rows, weight, bias) for rows in x.split(3)])
    assert_as_accurate("linear", ours, eager, exact)
    takes_rows = cpu_encoder.takes_rows
    assert takes_rows(3, torch.float32, k) and not takes_rows(3, torch.float32, cpu_encoder.EXACT_FROM - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["", "python", "two words"])
def test_a_word_alone(text: str, dtype: torch.dtype, runs: list[int]) -> None:
    """Catches a query of a single word that runs operation by operation, which is far slower, or inexactly."""
    skip_without(dtype)
    vectors = []
    for kind, backend in ((dtype, "auto"), (dtype, "torch"), (torch.float64, "torch")):
        encoder = SentenceEncoder.from_pretrained(str(minilm_folder()), dtype=kind, backend=backend)
        vectors.append(encoder.encode(text, convert_to_tensor=True))
    assert len(runs) == 1 and runs[0] <= 4
    assert_as_accurate("vector", *vectors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int, dtype: torch.dtype) -> None:
    """Catches an operation that begins before the one in front of it has ended in all threads, also where they are more
    than the processors, and work that is left to a second thread.
    """
    skip_without(dtype)
    model, before = make(dtype, num_hidden_layers=6), torch.get_num_threads()
    expected = [encode(model, lengths) for lengths in LENGTHS]
    try:
        torch.set_num_threads(threads)
        for _ in range(10):
            assert all(torch.equal(encode(model, lengths), e) for lengths, e in zip(LENGTHS, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("obstacle", [None, "it is slow"])
def test_dtype_auto_of_encoders(
    obstacle: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: Any
) -> None:
    """Catches bfloat16 where it is slow, where float32 was asked for, in a model to be trained, or without a word; and
    a demo, benchmarks and training that think otherwise.
    """
    monkeypatch.setattr(cpu_encoder, "bfloat16_obstacle", lambda: obstacle)
    folder, fast = str(minilm_folder()), obstacle is None
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu")
    assert encoder.dtype == (torch.bfloat16 if fast else torch.float32)
    assert ("dtype='auto' selected bfloat16" in str(explain(encoder))) == fast
    assert ("dtype='auto' kept float32: it is slow" in str(explain(encoder))) != fast
    for options in ({"dtype": "float32"}, {"backend": "torch"}):
        exact = SentenceEncoder.from_pretrained(folder, device="cpu", **options)
        assert exact.dtype == torch.float32 and "dtype='auto'" not in str(explain(exact))
    assert BertModel.from_pretrained(folder).dtype == torch.float32
    assert fast_at_bfloat16(torch.device("cpu")) == takes_bf16("auto", torch.device("cpu")) == fast
    encoder.save_pretrained(tmp_path)
    assert ("writes torch.bfloat16 weights" in caplog.text) == fast
    encoder.model.to(torch.float32 if fast else torch.bfloat16)  # after which what "auto" took counts no more
    caplog.clear()
    encoder.save_pretrained(tmp_path)
    assert "dtype='auto'" not in str(explain(encoder)) + caplog.text


@pytest.mark.parametrize(
    ("amx", "rate", "obstacle"),
    [
        (False, 2.0, None),
        (False, 0.5, "this processor multiplies bfloat16 at 0.5 times the rate of float32"),
        (False, None, "this processor does not multiply bfloat16 in hardware"),
        (True, 0.5, None),
    ],
)
def test_bfloat16_by_its_rate(amx: bool, rate: float | None, obstacle: str | None, monkeypatch: Any) -> None:
    """Catches bfloat16 taken because the processor has the instruction, however slow, or left where AMX multiplies."""
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    monkeypatch.setattr(cpu, "bfloat16_rate", lambda: rate)
    monkeypatch.setattr(cpu, "obstacle", lambda: None)
    monkeypatch.setattr(packed_linear, "packing_obstacle", lambda dtype: None)
    assert bfloat16_obstacle() == obstacle
