"""A text has the same bits alone, in any batch, in any order and with any number of threads on a CPU.

On the Triton kernels: test_batch_invariant.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import (
    BertForSequenceClassification,
    BertModel,
    CrossEncoder,
    SentenceEncoder,
    Tokenizer,
)
from fastbert.engine import cpu_encoder
from fastbert.models import tasks
from fastbert.ops import onednn
from fastbert_kernels import cpu
from helpers import assert_as_accurate, docstrings, source_env
from invariance_cases import DTYPES, LENGTHS, SIZES, assert_invariant, make, run_packed, skip_without

pytestmark = [
    pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle())),
    pytest.mark.usefixtures("number_of_threads"),
]


BATCHINGS = 200
# What the encoder multiplies: a dtype, and a precision.
KINDS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int8")]
TORCH = {"backend": "torch"}
EACH_KIND = pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)


@EACH_KIND
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_bits_do_not_depend_on_the_batch(
    keep_states: bool, dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a switch on the number of rows, or a product of PyTorch's or oneDNN's, on either path."""
    skip_without(dtype, precision)
    for module, name in ((F, "linear"), (onednn, "linear")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("a linear of PyTorch's or oneDNN's"))
    assert_invariant(make(dtype, precision), BATCHINGS, keep_states)


def test_what_the_mode_changes() -> None:
    """Catches tests of the mode that cannot fail, because the bits are the same without it."""
    with pytest.raises(AssertionError, match="differs in the batch"):
        assert_invariant(make(options={}), 20)


@EACH_KIND
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_without_the_mode_within_the_bound(keep_states: bool, dtype: torch.dtype, precision: str | None) -> None:
    """Catches a text that, without the mode, is less exact alone than in a batch or the other way round."""
    skip_without(dtype, precision)
    model, eager = make(dtype, precision, BertModel, {}), make(dtype, None, BertModel, TORCH)
    exact = make(torch.float64, None, BertModel, TORCH)
    exact.load_state_dict(eager.state_dict())
    texts = [torch.randint(0, 101, (n,)) for n in LENGTHS]

    def run(model: Any, texts: list[Tensor]) -> Tensor:
        return torch.cat([own[: -SIZES["hidden_size"]] for own in run_packed(model, texts, keep_states)])

    alone = torch.cat([run(model, [text]) for text in texts])
    backwards = [run(model, [*texts[::-1], text])[-own:] for text, own in ((t, len(run(model, [t]))) for t in texts)]
    for states in (alone, run(model, texts), torch.cat(backwards)):
        if precision is not None:  # whose linears are the same to the bit anyway, the pooler's left aside
            assert torch.equal(states, alone)
        else:
            assert_as_accurate("hidden states", states, run(eager, texts), run(exact, texts))


def test_on_a_processor_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches oneDNN's tiles for each number of rows, or one call for short texts alone, on a processor with AMX."""
    skip_without(torch.bfloat16)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    monkeypatch.setattr(onednn, "linear", lambda *args: pytest.fail("a linear of oneDNN's"))
    for keep_states in (False, True):
        assert_invariant(make(torch.bfloat16), 20, keep_states, [3, 40, 90])


@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "operations"])
def test_each_instruction_set(keep_states: bool, variant: str) -> None:
    """Catches an encoder whose bits depend on the batch in the library for a processor with fewer instructions."""
    assert_invariant(make(), 20, keep_states)


@pytest.mark.parametrize("hidden_act", ["relu", "gelu_new"])
def test_other_activations(hidden_act: str) -> None:
    """Catches an activation that PyTorch applies to a whole tensor."""
    for keep_states in (False, True):
        assert_invariant(make(hidden_act=hidden_act), 20, keep_states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 40])
def test_within_the_usual_error(n_tokens: int, dtype: torch.dtype) -> None:
    """Catches products of few rows, which PyTorch adds up in more chains, that are less exact than the policy wants."""
    skip_without(dtype)
    text = [torch.randint(0, 101, (n_tokens,))]
    eager, exact = make(dtype, options=TORCH), make(torch.float64, options=TORCH)
    exact.load_state_dict(eager.state_dict())
    for keep_states in (False, True):
        ours, theirs, reference = (run_packed(model, text, keep_states)[0] for model in (make(dtype), eager, exact))
        assert_as_accurate("model", ours, theirs, reference)


@EACH_KIND
@pytest.mark.parametrize("name", sorted(name for name in vars(tasks) if name.startswith("BertFor")))
def test_heads(name: str, dtype: torch.dtype, precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pooler, a decoder or a classifier that takes PyTorch's product, or its tanh of a whole tensor."""
    skip_without(dtype, precision)
    model = make(dtype, precision, getattr(tasks, name))
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
    """Catches a family's own classifier, with a tanh or a GELU, or projected embeddings, that depend on the batch."""
    skip_without(dtype)
    sizes: dict[str, Any] = {"model_type": family}
    if family == "electra":
        sizes["embedding_size"] = 32
    model = make(dtype, None, BertForSequenceClassification, **sizes)
    ids = torch.randint(3, 101, (9, 7))
    with torch.inference_mode():
        together = model(ids).logits
        assert all(torch.equal(model(ids[i : i + 1]).logits[0], together[i]) for i in range(9))


@EACH_KIND
def test_sentence_encoder(dtype: torch.dtype, precision: str | None, minilm: Path) -> None:
    """Catches a sentence encoder whose vectors depend on the batch, its order, the token budget or the threads."""
    skip_without(dtype, precision)
    options: dict[str, Any] = {"dtype": dtype, "precision": precision, "device": "cpu", "num_hidden_layers": 2}
    encoder = SentenceEncoder.from_pretrained(minilm, batch_invariant=True, **options)
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
    """Catches float32 taken where bfloat16 is batch-invariant, or bfloat16 where it is not."""
    monkeypatch.setattr(cpu_encoder, "bfloat16_obstacle", lambda: None)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype in DTYPES)
    options: dict[str, Any] = {"device": "cpu", "num_hidden_layers": 1, "batch_invariant": True}
    assert SentenceEncoder.from_pretrained(minilm, **options).dtype == torch.bfloat16
    assert SentenceEncoder.from_pretrained(minilm, dtype="float32", **options).dtype == torch.float32
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: dtype == torch.float32)  # oneDNN on AMX alone has bfloat16
    assert SentenceEncoder.from_pretrained(minilm, **options).dtype == torch.float32


@pytest.mark.parametrize("n_labels", [1, 3])
def test_cross_encoder(n_labels: int) -> None:
    """Catches scores whose sigmoid or softmax depends on the place among the others."""
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
from invariance_cases import assert_invariant, make
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
    """Catches a PyTorch whose code for fewer instructions depends on the rows, or the mode without any kernel."""
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
