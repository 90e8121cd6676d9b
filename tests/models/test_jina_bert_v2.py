"""Jina's BERT with ALiBi gives what a plain restatement and the reference give, from files as they are published."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import fastbert
from family_cases import randomised, run
from fastbert import BertConfig, BertModel, JinaBertModel, ops, reference
from fastbert.engine import capture
from fastbert.models.jina_bert_v2 import alibi_table, slopes
from graph_cases import StandIn
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import BATCH, LENGTH, MASKS, VOCAB, assert_close, generator, mask, randn, valid_of

PUBLISHED = {  # config.json of jinaai/jina-embeddings-v2-base-en, but for the sizes
    "_name_or_path": "jinaai/jina-bert-implementation", "architectures": ["JinaBertForMaskedLM"],
    "attention_probs_dropout_prob": 0.0, "attn_implementation": None,
    "auto_map": {
        "AutoConfig": "jinaai/jina-bert-implementation--configuration_bert.JinaBertConfig",
        "AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel",
    },
    "classifier_dropout": None, "emb_pooler": "mean", "feed_forward_type": "geglu", "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 96, "initializer_range": 0.02,
    "intermediate_size": 37, "layer_norm_eps": 1e-12, "max_position_embeddings": 8192, "model_max_length": 8192,
    "model_type": "bert", "num_attention_heads": 6, "num_hidden_layers": 2, "pad_token_id": 0,
    "position_embedding_type": "alibi", "torch_dtype": "float32", "transformers_version": "4.26.0",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": VOCAB,
}  # fmt: skip


def jina(name: str = "BertModel", dtype: torch.dtype = torch.float64, config: Any = None, **options: Any) -> Any:
    """A random model in eval mode."""
    config = BertConfig.from_dict({**PUBLISHED, **(config or {})})
    model = getattr(fastbert, name)(config, **{"backend": "cpu", "strict": True, **options})
    return randomised(model.double()).to(dtype).eval()


def batch_of(kind: str = "right") -> dict[str, Any]:
    return {"input_ids": torch.randint(1, VOCAB, (BATCH, LENGTH), generator=generator(4)), "attention_mask": mask(kind)}


def plain_row(state: dict[str, Tensor], ids: Tensor, columns: Tensor, types: Tensor, activation: Any) -> Tensor:
    """(S,) ids of one text whose tokens stand in these columns -> (S, H), by PyTorch's own functions."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def dense(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.token_type_embeddings.weight"][types]
    x = norm("embeddings.LayerNorm", x)
    apart = (columns[:, None] - columns).abs()
    steps = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]  # of six heads: those of four, and two of eight
    bias = -torch.tensor(steps, dtype=x.dtype)[:, None, None] * apart
    for i in range(2):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(f"{layer}.attention.self.{n}", x).unflatten(-1, (6, -1)).transpose(0, 1)
                   for n in ("query", "key", "value"))  # fmt: skip
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1).flatten(1)
        x = norm(f"{layer}.attention.output.LayerNorm", dense(f"{layer}.attention.output.dense", context) + x)
        inner = dense(f"{layer}.mlp.gated_layers", x)
        x = norm(f"{layer}.mlp.layernorm", dense(f"{layer}.mlp.wo", activation(inner[:, :37]) * inner[:, 37:]) + x)
    return x


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", ["geglu", "reglu"])
def test_float64_matches_a_restatement(kind: str, form: str) -> None:
    """Catches a slope, a distance over a hole, the wrong half of the gate, or a norm that is off."""
    ours, batch = jina(config={"feed_forward_type": form}), batch_of(kind)
    types = torch.randint(2, (BATCH, LENGTH), generator=generator(8))
    mine = run(ours, {**batch, "token_type_ids": types}, output_hidden_states=True, output_attentions=False)
    judge = reference.encode(dict(ours.named_parameters()), ours.config, **batch, token_type_ids=types)
    for state, expected in zip(mine.hidden_states, judge.hidden_states, strict=True):
        assert_close("reference", state, expected)
    assert_close("pooler", mine.pooler_output, judge.pooler_output)
    valid = valid_of(batch["attention_mask"])
    activation = F.gelu if form == "geglu" else F.relu
    for row, tokens in enumerate(valid):
        columns = tokens.nonzero()[:, 0]
        if len(columns):
            expected = plain_row(
                ours.state_dict(), batch["input_ids"][row, columns], columns, types[row, columns], activation
            )
            assert_close(f"row {row}", mine[0][row, columns], expected)


def test_gradients() -> None:
    """Catches a gradient that the gate, the bias or a shared table loses, with and without checkpointing."""
    batch = batch_of("holes")
    valid = valid_of(batch["attention_mask"])
    gradients = []
    for checkpointed in (False, True):
        ours = jina(config={"hidden_dropout_prob": 0.0}).train()
        if checkpointed:
            ours.gradient_checkpointing_enable()
        ours(**batch)[0][valid].sin().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if "pooler" not in name})
    state = {name: p.detach().requires_grad_() for name, p in ours.named_parameters()}
    judge = reference.encode(state, ours.config, **batch).last_hidden_state
    judge[valid].sin().sum().backward()
    for name in gradients[0]:
        if not name.endswith("key.bias"):
            for gradient in gradients:
                assert_close(name, gradient[name], state[name].grad, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Catches a bias that is rounded to the model's dtype, which far columns lose."""
    ours, batch = jina(dtype=dtype, backend="auto", strict=False), batch_of()
    valid = valid_of(batch["attention_mask"])
    exact = copy.deepcopy(ours).double()
    judge = reference.encode(dict(exact.named_parameters()), exact.config, **batch).last_hidden_state
    eager = reference.encode(dict(ours.named_parameters()), ours.config, **batch, dtype=dtype).last_hidden_state
    assert_as_accurate("jina", run(ours, batch)[0][valid], eager[valid], judge[valid])


def test_long_texts_cost_no_square() -> None:
    """Catches a bias of (S, S) numbers, and a table for each layer, model or call."""
    ours = jina(dtype=torch.float32, config={"max_position_embeddings": 8192})
    table = ours.encoder.alibi(ours.embeddings.word_embeddings.weight)
    assert table.shape == (6, 2 * 8191 + 1) and table.dtype == torch.float32
    assert all(block.position_bias is table for block in [*ours.blocks(), *jina(dtype=torch.bfloat16).blocks()])
    lengths = [600, 0, 1, 300]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator(6))
    with torch.no_grad():
        packed = ours.forward_packed(ids, cu_seqlens_of(lengths))
        alone = [ours(text[None])[0][0] for text in ids.split(lengths) if len(text)]
    assert torch.allclose(packed, torch.cat(alone), atol=1e-4)
    assert ours.longest_text == 8192
    with pytest.raises(IndexError, match="position_ids: expected values from 0 to 8191, got 8192"):
        ours(torch.ones(1, 8193, dtype=torch.long))


def test_slopes_of_any_number_of_heads() -> None:
    """Catches the slopes of 12 heads, as in the base models, taken for a series of 12."""
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(12)[:8] == slopes(8) and slopes(12)[8:] == [2.0 ** (-i / 2) for i in (1, 3, 5, 7)]
    assert slopes(1) == [2.0**-8]
    table = alibi_table(2, 3, torch.zeros(1, dtype=torch.float16))
    assert table.tolist() == [[-3 / 16, -2 / 16, -1 / 16, 0, -1 / 16, -2 / 16, -3 / 16], [x / 16 for x in (
        -3 / 16, -2 / 16, -1 / 16, 0, -1 / 16, -2 / 16, -3 / 16)]]  # fmt: skip


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_files_are_those_of_the_hub(name: str, tmp_path: Path) -> None:
    """Catches a config.json that is BERT's after saving, a tensor that is renamed, a head that reads something else."""
    model = jina(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert PUBLISHED.keys() - written.keys() == {"torch_dtype"} and written["dtype"] == "float32"
    assert all(written[key] == PUBLISHED[key] for key in ("auto_map", "emb_pooler", "position_embedding_type"))
    assert written["model_type"] == "bert" and written["architectures"] == [name.replace("Bert", "JinaBert")]
    stored = load_file(tmp_path / "model.safetensors")
    assert "bert.encoder.layer.1.mlp.gated_layers.weight" in stored and not any("position" in key for key in stored)
    again = getattr(fastbert, name).from_pretrained(tmp_path)
    assert type(again.bert) is JinaBertModel and again.config.position_embedding_type == "alibi"
    batch = batch_of()
    assert torch.equal(run(again, batch).logits, run(model, batch).logits)
    task = {"BertForMaskedLM": "masked_lm", "BertForTokenClassification": "token_classification"}
    judge = reference.head(
        task.get(name, "sequence_classification"),
        dict(again.double().named_parameters(remove_duplicate=False)),
        again.config,
        **batch,
    )
    assert torch.allclose(judge["logits"], run(model, batch).logits.double(), atol=1e-3)
    encoder = BertModel.from_pretrained(tmp_path)
    assert type(copy.deepcopy(encoder)) is type(pickle.loads(pickle.dumps(encoder))) is JinaBertModel


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_on_triton_kernels(kind: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches attention that leaves the kernels, a graph that replays an old table, and a gradient without the bias."""
    capturer = StandIn()
    monkeypatch.setattr(capture, "capturer", lambda device: capturer)
    ours, exact = jina(dtype=torch.float32, backend="triton", strict=False).to(device), jina()
    batch = batch_of(kind)
    valid = valid_of(batch["attention_mask"])
    expected = run(exact, batch)[0][valid]
    for _ in range(2):
        mine = run(ours, batch)[0][valid.to(device)].cpu().double()
        assert (mine - expected).norm() < 1e-5 * expected.norm()
    assert capturer.replays == 2
    rows = {row.op: row for row in fastbert.explain(ours).rows}
    assert rows["attention"].backend == "triton"
    for each in (ours, exact):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output = each(**{name: t.to(each.device) for name, t in batch.items()})[0]
        output[valid.to(each.device)].sin().sum().backward()
    name = "encoder.layer.0.attention.self.query.weight"
    gradient, judge = ours.get_parameter(name).grad.cpu().double(), exact.get_parameter(name).grad
    assert (gradient - judge).norm() < 1e-4 * judge.norm()


def test_what_is_refused() -> None:
    """Catches a config without a gate, or ALiBi in another family, that is run as something else."""
    with pytest.raises(ValueError, match="feed_forward_type: got 'original', expected one of geglu, reglu"):
        BertModel(BertConfig.from_dict({**PUBLISHED, "feed_forward_type": "original"}))
    with pytest.raises(ValueError, match="position_embedding_type: got 'alibi'"):
        BertConfig(position_embedding_type="alibi")


def test_reports_and_embeddings() -> None:
    """Catches a report that takes the layers for BERT's, and embeddings in the place of ids that are not."""
    ours = jina(dtype=torch.float32, backend="auto", strict=False)
    report = fastbert.verify(ours, [list(range(2, 9)), [1], [5, 1, 5, 1, 7, 8]])
    assert report.ok, str(report)
    told = str(fastbert.explain(ours, arch=90)) + str(fastbert.explain(ours))
    assert "position bias" in told and "gated" in told
    batch = {"inputs_embeds": randn(BATCH, LENGTH, 96), "attention_mask": mask("right")}
    exact = jina()
    judge = reference.encode(dict(exact.named_parameters()), exact.config, **batch)
    assert_close("embeddings", run(exact, batch)[0], judge.last_hidden_state)
    exact.policy = ops.AUTO
    both = run(exact, batch, output_attentions=True)
    for mine, expected in zip(both.attentions, judge.attentions, strict=True):
        assert_close("attentions", mine, expected)


def test_sentences(tmp_path: Path) -> None:
    """Catches a folder of Jina's that is not pooled by the mean, or that is read as BERT's."""
    texts = ["the river is wide", "small boats cross the river", "a"]
    tokenizer = fastbert.Tokenizer.train(texts * 3, vocab_size=60)
    tokenizer.save_pretrained(tmp_path)
    model = jina(dtype=torch.float32, config={"vocab_size": tokenizer.vocab_size})
    model.save_pretrained(tmp_path)
    encoder = fastbert.SentenceEncoder.from_pretrained(tmp_path, dtype="float32")
    assert type(encoder.model) is JinaBertModel
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    state = reference.encode(dict(model.named_parameters()), model.config, ids, attention_mask).last_hidden_state
    expected = state.sum(1) / attention_mask.sum(1, keepdim=True)
    assert torch.allclose(torch.from_numpy(encoder.encode(texts)).double(), expected, atol=1e-4)
