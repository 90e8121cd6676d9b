"""explain with a batch counts the padding avoided, and FLOPs and bytes that follow from the shapes."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastbert
from fastbert import BertConfig, BertModel, SentenceEncoder, Tokenizer
from fastbert.diagnostics.explain.costs import cost, lengths_of
from fastbert.diagnostics.explain.entry import explain
from fastbert.diagnostics.explain.report import amount
from fastbert.diagnostics.verify.eager import eager_bert
from fastbert.engine import cpu_encoder
from fastbert.models import tasks
from fastbert.ops import packed_linear
from fastbert.pipelines.modules import Dense, LayerNorm, Normalize
from fastbert_kernels import cpu

LENGTHS = [5, 17, 1, 0, 9]


def config(**changes: Any) -> BertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 56, "max_position_embeddings": 40,
    }  # fmt: skip
    return BertConfig(**{**sizes, **changes})


@pytest.fixture
def model() -> BertModel:
    return BertModel(config(), backend="torch").eval()


def mask() -> torch.Tensor:
    """LENGTHS as a mask of 20 columns, with padding left and right."""
    rows = torch.zeros(len(LENGTHS), 20, dtype=torch.int64)
    for i, n in enumerate(LENGTHS):
        rows[i, i % 3 : i % 3 + n] = 1
    return rows


BATCHES: dict[str, Any] = {
    "lengths": LENGTHS,
    "array of lengths": np.array(LENGTHS),
    "tensor of lengths": torch.tensor(LENGTHS),
    "ids": [[7] * n for n in LENGTHS],
    "tensors of ids": [torch.ones(n, dtype=torch.int64) for n in LENGTHS],
    "mask": {"input_ids": torch.ones(5, 20), "attention_mask": mask()},
    "tuple with a mask": (torch.ones(5, 20), mask()),
    "mask of an array": {"attention_mask": mask().numpy()},
    "lists": {"input_ids": [[7] * n for n in LENGTHS], "attention_mask": [[1] * n for n in LENGTHS]},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_kinds_of_batch(kind: str, model: BertModel) -> None:
    """Catches a kind of batch that is read otherwise, and padding columns that are not counted."""
    batch = explain(model, BATCHES[kind]).batch
    assert batch is not None and (batch.n_sequences, batch.n_tokens, batch.longest, batch.rows) == (5, 32, 17, 32)
    assert batch.padded_tokens == 5 * (20 if "mask" in kind else 17) and batch.padded_sorted == 5 * 17
    assert batch.padding_avoided == 1 - 32 / batch.padded_tokens


def test_padded_ids_without_a_mask(model: BertModel) -> None:
    """Catches columns taken for padding though nothing says so, or choices of multiple choice that are miscounted."""
    for ids in (torch.ones(4, 10), {"input_ids": torch.ones(2, 2, 10)}, {"inputs_embeds": torch.ones(4, 10, 32)}):
        batch = explain(model, ids).batch
        assert batch is not None and (batch.n_sequences, batch.n_tokens, batch.padding_avoided) == (4, 40, 0)
    assert explain(model).batch is None and all(row.flops is None for row in explain(model).rows)
    nothing = explain(model, []).batch
    assert nothing is not None and nothing.n_tokens == nothing.flops == nothing.padding_avoided == 0


def test_texts() -> None:
    """Catches texts that are not cut as encode cuts them, or other batches than a SentenceEncoder's."""
    texts = ["a river", "boats " * 50, "", "the river is wide"]
    tokenizer = Tokenizer.train(texts * 3, vocab_size=60)
    bert = BertModel(config(vocab_size=tokenizer.vocab_size), backend="torch").eval()
    encoder = SentenceEncoder(bert, tokenizer, ("mean", "cls"), [Dense(64, 7), LayerNorm(7), Normalize()])
    lengths = [len(ids) for ids in tokenizer(texts, max_length=40)["input_ids"]]
    report = explain(encoder, texts)
    assert report.batch is not None and report.batch.n_tokens == sum(lengths) and report.batch.n_truncated == 1
    assert "(1 cut)" in str(report)
    dense = next(row for row in report.rows if row.op == "dense")
    assert dense.flops == 2 * 4 * 64 * 7 and dense.bytes_moved == 4 * (4 * 64 + 4 * 7 + 64 * 7)
    assert explain(bert, texts, tokenizer=tokenizer).batch.n_tokens == sum(lengths)  # type: ignore[union-attr]
    assert explain(encoder, "a river").batch.n_sequences == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("hidden", [32, 64])
def test_flops_are_those_that_pytorch_counts(hidden: int) -> None:
    """Catches a product that is missing, counted for one layer of several, or with another shape."""
    model = BertModel(config(hidden_size=hidden), backend="torch").eval()
    ids = torch.ones(3, 11, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        eager_bert(
            dict(model.named_parameters()),
            model.blocks(),
            model.config,
            ids,
            torch.ones_like(ids),
            torch.zeros_like(ids),
        )
    rows = explain(model, ids).rows
    assert sum(row.flops or 0 for row in rows if row.op in ("linear", "attention")) == counter.get_total_flops()


@pytest.mark.parametrize("arch", [None, 80, 90])
def test_flops_a_token_of_bert_base(arch: int | None) -> None:
    """Catches costs of BERT-base that are not 169.9 M + 36,864 S a token, or depend on how operations are cut."""
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    where: dict[str, Any] = {"device": "cpu", "backend": "torch"} if arch is None else {"arch": arch}
    report = explain(model, [512] * 4 + [128] * 2, dtype="bfloat16", **where)
    products = sum(row.flops or 0 for row in report.rows if row.op in ("linear", "attention"))
    assert products == 4 * 512 * (169_869_312 + 36_864 * 512) + 2 * 128 * (169_869_312 + 36_864 * 128)
    assert report.batch is not None
    assert products < report.batch.flops < 1.02 * products
    weights = 2 * 12 * 12 * 768 * 768
    assert report.batch.bytes_moved > weights + 2 * 12 * report.batch.n_tokens * 768 * 20
    padded = 6 * 512 * (169_869_312 + 36_864 * 512)
    assert padded < report.batch.padded_flops < 1.02 * padded


def test_a_product_with_its_gate() -> None:
    """Catches a product whose second half, which its kernel gates and does not write, costs nothing."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = BertConfig.from_dict({"model_type": "modernbert", "vocab_size": 50, "pad_token_id": 0, **sizes})
    model = BertModel(config).eval()
    rows = [row for dtype in ("bfloat16", "float32") for row in explain(model, LENGTHS, arch=90, dtype=dtype).rows]
    one, apart = (row for row in rows if "mlp.Wi" in row.module and row.op == "linear")
    assert "gated" in one.kernel and one.flops == apart.flops == 2 * sum(LENGTHS) * 64 * 192
    assert one.bytes_moved == 2 * (sum(LENGTHS) * (64 + 96) + 64 * 192)


def test_every_operation_has_a_cost() -> None:
    """Catches words in which a row's shapes are told that the estimate cannot read."""
    for head in (BertModel, tasks.BertForPreTraining, tasks.BertForQuestionAnswering, tasks.BertForMultipleChoice):
        for options in ({"backend": "torch"}, {"arch": 90}, {"arch": 90, "dtype": "bfloat16"}):
            for row in explain(head(config()).eval(), LENGTHS, **options).rows:
                assert row.flops and row.bytes_moved, row
    for precision in ("int8", "fp8"):
        eight = BertModel(config(intermediate_size=64), precision=precision).eval()
        report = explain(eight, LENGTHS, arch=90)
        assert any(row.op == "quantized_linear" for row in report.rows)
        assert all(row.flops and row.bytes_moved for row in report.rows)
        whole = explain(BertModel(config(intermediate_size=64)).eval(), LENGTHS, arch=90)
        products = [
            sum(row.flops or 0 for row in r.rows if "linear" in row.op or row.op == "attention")
            for r in (report, whole)
        ]
        assert products[0] == products[1]


def test_attention_that_is_launched_twice_is_counted_once(model: BertModel) -> None:
    """Catches sequences that are charged to both the launch for short texts and the other one."""
    row = next(row for row in explain(model, LENGTHS).rows if row.op == "attention")
    short = dataclasses.replace(row, shapes=f"{row.shapes}, of texts of up to 5 tokens")
    from fastbert.diagnostics.explain.costs import _costs

    (both, few), _ = _costs([row, short], LENGTHS, 32, 4)
    assert few.flops == 3 * 4 * (25 + 1) * 32 and both.flops == 3 * 4 * (17 * 17 + 81) * 32
    assert cost(row, LENGTHS, 32, 5, 4)[0] == few.flops + both.flops


@pytest.mark.parametrize("kernels", ["C++", "oneDNN"])
def test_rows_that_are_computed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that oneDNN is given beyond the tokens and that the report hides, or says of the C++ kernels."""
    if kernels == "oneDNN":
        monkeypatch.setattr(cpu.library, "load", lambda: (None, "planted"))
    if packed_linear.packing_obstacle(torch.float32) is not None or (kernels == "C++" and cpu.obstacle() is not None):
        pytest.skip(f"{packed_linear.packing_obstacle(torch.float32)}, {cpu.obstacle()}")
    monkeypatch.setattr(cpu_encoder, "obstacles", lambda *args: iter(["planted"]))  # operation by operation
    model = BertModel(config()).eval()
    seen: list[int] = []
    run = model.embeddings.forward
    model.engine.packs_weights(model)
    batch = explain(model, [50, 57]).batch
    assert batch is not None and batch.n_tokens == 107
    with torch.no_grad(), pytest.MonkeyPatch.context() as context:
        from fastbert import ops

        right = ops.linear_residual_layer_norm
        context.setattr(
            ops, "linear_residual_layer_norm", lambda x, *a, **k: (seen.append(len(x)), right(x, *a, **k))[1]
        )
        model.forward_packed(torch.ones(107, dtype=torch.int64).clamp(max=100), torch.tensor([0, 40, 80, 107]))
    assert run is not None and set(seen) == {batch.rows} == {107 if kernels == "C++" else 112}


def test_report_as_text_and_json(model: BertModel) -> None:
    """Catches columns that are there without a batch, and values that JSON cannot hold."""
    report = explain(model, LENGTHS)
    lines = str(report).splitlines()
    assert "FLOP" in lines[2] and "bytes" in lines[2] and "FLOP" not in str(explain(model))
    assert "batch: 5 sequences, 32 tokens; padded to the longest, 17, it would be 85 tokens: 62.4% avoided" in str(
        report
    )
    d = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert d["batch"]["flops"] == sum(row["flops"] for row in d["rows"])
    assert d["batch"]["padding_avoided"] == pytest.approx(1 - 32 / 85)
    assert explain(model).to_dict()["batch"] is None
    assert [amount(x) for x in (0, 999, 12300, 4.5e6, 1e9, 2e12, 3e15)] == [
        "0 ", "999 ", "12.3 k", "4.5 M", "1 G", "2 T", "3 P",
    ]  # fmt: skip
    assert fastbert.explain(model, LENGTHS) == report and math.isfinite(report.batch.padding_avoided)  # type: ignore


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (5, TypeError, "batch: got int"),
        (b"text", TypeError, "batch: got bytes"),
        (["a", [1]], TypeError, "batch: expected texts, lists of token ids, lengths"),
        ([1.5], TypeError, "batch: expected texts"),
        ([-1], TypeError, "batch: expected texts"),
        ([True], TypeError, "batch: expected texts"),
        ([torch.ones(5, 20), mask()], TypeError, "batch: expected texts"),
        ({"labels": 3}, TypeError, "batch: got NoneType"),
        (["a text"], ValueError, "tokenizer: needed for texts"),
    ],
)
def test_what_is_no_batch(batch: Any, kind: type[Exception], message: str, model: BertModel) -> None:
    """Catches a batch that is misread in silence."""
    with pytest.raises(kind, match=message):
        lengths_of(batch, model, None)
    with pytest.raises(kind, match=message):
        explain(model, batch)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_texts_are_cut_where_the_model_cuts_them(model_type):
    """Catches a limit that counts RoBERTa's first positions, which no token has, and one that ignores a set table."""
    texts = ["a b c d " * 40, "a b"]
    tokenizer = Tokenizer.train(texts, vocab_size=30)
    padding = {"pad_token_id": 1} if model_type == "roberta" else {}
    model = BertModel(config(model_type=model_type, vocab_size=tokenizer.vocab_size, **padding), backend="torch").eval()
    assert model.longest_text == (38 if model_type == "roberta" else 40)
    assert SentenceEncoder(model, tokenizer).max_seq_length == model.longest_text
    n_tokens, _, n_cut = lengths_of(texts, model, tokenizer)
    assert max(n_tokens) == model.longest_text and n_cut == 1
    model(torch.full((1, max(n_tokens)), 5))
    with pytest.raises(IndexError):
        model(torch.full((1, max(n_tokens) + 1), 5))
