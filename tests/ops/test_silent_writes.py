"""What is derived from weights follows writes that PyTorch does not count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert.engine import capture
from fastbert.ops import silent_writes
from fastbert.ops.silent_writes import Samples, Writes
from fastbert_kernels import cpu
from model_cases import theirs

COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
IDS = torch.randint(5, 99, (2, 8), generator=torch.Generator().manual_seed(0))


def _step(kind: Any, lr: float = 0.01, **options: Any) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        with torch.enable_grad():
            model.requires_grad_(True)
            optimizer = kind(model.parameters(), lr, **options)
            optimizer.zero_grad()
            first(model(IDS)).pow(3).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return write


def _ema(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.detach() + 0.1 * torch.randn(parameter.shape))


def _numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] += 0.1


def _foreach(model: nn.Module) -> None:
    torch._foreach_add_([p.data for p in model.parameters()], 0.1)


def _dlpack(model: nn.Module) -> None:
    for parameter in model.parameters():
        torch.from_dlpack(parameter.detach()).add_(0.1)


def _one_linear(name: str) -> Callable[[nn.Module], None]:
    def write(model: nn.Module) -> None:
        model.get_submodule(name).weight.data.mul_(3.0)

    return write


def _one_bias(model: nn.Module) -> None:
    model.get_submodule("encoder.layer.1.attention.self.value").bias.data.add_(1.0)


def _one_head(model: nn.Module) -> None:
    """Writes to the rows of one of four heads, as an ablation does it."""
    model.get_submodule("encoder.layer.0.attention.self.value").weight.data[16:32] = 0.0


def _pruned(model: nn.Module) -> None:
    """Writes zeros to 3 % of each matrix, so that the samples of some matrices are as they were."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_((torch.rand(parameter.shape) > 0.03).to(parameter.dtype))


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "AdamW": _step(torch.optim.AdamW),
    "AdamW fused": _step(torch.optim.AdamW, fused=True),
    "SGD fused": _step(torch.optim.SGD, 1.0, fused=True),
    "Adagrad fused": _step(torch.optim.Adagrad, fused=True),
    "small step fused": _step(torch.optim.AdamW, 1e-5, fused=True),
    ".data": _ema,
    "NumPy": _numpy,
    "foreach": _foreach,
    "DLPack": _dlpack,
    "query": _one_linear("encoder.layer.0.attention.self.query"),
    "down": _one_linear("encoder.layer.1.output.dense"),
    "bias": _one_bias,
    "head": _one_head,
    "pruned": _pruned,
}


def first(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def make(kind: Any = fastbert.BertModel, **options: Any) -> Any:
    torch.manual_seed(1)
    return kind(fastbert.BertConfig(**SIZES), **options).eval()


def check(model: Any, run: Callable[[Any], Tensor], write: Callable[[nn.Module], None], inner: Any = None) -> None:
    """A copy, which has nothing derived, gives the same bits after the write."""
    with torch.no_grad():
        before = run(model)
        assert torch.equal(run(model), before)
    torch.manual_seed(2)
    write(model if inner is None else inner)
    with torch.no_grad():
        after = run(model)
        assert not torch.equal(after, before)
        assert torch.equal(after, run(copy.deepcopy(model)))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("way", ["one call", "by operations", "bfloat16", "torch"])
def test_own_model(way: str, write: Callable[[nn.Module], None]) -> None:
    """Catches a mixture of old and new weights in one of the ways that a model runs on a CPU."""
    model = make(backend="torch" if way == "torch" else "auto")
    if way == "bfloat16":
        model.bfloat16()
        if write in (_numpy, WRITES["small step fused"], WRITES["SGD fused"]):
            pytest.skip("NumPy has no bfloat16, so small a step changes nothing in it, and PyTorch's fused SGD neither")
    check(model, lambda m: m(IDS, output_hidden_states=way == "by operations")[0], write)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_accelerated_model(write: Callable[[nn.Module], None]) -> None:
    """Catches stale weights of a model of transformers, whose optimizer is fused by default."""
    model = fastbert.accelerate(copy.deepcopy(theirs("BertModel", **SIZES)).float())
    check(model, lambda m: m(IDS)[0], write)


@pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))
@pytest.mark.parametrize("name", [".data", "NumPy", "down", "bias", "head", "pruned"])
def test_8_bits(name: str) -> None:
    """Catches 8-bit weights of the C++ kernels that are those of before the write."""
    check(make(precision="int8"), lambda m: m(IDS)[0], WRITES[name])


@pytest.mark.parametrize("name", [".data", "NumPy", "down", "head", "pruned"])
def test_emulation_of_8_bits(name: str) -> None:
    """Catches 8-bit weights of the emulation, or of the Triton kernels, that outlive a write."""
    check(make(precision="int8", backend="torch"), lambda m: m(IDS)[0], WRITES[name])


@pytest.mark.parametrize("name", ["AdamW fused", ".data", "NumPy"])
def test_heads(name: str) -> None:
    """Catches packed weights of a pooler or a classifier, which the encoder knows nothing of."""
    check(make(fastbert.BertForSequenceClassification), lambda m: m(IDS.repeat(4, 1)).logits, WRITES[name])
    check(make(fastbert.BertForMaskedLM), lambda m: m(IDS).logits, WRITES[name])


@pytest.mark.parametrize("name", [".data", "NumPy", "query", "head"])
def test_graph_keeps_its_memory(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a graph that reads the fused matrix of before, or a capture for numbers that lie where they lay."""
    if device.type != "cpu":
        pytest.skip("a stand-in for CUDA graphs, on the CPU")
    captures = []

    class StandIn:
        def begin(self, memory: Any) -> None: ...
        def end(self) -> None: ...
        def finish(self) -> None: ...

        def capture(self, function: Callable[[], None]) -> Any:
            captures.append(1)
            return type("Replay", (), {"replay": lambda self: function()})()

    monkeypatch.setattr(capture, "capturer", lambda device: StandIn())
    model = make(backend="triton", strict=True)
    cu_seqlens = torch.tensor([0, 8, 16], dtype=torch.int32)
    check(model, lambda m: m.forward_packed(IDS.flatten(), cu_seqlens), WRITES[name])
    assert len(captures) == 2  # of the model and of its copy


@pytest.mark.parametrize("name", ["AdamW fused", ".data", "head", "pruned"])
def test_where_a_look_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights on a GPU, looked at once a call and not at each use, that are not followed."""
    monkeypatch.setattr(silent_writes, "waits", lambda device: True)
    monkeypatch.setattr(cpu.library, "load", lambda: (None, "as on a GPU"))
    check(make(backend="torch"), lambda m: m(IDS)[0], WRITES[name])
    encoder = _sentence_encoder("torch")
    check(encoder, _vectors, WRITES[name], encoder.model) if name != "AdamW fused" else None


def test_gradient_caching_in_training_mode() -> None:
    """Catches something derived that a pass without gradients before each step finds again after the step."""
    model = make().train()
    for _ in range(3):
        with torch.no_grad():
            now = model(IDS)[0]
            assert torch.equal(now, copy.deepcopy(model)(IDS)[0])
        _step(torch.optim.AdamW, fused=True)(model)
    derived = [part.derived for part in model.modules() if hasattr(part, "derived")]
    assert len(derived) == 2 and all(each.tensors() == [] for each in derived)


def test_nothing_is_packed_in_training_mode() -> None:
    """Catches a copy of a weight that training leaves behind."""
    from fastbert.ops import packed_linear

    model = make().train()
    with torch.no_grad():
        model(IDS)
    assert not any(parameter in packed_linear._packed for parameter in model.parameters())


def _sentence_encoder(backend: str = "auto") -> fastbert.SentenceEncoder:
    tokenizer = fastbert.Tokenizer.train(["how to sort a list of numbers"] * 3, vocab_size=90)
    return fastbert.SentenceEncoder(make(backend=backend), tokenizer)


def _vectors(encoder: Any) -> Tensor:
    vectors: Tensor = encoder.encode(["how to sort", "a list"], convert_to_tensor=True)
    return vectors


@pytest.mark.parametrize("name", [".data", "NumPy", "down"])
def test_sentence_encoder(name: str) -> None:
    """Catches vectors of weights as they were at the first call."""
    encoder = _sentence_encoder()
    check(encoder, _vectors, WRITES[name], encoder.model)


def test_another_model_keeps_what_it_has() -> None:
    """Catches a teacher whose weights are packed again after each step of a student."""
    teacher, student = make(), make()
    with torch.no_grad():
        teacher(IDS)
        kept = teacher.engine.cpu_encoder._kept
        _step(torch.optim.AdamW, fused=True)(student)
        teacher(IDS)
    assert teacher.engine.cpu_encoder._kept is kept


def test_eval_follows_what_cannot_be_seen() -> None:
    """Catches one number, written beside the sample, that eval() does not bring in."""
    model = make()
    value: Any = model.encoder.layer[0].attention.self.value
    with torch.no_grad():
        before = model(IDS)[0]
        value.weight.data[1, 2] += 1.0
        assert torch.equal(model(IDS)[0], before), "seen after all: the documentation may promise more"
        model.eval()
        assert torch.equal(model(IDS)[0], copy.deepcopy(model)(IDS)[0]) and not torch.equal(model(IDS)[0], before)


# The sample


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=COMPILED), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8,
                                   torch.complex64, torch.bool])  # fmt: skip
def test_samples(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a number that is looked at somewhere else than where it lies, or a NaN that is never what it was."""
    if not compiled:
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "not compiled"))
    tensors = [torch.zeros(shape).to(dtype) for shape in ((), (1,), (7,), (3, 5), (40, 24), (0, 4), (2, 3, 4))]
    tensors += [torch.zeros(24, 40).to(dtype).t(), torch.zeros(64, 64).to(dtype)[::2, 1::3]]
    if dtype.is_floating_point and dtype.itemsize > 1:
        tensors[4].fill_(float("nan"))
    samples = Samples(tensors)
    before = samples.digest()
    assert samples.digest() == before
    for tensor in tensors:
        if tensor.numel():
            tensor.data.copy_(torch.ones(tensor.shape).to(dtype))
            now = samples.digest()
            assert now != before
            before = now


def test_the_sample_is_spread() -> None:
    """Catches rows or columns of a matrix, a sixth of it, in which nothing is looked at."""
    for shape in ((384, 384), (1536, 384), (384, 1536), (768, 768), (64, 64), (128, 64), (30522, 384)):
        matrix = torch.zeros(shape)
        rows, columns = np.unravel_index(silent_writes._places(matrix), shape)
        for places, size in ((rows, shape[0]), (columns, shape[1])):
            gaps = np.diff([-1, *sorted(set(places.tolist())), size])
            assert gaps.max() <= size // 6 + 1, (shape, sorted(set(places.tolist())))


@pytest.mark.parametrize(("hidden_size", "n_heads"), [(64, 4), (312, 12), (384, 12), (768, 12), (1024, 16)])
def test_every_head_is_looked_at(hidden_size: int, n_heads: int) -> None:
    """Catches a head, the last one of BERT-large above all, that an ablation writes to and no sample shows."""
    for shape in ((hidden_size, hidden_size), (4 * hidden_size, hidden_size), (hidden_size, 4 * hidden_size)):
        matrix, bias = torch.zeros(shape), torch.zeros(shape[0])
        samples = Samples([matrix]), Samples([bias])
        before = [each.digest() for each in samples]
        for dim in (0, 1):
            for rows in matrix.chunk(n_heads, dim):
                rows.fill_(1.0)
                assert samples[0].digest() != before[0]
                rows.zero_()
        for part in bias.chunk(n_heads):
            part.fill_(1.0)
            assert samples[1].digest() != before[1]
            part.zero_()


def test_sparse_weights() -> None:
    """Catches a look at all weights that fails for one without an address, which then runs nowhere."""
    model = make(backend="torch")
    dense = model.get_submodule("encoder.layer.0.output.dense")
    dense.weight = nn.Parameter(dense.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        assert model(IDS)[0].isfinite().all()


def test_what_has_no_numbers_is_left_out() -> None:
    """Catches an error for tensors that have no memory, or one of another kind."""
    odd = [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.empty(0), nn.Parameter(torch.ones(2))]
    odd.append(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    assert Writes(odd).none_since(odd)


def test_samples_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sample of tensors on a GPU that misses a write, with tensors that only say they are there."""
    monkeypatch.setattr(silent_writes, "_on_host", lambda tensor: False)
    tensors = [torch.zeros(40, 24), torch.zeros(5), torch.zeros(24, 40).t(), torch.zeros(6, dtype=torch.bfloat16)]
    samples = Samples(tensors)
    before = samples.digest()
    for tensor in tensors[:2] + tensors[3:]:
        tensor.data.add_(1.0)
        assert samples.digest() != before
        before = samples.digest()
