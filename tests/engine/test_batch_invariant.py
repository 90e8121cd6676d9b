"""A text has the same bits alone, in any batch and in any order on the Triton kernels.

On the C++ kernels for CPUs: test_batch_invariant_cpu.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from fastbert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, SentenceEncoder
from fastbert.diagnostics.explain.entry import explain
from fastbert.models import tasks
from fastbert.ops import BackendError, Policy, dispatch
from fastbert.pipelines.modules import Dense, Dropout, LayerNorm, Normalize, apply
from helpers import assert_as_accurate, cu_seqlens_of, rms_error

MODE = {"backend": "triton", "batch_invariant": True}
INVARIANT = Policy(**MODE)
BATCHINGS = 200


def config(**overrides):
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "intermediate_size": 48, "max_position_embeddings": 160, **overrides})


def draw(lengths, generator):
    """Texts (positions in `lengths`) in any number and order, some more than once."""
    return generator.choices(range(len(lengths)), k=generator.randint(1, 3))


def run_packed(model, texts):
    """The states of each text of the batch."""
    lengths = [len(text) for text in texts]
    device = model.device
    with torch.inference_mode():
        out = model.forward_packed(torch.cat(texts).to(device), cu_seqlens_of(lengths, device))
    return out.split(lengths)


def assert_invariant(model, lengths, batchings):
    """Each text gives the same bits in each of the batchings as alone."""
    torch.manual_seed(1)
    texts = [torch.randint(0, model.config.vocab_size, (n,)) for n in lengths]
    alone = [run_packed(model, [text])[0] for text in texts]
    generator = random.Random(0)
    for _ in range(batchings):
        chosen = draw(lengths, generator)
        for i, out in zip(chosen, run_packed(model, [texts[i] for i in chosen]), strict=True):
            assert torch.equal(out, alone[i]), f"text {i} of {lengths[i]} tokens differs in the batch {chosen}"
    return alone


# The last text is longer than a tile of the attention.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "longest"), [(torch.bfloat16, 130), (torch.float32, 70)], ids=str)
def test_bits_do_not_depend_on_the_batch(dtype, longest, device):
    """Catches a tile, a key block or a library GEMM that is cut by what else is in the batch."""
    settings = config(hidden_size=16, num_attention_heads=1, intermediate_size=40)
    model = BertModel(settings, **MODE).to(device, dtype).eval()
    alone = assert_invariant(model, [1, 3, 20, 33, longest], BATCHINGS // 2)
    assert all(torch.isfinite(out).all() for out in alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("hidden", "heads_", "layers"), [(384, 12, 6), (768, 12, 4), (1024, 16, 3)])
def test_bits_on_a_gpu(dtype, hidden, heads_, layers):
    """Catches bits that depend on the batch on the hardware, at real shapes, with tensor cores and their reductions."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads_, "intermediate_size": 4 * hidden}
    settings = config(**sizes, num_hidden_layers=layers, vocab_size=30522, max_position_embeddings=512)
    model = BertModel(settings, batch_invariant=True).to("cuda", dtype).eval()
    assert_invariant(model, [1, 5, 16, 20, 31, 64, 100, 127, 128, 129, 200, 300, 511, 512], BATCHINGS)


def test_a_shared_tile_would_not_do(device):
    """Catches tests of the mode that cannot fail, because a tile shared with neighbours gives the same bits anyway."""
    model = BertModel(config(), backend="triton").to(device).eval()
    with pytest.raises(AssertionError, match="differs in the batch"):
        assert_invariant(model, [1, 3, 7, 20, 33], 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_the_usual_error(dtype, device):
    """Catches another attention or GEMM that is invariant and wrong, or less exact for the residual that it adds."""
    model = BertModel(config(num_hidden_layers=2), **MODE).to(device, dtype).eval()
    ids = torch.randint(0, 120, (3, 40), device=device)
    outs = {}
    for name, backend_dtype in (("eager", dtype), ("exact", torch.float64)):
        plain = BertModel(config(num_hidden_layers=2), backend="torch").to(device, backend_dtype).eval()
        plain.load_state_dict(model.state_dict())
        with torch.inference_mode():
            outs[name] = plain(ids)
    with torch.inference_mode():
        ours = model(ids)
    for name in ("last_hidden_state", "pooler_output"):
        assert_as_accurate(name, ours[name], outs["eager"][name], outs["exact"][name])


@pytest.mark.parametrize("name", sorted(name for name in vars(tasks) if name.startswith("BertFor")))
def test_heads(name, device, monkeypatch):
    """Catches a pooler, a decoder or a classifier that still takes PyTorch's GEMM."""
    cls = getattr(tasks, name)
    model = cls(config(), **MODE).to(device).eval()
    refuse = pytest.fail
    monkeypatch.setattr(nn.functional, "linear", lambda *args: refuse("a linear of PyTorch's"))
    shape = (2, 2, 6) if name == "BertForMultipleChoice" else (3, 6)
    ids = torch.randint(0, 120, shape, device=device)
    with torch.inference_mode():
        together, alone = model(ids).to_tuple()[0], model(ids[1:2]).to_tuple()[0]
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize(
    "make",
    [lambda: Dense(48, 20), lambda: Dense(48, 20, bias=False), lambda: LayerNorm(48), Normalize, Dropout],
    ids=["Dense", "Dense without bias", "LayerNorm", "Normalize", "Dropout"],
)
def test_after_the_pooling(make, device):
    """Catches a module of a sentence encoder whose rows PyTorch sums together, or whose kernel is another function."""
    module = make().to(device).eval()
    x = torch.randn(9, 48, device=device)
    with torch.no_grad():
        together, theirs = apply(module, x, INVARIANT), module(x)
        assert all(torch.equal(apply(module, x[i : i + 1], INVARIANT)[0], together[i]) for i in range(9))
        assert torch.equal(apply(module, x, Policy()), theirs)
    assert rms_error(together, theirs) < 1e-6
    with pytest.raises(BackendError, match="a module ReLU after the pooling does not support it"):
        apply(nn.ReLU(), x, INVARIANT)


def test_sentence_encoder(minilm, device):
    """Catches a sentence encoder that drops the mode, or whose normalisation depends on the batch."""
    encoder = SentenceEncoder.from_pretrained(minilm, device=device, num_hidden_layers=1, **MODE)
    assert encoder.model.policy == INVARIANT
    texts = ["A cat sleeps.", "Rain.", "The committee adjourned before lunch."]
    for normalize in (False, True):
        together = encoder.encode(texts, normalize_embeddings=normalize, truncate_dim=100)
        for i, text in enumerate(texts):
            assert (encoder.encode(text, normalize_embeddings=normalize, truncate_dim=100) == together[i]).all()


def test_refused_without_the_kernels(minilm, monkeypatch):
    """Catches a promise that rests on PyTorch's own products, whose bits depend on the number of rows."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    for cls in (BertModel, BertForMaskedLM, SentenceEncoder):
        with pytest.raises(BackendError, match="batch_invariant: needs the Triton kernels.*the tensors are on the CPU"):
            cls.from_pretrained(minilm, device="cpu", **MODE)
    with pytest.raises(ValueError, match="batch_invariant: expected backend 'auto', 'triton' or 'cpu', got 'torch'"):
        BertModel.from_pretrained(minilm, backend="torch", batch_invariant=True)
    model = BertModel(config(), **MODE).eval()  # one that was moved
    with pytest.raises(BackendError, match="strict=True: the tensors are on the CPU"):
        model(torch.ones(1, 4, dtype=torch.int64))


def test_refused_where_a_module_is_called_as_it_is(device):
    """Catches an adapter or a hook that is accepted though nothing is known of its bits."""
    ids = torch.ones(1, 4, dtype=torch.int64, device=device)
    for path in ("encoder.layer.0.output.dense", "encoder.layer.0.attention.self.key", "pooler.dense",
                 "embeddings.word_embeddings"):  # fmt: skip
        model = BertModel(config(), **MODE).to(device).eval()
        model.get_submodule(path).register_forward_hook(lambda *args: None)
        with pytest.raises(BackendError, match="batch_invariant: a (Linear|Embedding) that is an adapter, has hooks"):
            model(ids)
    with pytest.raises(BackendError, match="strict=True"):
        BertModel(config(), **MODE).to(device).eval()(ids, output_attentions=True)


def test_embeddings_at_an_odd_address(device):
    """Catches embeddings given as a view whose sums are in another order than those of a copy."""
    model = BertModel(config(), **MODE).to(device).eval()
    embeds = torch.randn(2, 5, 32, device=device)
    shifted = torch.zeros(2 * 5 * 32 + 1, device=device)[1:].view(2, 5, 32).copy_(embeds)
    assert shifted.data_ptr() % 16
    from fastbert_kernels import launch

    seen, run = [], launch.run
    launch.run = lambda *args, **kwargs: seen.append(kwargs) or run(*args, **kwargs)
    try:
        outs = [model(inputs_embeds=inputs).last_hidden_state for inputs in (embeds, shifted)]
    finally:
        launch.run = run
    assert torch.equal(*outs)
    pointers = [t for kwargs in seen for t in kwargs.values() if isinstance(t, torch.Tensor)]
    assert all(t.data_ptr() % 16 == 0 for t in pointers if t.is_floating_point())


def test_explain_of_a_sentence_encoder(minilm, monkeypatch):
    """Catches modules after the pooling that are shown as called when kernels do their work."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the mode wants kernels for the CPU; nothing is launched
    encoder = SentenceEncoder.from_pretrained(minilm, device="cpu", num_hidden_layers=1, **MODE)
    encoder.tail.extend([Dense(384, 20), Dropout()])
    rows = {row.module: row for row in explain(encoder, arch=90).rows if row.module.startswith("tail.")}
    assert [(row.module, row.backend) for row in rows.values()] == [("tail.1", "triton"), ("tail.2", "module")]
    assert rows["tail.1"].kernel == "fastbert_kernels.linear"


def test_every_sequence_starts_a_tile():
    """Catches a work list that shares a tile, loses a row, or cuts a sequence by what stands before it."""
    from fastbert_kernels.work_list import build_work_list

    tiles, row_spans = build_work_list(cu_seqlens_of([5, 0, 70, 64, 1]).tolist(), 64, share=False)
    rows = [[0, 5, 0, 5], [5, 69, 5, 75], [69, 75, 5, 75], [75, 139, 75, 139], [139, 140, 139, 140]]
    assert sorted(tiles.tolist()) == [[*row, 0] for row in rows] and row_spans.shape == (0,)


def test_explain_shows_the_mode():
    """Catches a report that shows cuBLAS, or a mode that cannot be seen."""
    model = BertForSequenceClassification(config(), batch_invariant=True).eval()
    report = explain(model, arch=90, dtype="bfloat16")
    assert report.batch_invariant and "batch-invariant" in str(report) and report.to_dict()["batch_invariant"]
    gemms = [row for row in report.rows if row.op == "linear"]
    assert len(gemms) == 6
    assert all(row.kernel.startswith("fastbert_kernels.linear") and row.block_sizes for row in gemms)
    assert all("batch_invariant: cuBLAS chooses" in row.source for row in gemms)
    assert not explain(BertModel(config()).eval(), arch=90).batch_invariant
    model.bert.pooler.dense.register_forward_hook(lambda *args: None)
    (row,) = [row for row in explain(model, arch=90).rows if row.module == "bert.pooler.dense"]
    assert row.raises


def test_traced_without_a_plan(device):
    """Catches an exported model whose attention quietly shares tiles."""
    model = BertModel(config(), **MODE).to(device).eval()
    ids = torch.ones(1, 4, dtype=torch.int64, device=device)
    with pytest.raises(Exception, match="batch_invariant: a traced model needs the batch's plan"):
        torch.export.export(model, (ids,), strict=False)
