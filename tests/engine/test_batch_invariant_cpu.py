"""Batch invariance on CPUs: a text's bits are the same alone, in any batch, in any order, with any number of threads.

On the Triton kernels: test_batch_invariant.py.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import (
    BackendError,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CrossEncoder,
    SentenceEncoder,
    Tokenizer,
    ops,
)
from fastbert.diagnostics.explain.entry import explain
from fastbert.engine import cpu_encoder
from fastbert.models import heads
from fastbert.ops import Policy, dispatch, onednn
from fastbert.ops.packing import from_cu_seqlens
from fastbert.ops.pooling import MODES
from fastbert.pipelines.folder import _ACTIVATIONS, Dense, Dropout, LayerNorm, Normalize, apply
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of, docstrings, only_variant, rms_error, source_env

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

CPU = torch.device("cpu")
INVARIANT = Policy(batch_invariant=True)
DTYPES = (torch.float32, torch.bfloat16)
BATCHINGS = 200
LENGTHS = [1, 2, 3, 5, 9, 16, 17, 30, 64, 90]
ROWS = 300  # of which any 1 to MOST are to have the same bits alone
MOST = 40
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 200,
}  # fmt: skip
# What the encoder multiplies: a dtype, and a precision.
KINDS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int8")]
TORCH = {"backend": "torch"}
EACH_KIND = pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)


def skip_without(dtype: torch.dtype, precision: str | None = None) -> None:
    if not cpu.multiplies(dtype):
        pytest.skip(f"the kernels do not multiply {dtype} here")
    if precision is not None and cpu.no_int8() is not None:
        pytest.skip(str(cpu.no_int8()))


def make(
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    kind: Any = BertModel,
    how: Any = None,
    **sizes: Any,
) -> Any:
    """A batch-invariant model, or what `how` says, with weights that make rows differ."""
    torch.manual_seed(1)
    model = kind(BertConfig(**{**SIZES, **sizes}), **({"batch_invariant": True} if how is None else how),
                 precision=precision)  # fmt: skip
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.eval().to(dtype)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(cpu.VARIANTS))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each library that was compiled and that the processor can run, as if it were the best."""
    with only_variant(request.param):
        why_not = cpu.unavailable()
        if why_not is not None:
            pytest.skip(f"{request.param}: {why_not}")
        yield request.param


def assert_rows_are_alone(function: Callable[[slice], Tensor]) -> None:
    """function(rows) has the same bits for some rows as for all of them, with one thread and with two."""
    torch.set_num_threads(1)
    everything = function(slice(0, ROWS))
    assert everything.isfinite().all()
    for n_threads, counts in ((1, range(1, MOST + 1)), (2, (1, 2, 3, 7, 8, 13, 40))):
        torch.set_num_threads(n_threads)
        assert torch.equal(function(slice(0, ROWS)), everything), f"{n_threads} threads"
        for n_rows in counts:
            rows = slice(7, 7 + n_rows)
            assert torch.equal(function(rows), everything[rows]), f"{n_rows} rows, {n_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n_columns"), [(6, 2), (64, 131), (300, 33), (1536, 50)])
def test_rows_of_a_linear(k: int, n_columns: int, dtype: torch.dtype, variant: str) -> None:
    """A tile for few rows that adds up in another order, or fuses other products and sums, than that for many."""
    skip_without(dtype)
    x, residual = torch.randn(ROWS, k).to(dtype), torch.randn(ROWS, n_columns).to(dtype)
    weight, bias = cpu.pack_weight(torch.randn(n_columns, k).to(dtype)), torch.randn(n_columns).to(dtype)
    for activation, added in (("none", residual), ("gelu", None), ("gelu_tanh", None), ("relu", None)):
        assert_rows_are_alone(
            lambda rows, activation=activation, added=added: cpu.linear_forward(
                x[rows], weight, n_columns, bias, activation, None if added is None else added[rows]
            )
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n_columns"), [(64, 131), (1536, 50)])
def test_rows_of_a_linear_in_8_bits(k: int, n_columns: int, dtype: torch.dtype, variant: str) -> None:
    """A row whose scale, or whose share of the sums, comes from other rows."""
    if cpu.no_int8() is not None:
        pytest.skip(str(cpu.no_int8()))
    x, residual = torch.randn(ROWS, k).to(dtype), torch.randn(ROWS, n_columns).to(dtype)
    data = torch.randint(-127, 128, (n_columns, k), dtype=torch.int8)
    weight = cpu.pack_int8(data, torch.rand(n_columns) / 100, torch.randn(n_columns))

    def multiply(rows: slice, activation: str, rotated: bool) -> Tensor:
        q, affine = cpu.quantize_forward(x[rows], rotated)
        return cpu.linear_int8_forward(q, affine, weight, dtype, activation, residual[rows])

    for activation, rotated in (("none", True), ("gelu", False), ("gelu_tanh", True), ("relu", False)):
        assert_rows_are_alone(lambda rows, how=(activation, rotated): multiply(rows, *how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 48, 64])
def test_sequences_of_attention(head_size: int, dtype: torch.dtype, variant: str) -> None:
    """Queries or keys that are packed with a neighbour's, and a task cut by how many there are."""
    lengths = [1, 2, 7, 16, 17, 40, 0, 193, 250]
    qkv = torch.randn(sum(lengths), 3 * 2 * head_size).to(dtype)
    alone = [cpu.varlen_attention_forward(part, cu_seqlens_of([n]), 2, 0.2)
             for part, n in zip(qkv.split(lengths), lengths, strict=True)]  # fmt: skip
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        together = cpu.varlen_attention_forward(qkv, cu_seqlens_of(lengths), 2, 0.2)
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 384])
def test_sequences_of_the_pooling(size: int, dtype: torch.dtype, variant: str) -> None:
    """A mean whose partial sums start anywhere but at the text's first row; PyTorch's norms of a vector or of many."""
    lengths = [1, 2, 0, 15, 16, 17, 40, 100]
    hidden, each = torch.randn(sum(lengths), size).to(dtype), torch.tensor(lengths)
    for mode in MODES:
        for normalize in (False, True):
            how: dict[str, Any] = {"normalize": normalize, "out_dtype": torch.float32, "policy": INVARIANT}
            alone = [ops.pool(part, cu_seqlens_of([len(part)]), mode, **how) for part in hidden.split(lengths)]
            for n_threads in (1, 2):
                torch.set_num_threads(n_threads)
                together = ops.pool(hidden, cu_seqlens_of(lengths), mode, **how)
                assert torch.equal(together, torch.cat(alone)), mode
            theirs = {**how, "policy": Policy("torch")}
            exact = ops.pool(hidden.double(), cu_seqlens_of(lengths), mode, **{**theirs, "out_dtype": torch.float64})
            eager = ops.pool(hidden, cu_seqlens_of(lengths), mode, **theirs)
            assert_as_accurate(f"pooling {mode}", together[each > 0], eager[each > 0], exact[each > 0])
            assert (together[each == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 33, 384, 1000])
def test_rows_of_what_pytorch_runs(size: int, dtype: torch.dtype) -> None:
    """A PyTorch whose LayerNorm, or what it makes of embeddings, depends on how many rows there are."""
    x, residual, bias, ln_weight, ln_bias = (
        torch.randn(*shape, size).to(dtype) for shape in ((ROWS,), (ROWS,), (), (), ())
    )
    words, types, positions = (torch.randn(n, size).to(dtype) for n in (50, 2, 40))
    ids, type_ids, places = (torch.randint(n, (ROWS,)) for n in (50, 2, 40))
    how = {"policy": INVARIANT}
    assert_rows_are_alone(
        lambda rows: ops.bias_residual_layer_norm(x[rows], bias, residual[rows], ln_weight, ln_bias, 1e-12, **how)
    )
    assert_rows_are_alone(
        lambda rows: ops.embedding_layer_norm(
            ids[rows], type_ids[rows], places[rows], words, types, positions, ln_weight, ln_bias, 1e-12, **how
        )
    )
    assert_rows_are_alone(lambda rows: ops.bias_gelu(x[rows], bias, **how))


@pytest.mark.parametrize("name", ["Tanh", "GELU", "Sigmoid", "softmax"])
@pytest.mark.parametrize("size", [1, 3, 33])
def test_rows_of_functions(size: int, name: str) -> None:
    """The last elements of a tensor, which PyTorch computes one at a time and by another formula than whole vectors."""
    function = (lambda x: x.softmax(1)) if name == "softmax" else _ACTIVATIONS[name]
    x = torch.randn(ROWS, size)
    assert_rows_are_alone(lambda rows: ops.elementwise(function, x[rows], policy=INVARIANT))
    torch.testing.assert_close(ops.elementwise(function, x, policy=INVARIANT), function(x), rtol=1e-5, atol=1e-6)
    assert ops.elementwise(function, x[:0], policy=INVARIANT).shape == (0, size)
    assert torch.equal(ops.elementwise(function, x), function(x))  # at once, without the mode


def run_packed(model: Any, texts: list[Tensor], keep_states: bool = False) -> list[Tensor]:
    """Of each text, the last hidden state, or with keep_states all, and the vector of the pooler."""
    lengths = [len(text) for text in texts]
    batch = from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), CPU)
    with torch.inference_mode():
        states = model.encode_packed(batch, torch.cat(texts), keep_states=keep_states)
        pooled = model.pooler(states[-1], batch, model.policy)
    each = torch.stack(states, 1).flatten(1).split(lengths)
    return [torch.cat([own.flatten(), vector]) for own, vector in zip(each, pooled, strict=True)]


def assert_invariant(model: Any, batchings: int, keep_states: bool = False, lengths: list[int] = LENGTHS) -> None:
    """Each text gives the same bits in random batches, in any order and with any number of threads, as alone."""
    torch.manual_seed(2)
    texts = [torch.randint(0, model.config.vocab_size, (n,)) for n in lengths]
    torch.set_num_threads(1)
    alone = [run_packed(model, [text], keep_states)[0] for text in texts]
    assert all(own.isfinite().all() for own in alone)
    generator = random.Random(0)
    for _ in range(batchings):
        chosen = generator.choices(range(len(lengths)), k=generator.randint(1, 6))
        torch.set_num_threads(2 if generator.random() < 0.1 else 1)
        for i, own in zip(chosen, run_packed(model, [texts[i] for i in chosen], keep_states), strict=True):
            assert torch.equal(own, alone[i]), f"text {i} of {lengths[i]} tokens differs in the batch {chosen}"


@EACH_KIND
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_bits_do_not_depend_on_the_batch(
    keep_states: bool, dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch on the number of rows, a product of PyTorch's or oneDNN's: 200 random batchings of each path."""
    skip_without(dtype, precision)
    for module, name in ((F, "linear"), (onednn, "linear")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("a linear of PyTorch's or oneDNN's"))
    assert_invariant(make(dtype, precision), BATCHINGS, keep_states)


def test_what_the_mode_changes() -> None:
    """A test that could not fail: without the mode the linears of few rows are PyTorch's, whose sums are others."""
    with pytest.raises(AssertionError, match="differs in the batch"):
        assert_invariant(make(how={}), 20)


@EACH_KIND
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_without_the_mode_within_the_bound(keep_states: bool, dtype: torch.dtype, precision: str | None) -> None:
    """Without the mode, a text that is less exact alone than in a batch, or the other way round."""
    skip_without(dtype, precision)
    model, eager, exact = (make(*how) for how in ((dtype, precision, BertModel, {}), (dtype, None, BertModel, TORCH),
                                                  (torch.float64, None, BertModel, TORCH)))  # fmt: skip
    exact.load_state_dict(eager.state_dict())
    texts = [torch.randint(0, 101, (n,)) for n in LENGTHS]

    def run(model: Any, texts: list[Tensor]) -> Tensor:
        return torch.cat([own[: -SIZES["hidden_size"]] for own in run_packed(model, texts, keep_states)])

    alone = torch.cat([run(model, [text]) for text in texts])
    backwards = [run(model, [*texts[::-1], text])[-own:] for text, own in ((t, len(run(model, [t]))) for t in texts)]
    for found in (alone, run(model, texts), torch.cat(backwards)):
        if precision is not None:  # whose linears are the same to the bit anyway, the pooler's left aside
            assert torch.equal(found, alone)
        else:
            assert_as_accurate("hidden states", found, run(eager, texts), run(exact, texts))


def test_on_a_processor_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN, which multiplies bfloat16 there in tiles for each number of rows, and one call for short texts alone."""
    skip_without(torch.bfloat16)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "linear", lambda *args: pytest.fail("a linear of oneDNN's"))
    for keep_states in (False, True):
        assert_invariant(make(torch.bfloat16), 20, keep_states, [3, 40, 90])


@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_each_instruction_set(keep_states: bool, variant: str) -> None:
    """An encoder whose bits depend on the batch in the library for a processor with fewer instructions."""
    assert_invariant(make(), 20, keep_states)


@pytest.mark.parametrize("hidden_act", ["relu", "gelu_new"])
def test_other_activations(hidden_act: str) -> None:
    """An activation that PyTorch applies to a whole tensor."""
    for keep_states in (False, True):
        assert_invariant(make(hidden_act=hidden_act), 20, keep_states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 40])
def test_within_the_usual_error(n_tokens: int, dtype: torch.dtype) -> None:
    """Products of few rows, which PyTorch adds up in more chains, that are less exact than the policy wants."""
    skip_without(dtype)
    text = [torch.randint(0, 101, (n_tokens,))]
    eager, exact = make(dtype, how=TORCH), make(torch.float64, how=TORCH)
    exact.load_state_dict(eager.state_dict())
    for keep_states in (False, True):
        ours, theirs, reference = (run_packed(model, text, keep_states)[0] for model in (make(dtype), eager, exact))
        assert_as_accurate("model", ours, theirs, reference)


@EACH_KIND
@pytest.mark.parametrize("name", sorted(name for name in vars(heads) if name.startswith("BertFor")))
def test_heads(name: str, dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooler, a decoder or a classifier that takes PyTorch's product, or its tanh of a whole tensor."""
    skip_without(dtype, precision)
    model = make(dtype, precision, getattr(heads, name))
    monkeypatch.setattr(F, "linear", lambda *args: pytest.fail("a linear of PyTorch's"))
    shape = (5, 3, 6) if name == "BertForMultipleChoice" else (5, 6)
    ids = torch.randint(0, 101, shape)
    with torch.inference_mode():
        together = model(ids).to_tuple()
        for i in range(5):
            alone = model(ids[i : i + 1]).to_tuple()
            assert all(torch.equal(ours[0], theirs[i]) for ours, theirs in zip(alone, together, strict=True))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_the_family(family: str, dtype: torch.dtype) -> None:
    """A classifier of its own, with a tanh or a GELU, and embeddings that are projected."""
    skip_without(dtype)
    sizes: dict[str, Any] = {"model_type": family}
    if family == "electra":
        sizes["embedding_size"] = 32
    model = make(dtype, None, BertForSequenceClassification, **sizes)
    ids = torch.randint(3, 101, (9, 7))
    with torch.inference_mode():
        together = model(ids).logits
        assert all(torch.equal(model(ids[i : i + 1]).logits[0], together[i]) for i in range(9))


@pytest.mark.parametrize(
    "make_module",
    [*(lambda name=name: Dense(48, 20, activation=name) for name in _ACTIVATIONS), lambda: Dense(48, 20, bias=False),
     lambda: LayerNorm(48), Normalize, Dropout],
    ids=[*_ACTIVATIONS, "Dense without bias", "LayerNorm", "Normalize", "Dropout"],
)  # fmt: skip
def test_after_the_pooling(make_module: Callable[[], nn.Module]) -> None:
    """A module of a sentence encoder whose rows PyTorch computes together."""
    module = make_module().eval()
    x = torch.randn(ROWS, 48)
    with torch.inference_mode():
        assert_rows_are_alone(lambda rows: apply(module, x[rows], INVARIANT))
        assert rms_error(apply(module, x, INVARIANT), module(x)) < 1e-6
        assert rms_error(apply(module.to(torch.bfloat16), x, INVARIANT), module(x)) < 1e-6  # cast on each call
    with pytest.raises(BackendError, match="a module ReLU after the pooling cannot promise it"):
        apply(nn.ReLU(), x, INVARIANT)


@EACH_KIND
def test_sentence_encoder(dtype: torch.dtype, precision: str | None, minilm: Path) -> None:
    """A sentence encoder whose vectors depend on the batch, its order, the token budget or the threads."""
    skip_without(dtype, precision)
    how: dict[str, Any] = {"dtype": dtype, "precision": precision, "device": "cpu", "num_hidden_layers": 2}
    encoder = SentenceEncoder.from_pretrained(minilm, batch_invariant=True, **how)
    texts = ["", "Rain.", *docstrings(6)]
    for modes in ("mean", ("cls", "weightedmean", "max", "lasttoken", "mean_sqrt_len_tokens")):
        encoder.pooling.modes = (modes,) if isinstance(modes, str) else modes
        together = encoder.encode(texts, normalize_embeddings=True)
        torch.set_num_threads(1)
        for i, text in enumerate(texts):
            assert (encoder.encode(text, normalize_embeddings=True) == together[i]).all(), text
        torch.set_num_threads(2)
        backwards = encoder.encode(texts[::-1], normalize_embeddings=True, batch_size=3)[::-1]
        assert (backwards == together).all()


def test_auto_takes_bfloat16(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 for nothing where bfloat16 is batch-invariant, and bfloat16 where it is not."""
    monkeypatch.setattr(cpu_encoder, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype in DTYPES)
    how: dict[str, Any] = {"device": "cpu", "num_hidden_layers": 1, "batch_invariant": True}
    assert SentenceEncoder.from_pretrained(minilm, **how).dtype == torch.bfloat16
    assert SentenceEncoder.from_pretrained(minilm, dtype="float32", **how).dtype == torch.float32
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype == torch.float32)  # oneDNN on AMX alone has bfloat16
    assert SentenceEncoder.from_pretrained(minilm, **how).dtype == torch.float32


@pytest.mark.parametrize("n_labels", [1, 3])
def test_cross_encoder(n_labels: int) -> None:
    """Scores whose sigmoid or softmax depends on the place among the others."""
    texts = ["the river is wide", "a", "boats cross the river every morning, and come back full of fish", "Fish!"]
    tokenizer = Tokenizer.train(texts * 3, vocab_size=101)
    labels = {i: f"LABEL_{i}" for i in range(n_labels)}
    encoder = CrossEncoder(make(kind=BertForSequenceClassification, id2label=labels), tokenizer)
    pairs = [(a, b) for a in texts for b in texts] * 2
    for apply_softmax in (False, True):
        together = encoder.predict(pairs, apply_softmax=apply_softmax)
        torch.set_num_threads(1)
        for i, pair in enumerate(pairs):
            assert (encoder.predict(pair, apply_softmax=apply_softmax) == together[i]).all()
        torch.set_num_threads(2)
        backwards = encoder.predict(pairs[::-1], apply_softmax=apply_softmax, batch_size=5)[::-1]
        assert (backwards == together).all()


# Processors that have less: what ATen may use, as if the processor had nothing else.
RUN = """
import sys, torch, fastbert
sys.path.insert(0, "tests")
from test_batch_invariant_cpu import assert_invariant, make
from fastbert_kernels import cpu
try:
    fastbert.BertModel.from_pretrained(sys.argv[1], batch_invariant=True)
    for keep_states in (False, True):
        assert_invariant(make(), 30, keep_states)
    print("ran", cpu.instructions())
except fastbert.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("allowed", ["avx2", "default"])
def test_processors_with_less(allowed: str, minilm: Path) -> None:
    """A PyTorch that depends on the rows in its code for fewer instructions, and the mode without any kernel."""
    env = source_env(ATEN_CPU_CAPABILITY=allowed)
    command = [sys.executable, "-c", RUN, str(minilm)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if allowed == "avx2":
        assert done.stdout.strip() == "ran AVX2"
    else:
        assert "batch_invariant: needs the C++ kernels for CPUs" in done.stdout
        assert "the processor, or ATEN_CPU_CAPABILITY, has no AVX2" in done.stdout


def test_refused_without_the_kernels(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise on PyTorch's own products, whose bits depend on the number of rows."""
    ready = make(), make(precision="int8")
    monkeypatch.setattr(cpu, "_load", lambda: (None, "the C++ kernels were not compiled"))
    for cls in (BertModel, SentenceEncoder):
        for how in ({}, {"backend": "cpu"}, {"precision": "int8"}):
            with pytest.raises(
                BackendError, match="needs the C.. kernels for CPUs.*: the C.. kernels were not compiled"
            ):
                cls.from_pretrained(minilm, device="cpu", batch_invariant=True, **how)
    ids = torch.ones(1, 9, dtype=torch.int64)
    for model in ready:
        with pytest.raises(BackendError, match="were not compiled"), torch.no_grad():
            model(ids)
    with pytest.raises(BackendError, match="batch_invariant: pooling: the C.. kernels were not compiled"):
        ops.pool(torch.randn(3, 16), cu_seqlens_of([3]), policy=INVARIANT)


def test_refused_without_vnni(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unquantised path, or the emulation, in the place of 8-bit kernels that are not there."""
    monkeypatch.setattr(cpu, "no_int8", lambda: "the processor has no AVX-512 VNNI")
    with pytest.raises(BackendError, match="batch_invariant: needs the C.. kernels for CPUs.*no AVX-512 VNNI"):
        BertModel.from_pretrained(minilm, batch_invariant=True, precision="int8")
    with pytest.raises(BackendError, match="strict=True: the processor has no AVX-512 VNNI"), torch.no_grad():
        make(precision="int8")(torch.ones(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_refused_in_other_dtypes(dtype: torch.dtype, backend: str, minilm: Path) -> None:
    """PyTorch's products in a dtype that the kernels do not have."""
    with pytest.raises(BackendError, match=f"batch_invariant: the C.. kernels .* do not multiply {dtype}"):
        BertModel.from_pretrained(minilm, dtype=dtype, backend=backend, batch_invariant=True)
    model = make(how={"batch_invariant": True, "backend": backend}).to(dtype)
    with pytest.raises(BackendError, match=f"batch_invariant: linear: .* do not multiply {dtype}"), torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64))


def test_refused_without_bfloat16(minilm: Path) -> None:
    """oneDNN or PyTorch for bfloat16 on a processor without its instructions."""
    with only_variant("avx2"):
        with pytest.raises(
            BackendError, match="batch_invariant: the C.. kernels .AVX2. do not multiply torch.bfloat16"
        ):
            BertModel.from_pretrained(minilm, dtype="bfloat16", batch_invariant=True)
        with pytest.raises(BackendError, match="linear: .*do not multiply torch.bfloat16"), torch.no_grad():
            make(torch.bfloat16)(torch.ones(1, 9, dtype=torch.int64))


def test_refused_sizes() -> None:
    """PyTorch's attention or product for a size that the kernels do not have."""
    ids = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(BackendError, match="batch_invariant: attention: head size 24 is no multiple"), torch.no_grad():
        make(hidden_size=48)(ids)
    config = BertConfig(**{**SIZES, "hidden_size": 48})
    assert "head size 24 is no multiple" in str(cpu_encoder.invariant_obstacle(config, torch.float32))
    skip_without(torch.bfloat16)
    config = BertConfig(**{**SIZES, "intermediate_size": 97})
    assert "there are 97 features" in str(cpu_encoder.invariant_obstacle(config, torch.bfloat16))
    assert cpu_encoder.invariant_obstacle(config, torch.float32) is None
    with pytest.raises(BackendError, match="batch_invariant: linear: .* there are 97 features"), torch.no_grad():
        make(torch.bfloat16, intermediate_size=97)(ids)


def test_refused_in_training() -> None:
    """Gradients, which go through PyTorch's products, and dropout, which is drawn for a batch."""
    ids, model = torch.ones(1, 9, dtype=torch.int64), make()
    with pytest.raises(BackendError, match="batch_invariant: linear: gradients are needed .torch.no_grad"):
        model(ids)
    with pytest.raises(BackendError, match=r"batch_invariant: embedding: dropout \(p = 0.1\)"), torch.no_grad():
        model.train()(ids)
    x = torch.randn(9, 3 * 64, requires_grad=True)
    with pytest.raises(BackendError, match="batch_invariant: attention: dropout"):
        ops.varlen_attention(x, from_cu_seqlens(cu_seqlens_of([9]), 9, CPU), 2, dropout_p=0.1, policy=INVARIANT)
    with pytest.raises(BackendError, match="batch_invariant: pooling: gradients are needed"):
        ops.pool(x, cu_seqlens_of([9]), policy=INVARIANT)
    with pytest.raises(BackendError, match="batch_invariant: layer_norm: dropout"):
        w = torch.randn(64)
        ops.linear_residual_layer_norm(x, torch.randn(64, 192), w, x[:, :64], w, w, 1e-12, dropout_p=0.1,
                                       policy=INVARIANT)  # fmt: skip


def test_refused_under_autocast() -> None:
    """Products that autocast makes PyTorch's in bfloat16."""
    ids, model, refused = torch.ones(1, 9, dtype=torch.int64), make(), "batch_invariant: linear: mixed dtypes"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendError, match=refused):
        model(ids)


def test_refused_where_a_module_is_called_as_it_is() -> None:
    """An adapter or a hook whose bits nothing is known of, and attention weights by the slow reference."""
    ids = torch.ones(1, 4, dtype=torch.int64)
    for path in ("encoder.layer.0.output.dense", "encoder.layer.0.attention.self.key", "pooler.dense",
                 "embeddings.word_embeddings"):  # fmt: skip
        for precision in (None, "int8"):
            if precision is not None and (path.startswith("pooler") or cpu.no_int8() is not None):
                continue
            model = make(precision=precision)
            model.get_submodule(path).register_forward_hook(lambda *args: None)
            with pytest.raises(BackendError, match="adapter"), torch.no_grad():
                model(ids)
    with pytest.raises(BackendError, match="strict=True"):
        make()(ids, output_attentions=True)


@pytest.mark.parametrize("how", [{"precision": "fp8"}, {"precision": "int8", "backend": "triton"}], ids=str)
def test_refused_in_8_bits_of_triton(how: dict[str, str]) -> None:
    """8-bit kernels of which nobody has promised anything, and their emulation in PyTorch."""
    with pytest.raises(ValueError, match="batch_invariant: not supported together with precision="):
        BertModel(BertConfig(**SIZES), batch_invariant=True, **how)
    q, weight = (ops.quantized.quantize(torch.randn(9, 64), how["precision"]) for _ in range(2))
    with pytest.raises(BackendError, match="batch_invariant: linear: neither the kernels in"):
        ops.quantized.linear(q, weight, None, torch.float32, policy=Policy(batch_invariant=True))
    model = make(precision="int8", how={"batch_invariant": True, "backend": "cpu"})
    model.policy = Policy("triton", batch_invariant=True)  # as it would be on a GPU
    with pytest.raises(BackendError, match="only those in C.. for CPUs promise it"), torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.int64))


def test_refused_when_traced() -> None:
    """A compiled or exported program, whose sums are what the compiler makes of them."""
    ids, model = torch.ones(1, 9, dtype=torch.int64), make()
    refused = "batch_invariant: embedding: torch.compile and torch.export would"
    with pytest.raises(Exception, match=refused):
        torch.export.export(model, (ids,), strict=False)
    with torch.no_grad(), pytest.raises(Exception, match=refused):
        torch.compile(model, backend="eager")(ids)


def test_refused_elsewhere() -> None:
    """A backend that is PyTorch under another name, and devices without any kernel."""
    with pytest.raises(ValueError, match="batch_invariant: expected backend 'auto', 'triton' or 'cpu', got 'torch'"):
        Policy("torch", batch_invariant=True)
    there = torch.device("mps")
    assert dispatch.decide("linear", INVARIANT, there, None).backend == "torch"
    with pytest.raises(BackendError, match="batch_invariant: linear: the tensors are on no GPU and no CPU"):
        dispatch.check_invariant("linear", INVARIANT, "torch")
    policy = Policy("cpu", batch_invariant=True)
    with pytest.raises(BackendError, match="strict=True: the tensors are on mps"):
        dispatch.choose("linear", policy.backend, policy.strict, there, None)
    for how, why in (
        ({"backend": "cpu"}, "backend 'cpu' was asked for"),
        ({"precision": "int8"}, "in 8 bits no others"),
    ):
        with pytest.raises(BackendError, match=why):
            BertModel.from_pretrained("nowhere", device="cuda", batch_invariant=True, **how)


def test_explain_shows_the_mode() -> None:
    """A report that shows PyTorch's products, or nothing of what is refused."""
    model = make(kind=BertForTokenClassification)
    report = explain(model)
    assert report.batch_invariant and report.strict and not any(row.raises for row in report.rows)
    kernels = {row.kernel for row in report.rows if row.op in ("linear", "attention")}
    assert all(kernel.startswith("fastbert_kernels.cpu") for kernel in kernels)
    assert any("with gradients running raises BackendError" in note for note in report.notes)
    assert any(note.startswith("one call: without gradients") for note in report.notes)
    refused = explain(model, dtype="float16")
    assert all(row.raises == (row.op in ("linear", "attention")) for row in refused.rows)
    assert "batch_invariant: the C++ kernels" in str(refused) and json.dumps(refused.to_dict())
    trained = explain(model.train())
    assert {row.op for row in trained.rows if row.raises} == {"embedding", "attention", "layer_norm"}
    on_gpu = explain(make(precision="int8"), arch=90)
    assert any("running raises BackendError: batch_invariant" in note for note in on_gpu.notes)


def test_explain_of_a_sentence_encoder(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules after the pooling that are shown as called, or oneDNN on a processor with AMX."""
    encoder = SentenceEncoder.from_pretrained(minilm, device="cpu", batch_invariant=True, num_hidden_layers=1)
    encoder.tail.extend([Dense(384, 20), Dropout()])
    rows = {row.module: row for row in explain(encoder).rows}
    assert [rows[name].backend for name in ("pooling", "tail.1", "tail.2")] == ["cpu", "cpu", "module"]
    assert all(rows[name].kernel.startswith("fastbert_kernels.cpu") for name in ("pooling", "tail.1"))
    skip_without(torch.bfloat16)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    products = [row for row in explain(encoder.to(torch.bfloat16)).rows if row.op == "linear"]
    assert products and all(row.kernel.startswith("fastbert_kernels.cpu") for row in products)
