"""ModernBERT, Nomic and GTE run in one call of the C++ kernels, in floats and in 8 bits, as exactly as eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from family_cases import run, theirs, twin
from fastbert.engine import cpu_encoder
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of, only_variant, rms_error, tokens_of_calls
from model_cases import VOCAB, assert_close, generator, in_dtype, valid_of

pytestmark = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))

FAMILIES = ("modernbert", "nomic_bert", "gte")
FAMILY = pytest.mark.parametrize("family", FAMILIES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
INT8 = pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))
WINDOW = 6  # columns on either side in ModernBERT, of tests/family_cases.py
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 600}
# Around a window, around the queries of one task (192 of AVX-512), and of several texts.
LENGTHS = ([WINDOW, WINDOW + 1, WINDOW + 2], [4], [192 + WINDOW, 0, 1, 7], [391])


def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return twin(theirs(family, **SIZES), dtype=dtype, **options)


def ids_of(lengths: list[int]) -> Tensor:
    return torch.randint(1, VOCAB, (sum(lengths),), generator=generator(6))


def encode(model: Any, lengths: list[int], types: bool = False) -> Tensor:
    ids = ids_of(lengths)
    with torch.no_grad():
        return model.forward_packed(ids, cu_seqlens_of(lengths), ids % 2 if types else None)


def skip_without(dtype: torch.dtype) -> None:
    if not cpu.multiplies(dtype) or (dtype == torch.bfloat16 and cpu.has_amx()):
        pytest.skip(f"the kernel does not run {dtype} here")


@DTYPES
@FAMILY
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_as_accurate_as_eager(
    family: str, lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a gate and an activation exchanged, a norm or a base left out, a key beyond the window's edge."""
    skip_without(dtype)
    runs, types = tokens_of_calls(monkeypatch), family == "nomic_bert"
    ours = encode(make(family, dtype), lengths, types)
    assert runs == [sum(lengths)]
    eager = encode(make(family, dtype, backend="torch"), lengths, types)
    exact = encode(in_dtype(make(family, dtype, backend="torch"), torch.float64), lengths, types)
    assert_as_accurate(family, ours, eager, exact)


@FAMILY
def test_as_transformers(family: str) -> None:
    """Catches columns of a mask with holes that are taken for neighbours, and positions that are counted anew."""
    model = theirs(family, **SIZES)
    ours, mask = twin(model, dtype=torch.float32), torch.ones(3, 60, dtype=torch.long)
    mask[0, 2:50] = 0
    mask[1, :45] = 0
    batch = {"input_ids": ids_of([180]).view(3, 60), "attention_mask": mask}
    batch["position_ids"] = torch.arange(60).expand(3, -1) + 300
    with torch.no_grad():
        assert ours.engine.choose_arithmetic(ours, 64) is ours.engine.one_call
    valid = valid_of(mask)
    assert_close(family, run(ours, batch)[0][valid].double(), run(model, batch)[0][valid], 2e-5)


@FAMILY
def test_each_instruction_set(family: str) -> None:
    """Catches an encoder that is wrong in the library for a processor with fewer instructions."""
    model, eager = make(family), make(family, backend="torch")
    exact = encode(in_dtype(eager, torch.float64), [210, 7])
    for name in cpu.VARIANTS:
        with only_variant(name):
            if cpu.obstacle() is None:
                model.engine.cpu_encoder.clear()
                cpu_encoder.packed_linear.forget(model.parameters())
                assert_as_accurate(name, encode(make(family), [210, 7]), encode(eager, [210, 7]), exact)


@pytest.mark.parametrize("precision", [None, pytest.param("int8", marks=INT8)])
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "states"])
@DTYPES
@FAMILY
def test_bits_do_not_depend_on_the_batch(
    family: str, dtype: torch.dtype, keep_states: bool, precision: str | None
) -> None:
    """Catches a text whose bits depend on the others, their lengths, their order, or the number of threads."""
    if not cpu.multiplies(dtype):
        pytest.skip(f"the C++ kernels do not multiply {dtype} here")
    model = make(family, dtype, batch_invariant=True, precision=precision)
    lengths = [3, 70, 1, WINDOW + 1, 200, 193]
    texts, threads = ids_of(lengths).split(lengths), torch.get_num_threads()

    def states(texts: Any) -> list[Tensor]:
        batch = fastbert.ops.packing.from_lengths([len(text) for text in texts], torch.device("cpu"))
        with torch.no_grad():
            layers = model.encode_packed(batch, torch.cat(texts), keep_states=keep_states)
        return list(torch.stack(layers, 1).split([len(text) for text in texts]))

    try:
        together = states(texts)
        turned = states(texts[::-1])[::-1]
        torch.set_num_threads(3 - min(threads, 2))
        for text, mine, other in zip(texts, together, turned, strict=True):
            alone = states([text])[0]
            assert torch.equal(alone, mine) and torch.equal(alone, other)
    finally:
        torch.set_num_threads(threads)


@FAMILY
def test_follows_the_weights(family: str) -> None:
    """Catches a fused or packed weight that stays as it was when a parameter is written to or replaced."""
    model = make(family)
    part = model.encoder.layer[1]
    before = encode(model, [9, 5])
    linears = [part.attn.Wqkv, part.mlp.Wi] if family == "modernbert" else [part.self_attn.k_proj, part.mlp.up_proj]
    for linear in linears:
        for change in ("counted", "other", "silent"):
            with torch.no_grad():
                if change == "counted":
                    linear.weight.mul_(1.5)
                elif change == "other":
                    linear.weight = torch.nn.Parameter(linear.weight.flip(0).clone())
                else:
                    linear.weight.data.mul_(1.5)
                    model.eval()
            after, other = encode(model, [9, 5]), make(family, backend="torch")
            other.load_state_dict(model.state_dict())
            torch.testing.assert_close(after, encode(other, [9, 5]), rtol=2e-4, atol=2e-4)
            assert (after - before).abs().max() > 1e-3
            before = after


@pytest.mark.parametrize("settings", [
    {"attention_bias": True, "mlp_bias": True, "norm_bias": True}, {"hidden_activation": "silu"},
    {"local_attention": 0}, {"layer_types": ("sliding_attention",) * 4},
], ids=str)  # fmt: skip
def test_settings_of_modernbert(settings: dict[str, Any]) -> None:
    """Catches a bias that no default has and that is left out, an activation, or a window of one token."""
    model = theirs("modernbert", **SIZES, **settings)
    for precision, bound in ((None, 2e-5), ("int8", 0.05)):
        if precision is not None and cpu.int8_obstacle() is not None:
            continue
        ours = twin(model, dtype=torch.float32, precision=precision)
        with torch.no_grad():
            assert ours.engine.choose_arithmetic(ours, 64) is not ours.engine.modules
        expected = run(model, {"input_ids": ids_of([40])[None]})[0]
        assert rms_error(run(ours, {"input_ids": ids_of([40])[None]})[0], expected) < bound


# int8


@INT8
@DTYPES
@FAMILY
@pytest.mark.parametrize("lengths", [[4], [30, 0, 1, 7], [210]], ids=str)
def test_int8_is_no_worse_than_the_emulation(
    family: str, lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a gate whose weight is not rotated as its rows are, or a residual that is taken after its norm."""
    runs = tokens_of_calls(monkeypatch, "encoder_int8_forward")
    exact = encode(make(family, torch.float64, backend="torch"), lengths)
    emulated = encode(make(family, dtype, backend="torch", precision="int8"), lengths)
    ours = encode(make(family, dtype, precision="int8"), lengths)
    assert runs == [sum(lengths)] and ours.dtype == dtype
    assert 1e-4 < rms_error(ours, exact) <= 1.25 * rms_error(emulated, exact) + torch.finfo(dtype).eps


@INT8
@FAMILY
def test_int8_states_and_embeddings(family: str) -> None:
    """Catches states of the wrong layer or without their last norm, and embeddings that turn by no positions."""
    model, plain = make(family, precision="int8"), make(family, torch.float64, backend="torch")
    batch: Any = {"input_ids": ids_of([60]).view(3, 20), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    batch["attention_mask"][1, :15] = 0
    ours, exact = (run(each, batch, output_hidden_states=True) for each in (model, plain))
    assert torch.equal(run(model, batch).last_hidden_state, ours.last_hidden_state)
    assert len(ours.hidden_states) == len(exact.hidden_states)
    for mine, right in zip(ours.hidden_states, exact.hidden_states, strict=True):
        assert rms_error(mine, right) < 0.05
    embeds = model.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    again = run(model, {"inputs_embeds": embeds, **batch}).last_hidden_state
    assert rms_error(again, ours.last_hidden_state.double()) < 0.05


@INT8
@FAMILY
def test_int8_is_explained(family: str) -> None:
    """Catches a report that stops at what the emulation adds, or tells of another path."""
    report = fastbert.explain(make(family, precision="int8"))
    rows = [row for row in report.rows if row.op == "quantized_linear"]
    assert rows and {row.backend for row in rows} == {"cpu"}
    assert "one call: without gradients" in str(report)
