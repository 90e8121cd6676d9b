"""One text on a CPU takes few calls, has the bits of a batch, and follows changed weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastbert import BertConfig, BertModel, CrossEncoder, SentenceEncoder, Tokenizer, ops
from fastbert.engine.state import first_parameter
from fastbert.models.pretrained import any_in_training
from fastbert.models.tasks import BertForSequenceClassification
from fastbert.ops import packing
from fastbert.pipelines.modules import Dense, Normalize
from fastbert_kernels import cpu
from helpers import cu_seqlens_of, only_variant, tokens_of_calls

COMPILED = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))
TEXTS = ["how to sort a list of numbers", "a list", "numbers and more of it", "list of a list", "", "more to sort"]
TEXT = TEXTS[0]
MOST_CALLS = 220  # of Python functions, in `encode` of one text: 182 when this was written, 495 before
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=90)
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


DEBERTA: dict[str, Any] = {  # of the published ones, but for the buckets
    "relative_attention": True, "position_buckets": 8, "max_relative_positions": 16, "share_att_key": True,
    "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm", "position_biased_input": False,
}  # fmt: skip


def make(tail: Any = (), pooling: str = "mean", **config: Any) -> SentenceEncoder:
    torch.manual_seed(1)
    model = BertModel(BertConfig(**{**SIZES, **config}))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return SentenceEncoder(model, TOKENIZER, pooling, tail)


def calls_of(function: Callable[[], Any]) -> int:
    """How many Python functions are called, warmed up."""
    for _ in range(3):
        function()
    n_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return n_calls


@COMPILED
@pytest.mark.parametrize("family", [
    {}, {"model_type": "mpnet", "pad_token_id": 1}, {"model_type": "modernbert"}, {"model_type": "gte"},
    {"model_type": "nomic_bert", "hidden_act": "silu"},
    {"model_type": "deberta-v2", "type_vocab_size": 0, "extra": DEBERTA},
    {"model_type": "deberta-v2", "extra": {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}},
], ids=lambda family: family.get("model_type", "bert"))  # fmt: skip
@pytest.mark.parametrize("n_layers", [1, 6])
def test_few_calls(n_layers: int, family: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches work around the encoder that creeps back, or that grows with the number of layers."""
    encoder = make([Normalize()], num_hidden_layers=n_layers, **family)
    assert calls_of(lambda: encoder.encode(TEXT)) <= MOST_CALLS
    runs = tokens_of_calls(monkeypatch)
    encoder.encode(TEXT)
    assert runs == [encoder.last_timings.tokens]  # in one call, which is what was counted


@pytest.mark.parametrize("text", TEXTS)
def test_every_way_gives_the_same_bits(text: str) -> None:
    """Catches a way for one text that computes other numbers, or gives another type, than the way for several."""
    encoder = make([Normalize()])
    alone = encoder.encode(text)
    assert isinstance(alone, np.ndarray) and alone.shape == (32,) and alone.dtype == np.float32
    assert np.array_equal(encoder.encode([text])[0], alone)
    assert np.array_equal(next(encoder.encode_stream([text]))[0], alone)
    tensor = encoder.encode(text, convert_to_tensor=True)
    assert torch.equal(tensor, torch.from_numpy(alone)) and not tensor.is_inference()
    listed = encoder.encode([text], convert_to_numpy=False)
    assert isinstance(listed, list) and torch.equal(listed[0], tensor) and not listed[0].is_inference()
    assert np.array_equal(encoder.encode(text, truncate_dim=5), alone[:5])


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("output_value", ["sentence_embedding", "token_embeddings", None])
def test_order_of_texts(output_value: Any, batch_size: int | None) -> None:
    """Catches texts that come sorted, of which nothing is gathered, and that get another's tokens or place."""
    encoder, options = make(), {"output_value": output_value, "batch_size": batch_size, "convert_to_numpy": False}
    lengths = [len(TOKENIZER(text)["input_ids"]) for text in TEXTS]
    down = sorted(range(len(TEXTS)), key=lengths.__getitem__, reverse=True)
    assert down != list(range(len(TEXTS)))
    in_order = encoder.encode([TEXTS[i] for i in down], **options)
    shuffled = encoder.encode(TEXTS, **options)
    for place, i in enumerate(down):
        ours, other = in_order[place], shuffled[i]
        if output_value is None:
            assert torch.equal(ours["input_ids"], other["input_ids"])
            assert ours["input_ids"].tolist() == TOKENIZER(TEXTS[i])["input_ids"]
            ours, other = ours["token_embeddings"], other["token_embeddings"]
        assert torch.equal(ours, other)


@pytest.mark.parametrize("texts", [TEXT, [TEXT], TEXTS[:2], TEXTS[1::-1]], ids=str)
def test_vectors_are_the_callers(texts: Any) -> None:
    """Catches inference tensors, which autograd refuses, and arrays that are views of longer ones."""
    encoder, weight = make(), torch.ones(32, requires_grad=True)
    (encoder.encode(texts, convert_to_tensor=True) * weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert not encoder.encode(texts, convert_to_tensor=True).is_inference()
    array = encoder.encode(texts, truncate_dim=7)
    assert array.flags.c_contiguous and array.flags.writeable and array.shape[-1] == 7
    before = array.copy()
    encoder.encode(TEXTS)
    assert np.array_equal(array, before)


def _in_place(encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        encoder.model.encoder.layer[1].output.dense.weight.mul_(1.5)


def _embedding_in_place(encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight.mul_(1.5)


def _other_data(encoder: SentenceEncoder) -> None:
    bias = encoder.model.encoder.layer[0].attention.self.key.bias
    bias.data = torch.full_like(bias, 2.0)
    weight = encoder.model.encoder.layer[0].attention.output.LayerNorm.weight
    weight.data = weight.data * 2


def _other_parameter(encoder: SentenceEncoder) -> None:
    encoder.model.encoder.layer[0].attention.self.value.weight = nn.Parameter(torch.randn(32, 32))


def _other_module(encoder: SentenceEncoder) -> None:
    encoder.model.encoder.layer[1].intermediate.dense = nn.Linear(32, 48)


def _no_bias(encoder: SentenceEncoder) -> None:
    encoder.model.encoder.layer[1].intermediate.dense = nn.Linear(32, 48, bias=False)


def _other_layer(encoder: SentenceEncoder) -> None:
    layers = encoder.model.encoder.layer
    layers[0] = copy.deepcopy(layers[1])


def _state_dict(encoder: SentenceEncoder) -> None:
    encoder.model.load_state_dict({name: t * 1.2 for name, t in encoder.model.state_dict().items()})


def _training(encoder: SentenceEncoder) -> None:
    ids = torch.tensor([[1, 2, 3]])
    encoder.train()
    encoder.model(ids).last_hidden_state.square().sum().backward()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)


def _uncounted(encoder: SentenceEncoder) -> None:
    encoder.model.encoder.layer[0].output.dense.weight.data.mul_(1.5)
    encoder.eval()  # which is what the documentation asks for


def _adapter(encoder: SentenceEncoder) -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    layer = encoder.model.encoder.layer[0]
    layer.attention.output.dense = Adapter(layer.attention.output.dense)


def _hook(encoder: SentenceEncoder) -> None:
    encoder.model.encoder.layer[1].register_forward_hook(lambda module, inputs, output: 2 * output)


def _hook_before(encoder: SentenceEncoder) -> None:
    dense = encoder.model.encoder.layer[0].intermediate.dense
    dense.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def _patched(encoder: SentenceEncoder) -> None:
    dense = encoder.model.encoder.layer[0].intermediate.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight)


def _tail(encoder: SentenceEncoder) -> None:
    tail: Any = encoder.tail[0]
    with torch.no_grad():
        tail.linear.weight.mul_(2)


CHANGES = (_in_place, _embedding_in_place, _other_data, _other_parameter, _other_module, _no_bias, _other_layer,
           _state_dict, _training, _uncounted, _adapter, _hook, _hook_before, _patched, _tail)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_two_texts_are_noticed(change: Callable[[SentenceEncoder], None]) -> None:
    """Catches a vector made of the weights, or by the modules, of the call before."""
    encoder = make([Dense(32, 8)])
    before = [encoder.encode(TEXT) for _ in range(2)][1]
    change(encoder)
    after = encoder.encode(TEXT)
    plain = SentenceEncoder(copy.deepcopy(encoder.model), TOKENIZER, "mean", copy.deepcopy(encoder.tail))
    assert np.abs(after - before).max() > 1e-3
    assert np.array_equal(after, plain.encode(TEXT))


@COMPILED
@pytest.mark.parametrize("place", ["", "model", "model.encoder.layer.1.output.dropout", "tail.0"])
def test_training_mode_ends(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a module in training mode, of the model or after it, that is overlooked, and drops out."""
    encoder = make([nn.Dropout(0.9)], hidden_dropout_prob=0.9)
    before = encoder.encode(TEXT)
    encoder.get_submodule(place).train()
    runs = tokens_of_calls(monkeypatch)
    assert np.array_equal(encoder.encode(TEXT), before) and len(runs) == 1
    assert not any(module.training for module in encoder.modules())


def test_ids_beyond_the_table() -> None:
    """Catches ids beyond the table that the kernel would read with: one end of the range, or one among many."""
    encoder = make(vocab_size=20)
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 19, got"):
        encoder.encode(TEXT)
    for n in (1, 15, 16, 1000):
        for place in {0, n // 2, n - 1}:
            ids = torch.randint(0, 20, (n,))
            ids[place] = 19
            ops.check_ids(input_ids=(ids, 20))
            for bad in (20, -1, 2**40, -(2**63), 2**63 - 1):
                ids[place] = bad
                for some_ids in (ids, torch.stack([ids, ids], 1)[:, 0]):  # in order, and not
                    with pytest.raises(IndexError, match=f"input_ids: expected values from 0 to 19, got {bad}"):
                        ops.check_ids(input_ids=(some_ids, 20), token_type_ids=(torch.zeros(3, dtype=torch.int64), 2))
    assert cpu.obstacle() is not None or cpu.ids_outside(torch.tensor([3]), 3)


@COMPILED
@pytest.mark.parametrize("name", cpu.VARIANTS)
def test_ids_in_each_instruction_set(name: str) -> None:
    """Catches a loop that reads one id too many, or leaves one out, in the library for another processor."""
    with only_variant(name):
        if cpu.obstacle() is not None:
            pytest.skip(str(cpu.obstacle()))
        for n in range(40):
            ids = torch.full((n + 2,), -7)  # guards, which are outside
            ids[1:-1] = torch.arange(n) % 5
            within = ids[1:-1]
            assert not cpu.ids_outside(within, 5)
            for place in range(n):
                for bad in (5, -1, 2**62):
                    changed = ids.clone()
                    changed[1 + place] = bad
                    assert cpu.ids_outside(changed[1:-1], 5)


@pytest.mark.parametrize("lengths", [[], [0], [5], [3, 0, 4], [1] * 9], ids=str)
def test_batches_of_known_lengths(lengths: list[int]) -> None:
    """Catches offsets, positions or sizes that differ from those of the offsets that a caller gives."""
    device = torch.device("cpu")
    ours, other = (
        packing.from_lengths(lengths, device),
        packing.from_cu_seqlens(cu_seqlens_of(lengths), sum(lengths), device),
    )
    expected = torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int64)
    for batch in (ours, other):
        assert torch.equal(batch.cu_seqlens, cu_seqlens_of(lengths)) and batch.cu_seqlens.dtype == torch.int32
        assert torch.equal(batch.position_ids, expected) and batch.position_ids.dtype == torch.int64
        assert (batch.batch_size, batch.padded_length) == (len(lengths), max(lengths, default=0))


def test_first_parameter_and_modes() -> None:
    """Catches another parameter than the first, or a mode that is overlooked, where children may be None."""
    inner = nn.Sequential(nn.Dropout(), nn.Linear(2, 3, bias=False), nn.LayerNorm(3, elementwise_affine=False))
    inner.register_module("nothing", None)
    inner.register_parameter("none", None)
    outer = nn.ModuleList([nn.Identity(), inner, nn.Linear(3, 3)])
    for module in (outer, inner, make().model, make()):
        assert first_parameter(module) is next(module.parameters())
        assert any_in_training(module) == any(m.training for m in module.modules())
        assert not any_in_training(module.eval())
    inner[2].train()
    assert any_in_training(outer) and not any_in_training(outer[2])
    with pytest.raises(StopIteration):
        first_parameter(nn.Identity())


@pytest.mark.parametrize(
    "pairs", [[("a list", "numbers")], [("a list", "of"), ("more of it", "to sort a list"), ("a", "")]]
)
def test_pairs(pairs: list[tuple[str, str]]) -> None:
    """Catches pairs whose scores come back in another order, or segments that are lost on the way for one."""
    torch.manual_seed(1)
    model = BertForSequenceClassification(BertConfig(**SIZES, id2label={0: "like"}))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    encoder = CrossEncoder(model.eval(), TOKENIZER)
    scores = encoder.predict(pairs)
    for (first, second), score in zip(pairs, scores, strict=True):
        encoded = TOKENIZER(first, second, return_tensors="pt")
        with torch.no_grad():
            logits = model(**encoded).logits
        torch.testing.assert_close(torch.tensor(score), logits.sigmoid()[0, 0], rtol=1e-4, atol=1e-4)
        assert encoder.predict((first, second)) == pytest.approx(score, abs=1e-5)
