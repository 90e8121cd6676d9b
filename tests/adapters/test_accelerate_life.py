"""An accelerated model in use is moved, cast, edited, hooked and resized, and its numbers follow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from accelerate_cases import ROWS, accelerated, check
from fastbert.adapters import counts
from helpers import assert_as_accurate
from model_cases import LENGTH, VOCAB, assert_close, in_dtype, make_batch, run, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["to", "method"])
def test_casts(dtype: torch.dtype, way: str) -> None:
    """Catches weights of the old dtype that are kept, and one dtype for another."""
    model = accelerated()
    reference = run(fastbert.restore(in_dtype(copy.deepcopy(model), dtype).double()), make_batch())[0]
    method = {torch.float32: model.float, torch.bfloat16: model.bfloat16, torch.float16: model.half}[dtype]
    model = model.to(dtype) if way == "to" else method()
    output = run(model, make_batch())[0]
    eager = run(fastbert.restore(copy.deepcopy(model)), make_batch())[0]
    assert_as_accurate("cast", output[ROWS], eager[ROWS], reference[ROWS])
    assert counts(model) == {"fastbert": 2}


def test_autocast_gives_the_dtypes_of_before() -> None:
    """Catches outputs of another dtype under autocast than transformers gives."""
    model = accelerated(dtype=torch.float32)
    reference = run(fastbert.restore(copy.deepcopy(model)).double(), make_batch())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, eager = run(model, make_batch())[0], run(fastbert.restore(copy.deepcopy(model)), make_batch())[0]
    assert output.dtype == eager.dtype
    assert_as_accurate("autocast", output[ROWS], eager[ROWS], reference[ROWS])


def test_weights_are_edited_in_place_and_replaced() -> None:
    """Catches a fused matrix or a packed weight that outlives the numbers it was made of."""
    model = accelerated()
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.query.weight.mul_(2)
    check(model, 2)
    model.load_state_dict(copy.deepcopy(theirs("BertModel", initializer_range=0.5).state_dict()))
    check(model, 3)
    attention.key = nn.Linear(32, 32, dtype=torch.float64)
    check(model, 4)
    attention.value.weight = nn.Parameter(torch.randn(32, 32, dtype=torch.float64))
    check(model, 5)
    attention.value.weight.data.mul_(3)  # which nothing counts
    model.eval()
    check(model, 6)
    attention.query.weight.requires_grad_(False).data += 1
    model.train().eval()
    check(model, 7)


def test_moves_that_move_nothing_keep_everything() -> None:
    """Catches a `.to(device)` that moves nothing, as CrossEncoder calls it, and drops graphs and packed weights."""
    model = accelerated("BertForMaskedLM")
    state = model.bert.__dict__["_fastbert"]
    before = state.encoder(model.bert)
    model.to("cpu").to(torch.float64)
    assert state.encoder(model.bert) is before
    model.to(torch.float32)
    assert state.encoder(model.bert) is not before


def test_layers_are_dropped_and_parts_replaced_by_unknown_ones() -> None:
    """Catches layers that still run after they were removed, and a foreign module that is passed over."""
    model = accelerated()
    model.encoder.layer = model.encoder.layer[:1]
    check(model, 2)
    assert len(run(model, make_batch(), output_hidden_states=True).hidden_states) == 2

    class Twice(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return 2 * x

    places = ("encoder.layer.0.output", "LayerNorm"), ("encoder.layer.0.attention", "output"), ("", "pooler")
    for path, name in places:
        model = accelerated()
        setattr(model.get_submodule(path), name, Twice())
        run(model, make_batch())
        reason = f"{path}.{name}".lstrip(".")
        assert any(reason in key for key in counts(model)), counts(model)
        check(model, {**counts(model), list(counts(model))[-1]: 2}, bound=0.0)


def test_hooks_and_patched_forwards_inside_are_seen() -> None:
    """Catches a hook that no longer fires, or fires on packed tokens where it expects (B, S, H)."""
    for path in (
        "encoder",
        "encoder.layer.1",
        "encoder.layer.0.attention.self.query",
        "embeddings.LayerNorm",
        "pooler",
    ):
        model = accelerated()
        shapes: list[Any] = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, x, y, s=shapes: s.append(x[0].dim()))
        run(model, make_batch())
        assert shapes == [3]
        handle.remove()
        run(model, make_batch())
        assert counts(model) == {"fastbert": 2, "a module inside has hooks": 1}
    model = accelerated()
    fired: list[Any] = []
    model.register_forward_hook(lambda *_: fired.append(1))
    model.register_forward_pre_hook(lambda *_: fired.append(2))
    run(model, make_batch())
    assert fired == [2, 1] and counts(model) == {"fastbert": 2}  # around the whole model they fire as ever
    layer = model.encoder.layer[0]
    before = layer.forward
    layer.forward = lambda *args, **kwargs: before(*args, **kwargs)
    run(model, make_batch())
    assert counts(model)["a module inside the encoder has its own forward"] == 1


def test_default_ids_that_were_changed() -> None:
    """Catches buffers of default positions and types that the original reads and we do not."""
    for name in ("position_ids", "token_type_ids"):
        model = accelerated()
        getattr(model.embeddings, name).add_(1)
        run(model, make_batch())
        assert counts(model) == {"fastbert": 1, f"embeddings.{name} differs from that of a new model": 1}
        setattr(model.embeddings, name, getattr(model.embeddings, name) - 1)
        check(model, {**counts(model), "fastbert": 2})


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_embeddings_are_resized_and_stay_tied(name: str) -> None:
    """Catches ids of new words refused, or an encoder that reads the table of before."""
    model = accelerated(name)
    model.resize_token_embeddings(VOCAB + 7)
    embeddings = model.get_input_embeddings()
    assert embeddings.num_embeddings == VOCAB + 7
    if name != "BertModel":
        assert model.get_output_embeddings().weight is embeddings.weight
    batch = {**make_batch("none"), "input_ids": torch.full((4, LENGTH), VOCAB + 6)}
    output, expected = run(model, batch)[0], run(fastbert.restore(copy.deepcopy(model)), batch)[0]
    assert_close("new words", output, expected)
    assert counts(model) == {"fastbert": 2}
    with pytest.raises(IndexError, match="input_ids"):
        run(model, {"input_ids": torch.tensor([[VOCAB + 7]])})
    model.set_input_embeddings(nn.Embedding(VOCAB, 32, dtype=torch.float64))
    inner = getattr(model, "bert", model)
    assert_close("set", run(inner, make_batch("none"))[0], run(fastbert.restore(inner), make_batch("none"))[0])


def test_mixed_dtypes_run_as_before() -> None:
    """Catches an error where the original promotes dtypes."""
    model = accelerated(dtype=torch.bfloat16)
    model.encoder.layer[1].output.LayerNorm.float()
    check(model, {"fastbert": 1, "parameters are of more than one dtype": 1}, bound=0.0)


def test_explain_and_warmup() -> None:
    """Catches a report that does not know of the encoder inside, or of why calls run as before."""
    model = accelerated("BertForMaskedLM", dtype=torch.float32)
    run(model, make_batch(), output_attentions=True)
    report = fastbert.explain(model)
    assert report.calls == {"fastbert": 1, "attentions are requested": 1}
    assert "1 fastbert, 1 attentions are requested" in str(report) and report.model == "BertForMaskedLM"
    assert {row.op for row in report.rows} >= {"embedding", "linear", "attention", "layer_norm"}
    model.config.is_decoder = True
    assert "at present every call runs by the original code: decoder mode" in str(fastbert.explain(model))
    model.config.is_decoder = False
    assert fastbert.warmup(model).model == "BertForMaskedLM"
    assert str(fastbert.explain(model, arch=90, dtype="bfloat16")).count("triton") > 3
    fastbert.restore(model)
    with pytest.raises(TypeError, match="accelerated"):
        fastbert.explain(model)


def test_backend_and_options() -> None:
    """Catches options that are dropped, by accelerate, by a second one, or by a copy."""
    model = accelerated(dtype=torch.float32)
    for backend in ("torch", "cpu"):
        fastbert.accelerate(model, backend=backend, cuda_graphs=False)
        twin = copy.deepcopy(model)
        for each in (model, twin):
            report = fastbert.explain(each)
            assert report.backend == backend and {row.backend for row in report.rows} == {backend}
            state = each.__dict__["_fastbert"]
            assert not state.encoder(each).model.cuda_graphs


def test_verify(minilm: Any) -> None:
    """Catches a model whose error cannot be measured once it is accelerated."""
    model = fastbert.accelerate(transformers.AutoModel.from_pretrained(minilm).eval())
    report = fastbert.verify(model, [[101, 7592, 2088, 102], [101, 7592, 102]])
    assert report.ok and "BertModel" in str(report)
