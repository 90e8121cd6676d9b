"""DeBERTa runs in one call of the C++ kernels, in floats and in 8 bits, as exactly as eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from family_cases import run, theirs, twin
from fastbert.engine import cpu_encoder
from fastbert_kernels import cpu
from helpers import assert_as_accurate, cu_seqlens_of, guarded, only_variant, rms_error, tokens_of_calls
from model_cases import VOCAB, assert_close, generator, in_dtype, valid_of

pytestmark = pytest.mark.skipif(cpu.obstacle() is not None, reason=str(cpu.obstacle()))

FARTHEST = 16  # columns, where buckets end
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "embedding_size": 64, "relative_attention": True, "position_buckets": 8,
    "max_relative_positions": FARTHEST, "share_att_key": True, "pos_att_type": "p2c|c2p", "norm_rel_ebd": "layer_norm",
    "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 600,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v3": SIZES,
    "v2-xlarge": {**SIZES, "conv_kernel_size": 3, "conv_act": "gelu"},
    "convolution in groups": {**SIZES, "conv_kernel_size": 11, "conv_groups": 4, "conv_act": "relu",
                              "norm_rel_ebd": "none", "intermediate_size": 64},
    "own projections": {**SIZES, "share_att_key": False, "position_biased_input": True, "type_vocab_size": 2},
    "one term": {**SIZES, "share_att_key": False, "position_buckets": -1, "pos_att_type": "c2p"},
    "narrow embeddings": {**SIZES, "pos_att_type": "p2c", "embedding_size": 20},
    "without distances": {**SIZES, "relative_attention": False},
}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
FEW_KINDS = pytest.mark.parametrize("kind", ["v3", "convolution in groups"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
INT8 = pytest.mark.skipif(cpu.int8_obstacle() is not None, reason=str(cpu.int8_obstacle()))
PRECISIONS = pytest.mark.parametrize("precision", [None, pytest.param("int8", marks=INT8)])
# Neighbours, texts without a token, around the farthest bucket, and around the queries of one task (192 of AVX-512).
LENGTHS = ([4], [3, 0, 1, 9, FARTHEST, FARTHEST + 1, FARTHEST + 2, 0], [193, 61, 37])


def make(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return twin(theirs("deberta-v2", **KINDS[kind]), dtype=dtype, **options)


def ids_of(lengths: list[int]) -> Tensor:
    return torch.randint(1, VOCAB, (sum(lengths),), generator=generator(6))


def encode(model: Any, lengths: list[int]) -> Tensor:
    ids = ids_of(lengths)
    with torch.no_grad():
        return model.forward_packed(ids, cu_seqlens_of(lengths), ids % 2 if model.config.type_vocab_size else None)


def skip_without(dtype: torch.dtype) -> None:
    if not cpu.multiplies(dtype) or (dtype == torch.bfloat16 and cpu.has_amx()):
        pytest.skip(f"the kernel does not run {dtype} here")


@DTYPES
@EVERY_KIND
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_as_accurate_as_eager(
    kind: str, lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a term, a scale or a table left out, a convolution beside the wrong layer or that reads another text."""
    skip_without(dtype)
    runs = tokens_of_calls(monkeypatch)
    ours = encode(make(kind, dtype), lengths)
    assert runs == [sum(lengths)]
    eager = encode(make(kind, dtype, backend="torch"), lengths)
    exact = encode(in_dtype(make(kind, dtype, backend="torch"), torch.float64), lengths)
    assert_as_accurate(kind, ours, eager, exact)


@pytest.mark.parametrize("text", [1, 2])
@pytest.mark.parametrize("kind", ["v3", "v2-xlarge"])
def test_few_tokens(kind: str, text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text without neighbours, whose one distance is 0, or a convolution that reads before the first row."""
    monkeypatch.setattr(cpu_encoder.packed_linear, "LEAST_ROWS", 1)
    runs, ids = tokens_of_calls(monkeypatch), ids_of([text])
    model = theirs("deberta-v2", **KINDS[kind])
    ours = run(twin(model, dtype=torch.float32), {"input_ids": ids[None]})[0]
    assert runs == [text]
    assert_close(kind, ours.double(), run(model, {"input_ids": ids[None]})[0], 2e-6)


@PRECISIONS
@pytest.mark.parametrize("kind", ["v2-xlarge", "convolution in groups", "own projections"])
def test_as_transformers(kind: str, precision: str | None) -> None:
    """Catches columns of a mask with holes that are taken for neighbours, in attention or in the convolution."""
    model = theirs("deberta-v2", **KINDS[kind])
    ours, mask = twin(model, dtype=torch.float32, precision=precision), torch.ones(4, 60, dtype=torch.long)
    mask[0, 2:50] = 0
    mask[1, :45] = 0
    mask[2, 1::2] = 0
    mask[3] = 0
    batch = {"input_ids": ids_of([240]).view(4, 60), "attention_mask": mask}
    with torch.no_grad():
        assert ours.engine.choose_arithmetic(ours, 64) is not ours.engine.modules
    valid, bound = valid_of(mask), 2e-6 if precision is None else 0.02
    mine = run(ours, batch)[0]
    assert_close(kind, mine[valid].double(), run(model, batch)[0][valid], bound)
    assert (mine[~valid] == 0).all()


@FEW_KINDS
def test_each_instruction_set(kind: str) -> None:
    """Catches an encoder that is wrong in the library for a processor with fewer instructions."""
    eager, lengths = make(kind, backend="torch"), [210, 7]
    exact, plain = encode(in_dtype(eager, torch.float64), lengths), encode(eager, lengths)
    for name in cpu.VARIANTS:
        with only_variant(name):
            if cpu.obstacle() is None:
                assert_as_accurate(name, encode(make(kind), lengths), plain, exact)
            if cpu.int8_obstacle() is None:
                for dtype in (torch.float32, torch.bfloat16):
                    assert rms_error(encode(make(kind, dtype, precision="int8"), lengths), exact) < 0.02


@PRECISIONS
@pytest.mark.parametrize("keep_states", [False, True], ids=["one call", "states"])
@DTYPES
@FEW_KINDS
def test_bits_do_not_depend_on_the_batch(
    kind: str, dtype: torch.dtype, keep_states: bool, precision: str | None
) -> None:
    """Catches a text whose bits depend on the others, their lengths, their order, or the number of threads."""
    if not cpu.multiplies(dtype):
        pytest.skip(f"the C++ kernels do not multiply {dtype} here")
    model = make(kind, dtype, batch_invariant=True, precision=precision)
    lengths = [3, 70, 1, FARTHEST + 1, 200, 193]
    texts, threads = ids_of(lengths).split(lengths), torch.get_num_threads()

    def states(texts: Any) -> list[Tensor]:
        batch = fastbert.ops.packing.from_lengths([len(text) for text in texts], torch.device("cpu"))
        with torch.no_grad():
            layers = model.encode_packed(batch, torch.cat(texts), keep_states=keep_states)
        return list(torch.stack(layers, 1).split([len(text) for text in texts]))

    try:
        torch.set_num_threads(1)
        together = states(texts)
        torch.set_num_threads(2)
        turned = states(texts[::-1])[::-1]
        for text, mine, other in zip(texts, together, turned, strict=True):
            alone = states([text])[0]
            assert torch.equal(alone, mine) and torch.equal(alone, other)
    finally:
        torch.set_num_threads(threads)


@PRECISIONS
@pytest.mark.parametrize("kind", ["own projections", "convolution in groups"])
def test_follows_the_weights(kind: str, precision: str | None) -> None:
    """Catches projected distances, a table's norm or a convolution that stay as they were when a weight changes."""
    model, plain = make(kind, precision=precision), make(kind, torch.float64, backend="torch")
    encoder, before = model.encoder, encode(model, [9, 30])
    attention = encoder.layer[1].attention.self
    linears = [attention.query_proj, encoder.rel_embeddings]
    if kind == "own projections":
        linears += [attention.pos_key_proj, attention.pos_query_proj, encoder.LayerNorm]
    else:
        linears += [encoder.conv.conv, encoder.conv.LayerNorm]
    for linear in linears:
        for change in ("counted", "other", "silent"):
            with torch.no_grad():
                if change == "counted":
                    linear.weight[..., ::2].mul_(1.3)
                elif change == "other":
                    linear.weight = torch.nn.Parameter(linear.weight.flip(0).clone())
                else:
                    linear.weight.data[..., ::2].mul_(0.7)
                    model.eval()
            after = encode(model, [9, 30])
            plain.load_state_dict(model.state_dict())
            assert rms_error(after, encode(plain, [9, 30])) < (2e-6 if precision is None else 0.03)
            assert rms_error(after, before.double()) > 1e-4
            before = after


def test_convolution_between_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a convolution whose rows are put outside of the workspace, or some that are not written."""
    kind, lengths = "convolution in groups", [300, 7]  # more rows than are convolved at a time
    model = make(kind)
    monkeypatch.setattr(
        cpu_encoder.CpuEncoder, "_take", lambda self, size, dtype: guarded(torch.full((size,), torch.nan, dtype=dtype))
    )
    assert_close(
        kind, encode(model, lengths).double(), encode(make(kind, torch.float64, backend="torch"), lengths), 2e-6
    )


def test_an_activation_without_a_kernel() -> None:
    """Catches a convolution that is run with another activation than its own, and an obstacle without its name."""
    model = twin(theirs("deberta-v2", **{**KINDS["v2-xlarge"], "conv_act": "tanh"}), dtype=torch.float32)
    with torch.no_grad():
        obstacles = list(model.engine.one_call.obstacles(model, 64, False, False))
    assert obstacles == ["there is no C++ kernel for 'tanh', the activation of a layer's convolution"]


# int8


@INT8
@DTYPES
@EVERY_KIND
@pytest.mark.parametrize("lengths", [[4], [30, 0, 1, 7], [210]], ids=str)
def test_int8_is_no_worse_than_the_emulation(
    kind: str, lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a convolution of what is quantised already, and one that is added before the layer's own norm."""
    runs = tokens_of_calls(monkeypatch, "encoder_int8_forward")
    exact = encode(make(kind, torch.float64, backend="torch"), lengths)
    emulated = encode(make(kind, dtype, backend="torch", precision="int8"), lengths)
    ours = encode(make(kind, dtype, precision="int8"), lengths)
    assert runs == [sum(lengths)] and ours.dtype == dtype
    assert 1e-4 < rms_error(ours, exact) <= 1.25 * rms_error(emulated, exact) + torch.finfo(dtype).eps


@INT8
@pytest.mark.parametrize("kind", ["v2-xlarge", "narrow embeddings"])
def test_int8_states_and_embeddings(kind: str) -> None:
    """Catches states without the convolution, and embeddings that are projected twice or not at all."""
    model, plain = make(kind, precision="int8"), make(kind, torch.float64, backend="torch")
    batch: Any = {"input_ids": ids_of([60]).view(3, 20), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    batch["attention_mask"][1, :15] = 0
    ours, exact = (run(each, batch, output_hidden_states=True) for each in (model, plain))
    assert torch.equal(run(model, batch).last_hidden_state, ours.last_hidden_state)
    assert len(ours.hidden_states) == len(exact.hidden_states)
    for mine, right in zip(ours.hidden_states, exact.hidden_states, strict=True):
        assert rms_error(mine, right) < 0.03
    embeds = model.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    again = run(model, {"inputs_embeds": embeds, **batch}).last_hidden_state
    assert rms_error(again, ours.last_hidden_state.double()) < 0.03


@INT8
def test_an_adapter_in_the_convolution_is_not_passed_over() -> None:
    """Catches the emulation of 8 bits, or the C++ call, that reads the weights of a convolution that is hooked."""
    seen: list[Any] = []
    for backend in ("torch", "cpu"):
        model = make("v2-xlarge", backend=backend, precision="int8", strict=False)
        model.encoder.conv.conv.register_forward_hook(lambda *arguments: seen.append(arguments))
        encode(model, [9, 5])
    assert len(seen) == 2


@INT8
@FEW_KINDS
def test_int8_is_explained_and_verified(kind: str) -> None:
    """Catches a report that stops at what the emulation adds, or tells of another path."""
    model = make(kind, precision="int8")
    report = fastbert.explain(model)
    rows = [row for row in report.rows if row.op == "quantized_linear"]
    assert rows and {row.backend for row in rows} == {"cpu"}
    assert all("one call: without gradients" in str(each) for each in (report, fastbert.explain(make(kind))))
    expected = ["0-1"] if kind == "v3" else ["0", "1"]  # the convolution stands between them
    assert list(dict.fromkeys(row.module.split(".")[2] for row in rows)) == expected
    assert fastbert.verify(model, [text.tolist() for text in ids_of([30, 12]).split([30, 12])]).ok
