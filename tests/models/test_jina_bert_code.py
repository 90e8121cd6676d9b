"""Jina's model for code gives what a plain restatement and the reference give, from files as they are published."""

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
from fastbert import BertConfig, BertModel, JinaBertModel, JinaCodeModel, ops, reference
from fastbert.engine import capture
from graph_cases import StandIn
from helpers import assert_as_accurate
from model_cases import BATCH, LENGTH, MASKS, VOCAB, assert_close, generator, mask, randn, valid_of
from published_cases import PUBLISHED

CONFIG = {
    **PUBLISHED["jinaai/jina-embeddings-v2-base-code"],
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 37, "vocab_size": VOCAB,
}  # fmt: skip


def code_model(name: str = "BertModel", dtype: torch.dtype = torch.float64, config: Any = None, **options: Any) -> Any:
    """A random model in eval mode."""
    config = BertConfig.from_dict({**CONFIG, **(config or {})})
    model = getattr(fastbert, name)(config, **{"backend": "cpu", "strict": True, **options}).double()
    randomised(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "layer_norm_" in parameter_name and parameter_name.endswith("weight"):
                parameter.add_(1.0)
    return model.to(dtype).eval()


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
    slopes = torch.tensor([1 / 16, 1 / 256], dtype=x.dtype)[:, None, None]
    bias = -slopes * (columns[:, None] - columns).abs()
    for i in range(2):
        layer, of = f"encoder.layer.{i}", f"encoder.layer.{i}.attention.self"
        rows = norm(f"{of}.layer_norm_q", dense(f"{of}.query", x)), norm(f"{of}.layer_norm_k", dense(f"{of}.key", x))
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(0, 1) for each in (*rows, dense(f"{of}.value", x)))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1).flatten(1)
        y = norm(f"{layer}.attention.output.LayerNorm", dense(f"{layer}.attention.output.dense", context) + x)
        x = norm(f"{layer}.layer_norm_1", x + y)
        inner = dense(f"{layer}.mlp.up_gated_layer", x)
        inner = inner[:, :37] * activation(inner[:, 37:])
        x = norm(f"{layer}.layer_norm_2", x + dense(f"{layer}.mlp.down_layer", inner))
    return x


@pytest.mark.parametrize(("kind", "form"), [*((kind, "geglu") for kind in MASKS), ("holes", "reglu")])
def test_float64_matches_a_restatement(kind: str, form: str) -> None:
    """Catches queries normalised head by head, a residual that is left out, and the wrong half of the gate."""
    ours, batch = code_model(config={"feed_forward_type": form}), batch_of(kind)
    types = torch.randint(2, (BATCH, LENGTH), generator=generator(8))
    mine = run(ours, {**batch, "token_type_ids": types}, output_hidden_states=True)
    judge = reference.encode(dict(ours.named_parameters()), ours.config, **batch, token_type_ids=types)
    for state, expected in zip(mine.hidden_states, judge.hidden_states, strict=True):
        assert_close("reference", state, expected)
    assert_close("pooler", mine.pooler_output, judge.pooler_output)
    valid = valid_of(batch["attention_mask"])
    activation = F.gelu if form == "geglu" else F.relu
    for row, tokens in enumerate(valid):
        columns = tokens.nonzero()[:, 0]
        if len(columns):
            ids, kinds = batch["input_ids"][row, columns], types[row, columns]
            expected = plain_row(ours.state_dict(), ids, columns, kinds, activation)
            assert_close(f"row {row}", mine[0][row, columns], expected)


def test_gradients() -> None:
    """Catches a gradient that a norm of queries, the swapped gate or the second residual loses."""
    batch = batch_of("holes")
    valid = valid_of(batch["attention_mask"])
    gradients = []
    for checkpointed in (False, True):
        ours = code_model(config={"hidden_dropout_prob": 0.0}, strict=False).train()
        if checkpointed:
            ours.gradient_checkpointing_enable()
        ours(**batch)[0][valid].sin().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if "pooler" not in name})
    state = {name: p.detach().requires_grad_() for name, p in ours.named_parameters()}
    judge = reference.encode(state, ours.config, **batch).last_hidden_state
    judge[valid].sin().sum().backward()
    for name in gradients[0]:
        for gradient in gradients:
            if name.endswith("layer_norm_k.bias"):  # adds the same to all scores of a query: zero but for rounding
                continue
            assert_close(name, gradient[name], state[name].grad, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Catches norms that are rounded more often than PyTorch's, or a bias in the model's dtype."""
    ours, batch = code_model(dtype=dtype, backend="auto", strict=False), batch_of()
    valid = valid_of(batch["attention_mask"])
    exact = copy.deepcopy(ours).double()
    judge = reference.encode(dict(exact.named_parameters()), exact.config, **batch).last_hidden_state
    eager = reference.encode(dict(ours.named_parameters()), ours.config, **batch, dtype=dtype).last_hidden_state
    assert_as_accurate("jina code", run(ours, batch)[0][valid], eager[valid], judge[valid])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_on_triton_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Catches a layer or a gradient that leaves the kernels, and a graph with the gate of a weight that has changed."""
    capturer = StandIn()
    monkeypatch.setattr(capture, "capturer", lambda device: capturer)
    ours, exact = code_model(dtype=torch.float32, backend="triton", strict=False).to(device), code_model()
    batch = batch_of("holes")
    valid = valid_of(batch["attention_mask"])
    for captures in (1, 2):
        expected = run(exact, batch)[0][valid]
        for _ in range(2):
            mine = run(ours, batch)[0][valid.to(device)].cpu().double()
            assert (mine - expected).norm() < 1e-5 * expected.norm()
        assert capturer.captures == captures
        with torch.no_grad():
            for each in (ours, exact):
                each.get_parameter("encoder.layer.0.mlp.up_gated_layer.weight").mul_(1.5)
    rows = fastbert.explain(ours).rows
    assert {row.backend for row in rows} == {"triton"}
    for each in (ours, exact):
        for module in each.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output = each(**{name: t.to(each.device) for name, t in batch.items()})[0]
        output[valid.to(each.device)].sin().sum().backward()
    for name, parameter in exact.named_parameters():
        if "pooler" not in name and not name.endswith("layer_norm_k.bias"):
            gradient = ours.get_parameter(name).grad.cpu().double()
            assert (gradient - parameter.grad).norm() < 1e-4 * parameter.grad.norm(), name


def test_one_text_alone_has_the_same_bits() -> None:
    """Catches a norm or a product whose bits depend on the batch."""
    ours, batch = code_model(dtype=torch.float32, backend="auto", strict=False, batch_invariant=True), batch_of("right")
    together = run(ours, batch)[0]
    for row, tokens in enumerate(valid_of(batch["attention_mask"])):
        if n := int(tokens.sum()):
            alone = run(ours, {"input_ids": batch["input_ids"][row : row + 1, :n]})[0]
            assert torch.equal(alone[0], together[row, :n])


def test_engines_say_what_they_lack() -> None:
    """Catches layers that one C++ call or a node of autograd would run without their norms, and a silent reason."""
    ours = code_model(dtype=torch.float32, backend="auto", strict=False)
    for engine in (ours.engine.one_call, ours.engine.training):
        reasons = [reason for reason in engine.obstacles(ours, 100, False, False) if reason.startswith("the model has")]
        assert [reason.split(", which")[0] for reason in reasons] == [
            "the model has normalised queries and keys", "the model has a second norm after attention",
        ]  # fmt: skip
    told = str(fastbert.explain(ours))
    assert "the C++ encoder does not support" in told
    report = fastbert.verify(ours, [list(range(2, 4 + n)) for n in range(16)])
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_files_are_those_of_the_hub(name: str, tmp_path: Path) -> None:
    """Catches a config.json that reads as another model's after saving, and a tensor with our name or our order."""
    model = code_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bert" and written["architectures"] == [name.replace("Bert", "JinaBert")]
    assert written["auto_map"] == CONFIG["auto_map"] and written["position_embedding_type"] == "alibi"
    stored = load_file(tmp_path / "model.safetensors")
    layer = "bert.encoder.layer.1."
    assert {key.removeprefix(layer) for key in stored if key.startswith(layer)} == {
        *(f"attention.self.{part}.{kind}" for part in ("query", "key", "value", "layer_norm_q", "layer_norm_k")
          for kind in ("weight", "bias")),
        *(f"{part}.{kind}" for part in ("attention.output.dense", "attention.output.LayerNorm", "layer_norm_1",
                                        "layer_norm_2", "mlp.down_layer") for kind in ("weight", "bias")),
        "mlp.up_gated_layer.weight",
    }  # fmt: skip
    assert torch.equal(
        stored[f"{layer}mlp.up_gated_layer.weight"], model.bert.encoder.layer[1].mlp.up_gated_layer.weight
    )
    again = getattr(fastbert, name).from_pretrained(tmp_path)
    batch = batch_of()
    assert torch.equal(run(again, batch).logits, run(model, batch).logits)
    encoder = BertModel.from_pretrained(tmp_path)
    assert type(copy.deepcopy(encoder)) is type(pickle.loads(pickle.dumps(encoder))) is JinaCodeModel


def test_which_model_a_config_is_of(tmp_path: Path) -> None:
    """Catches the code model taken for another of Jina's, after saving too, and the reverse."""
    unnamed = {key: value for key, value in CONFIG.items() if key not in ("auto_map", "_name_or_path")}
    assert type(BertModel(BertConfig.from_dict(unnamed))) is JinaBertModel
    for named in ({"_name_or_path": "jinaai/jina-bert-v2-qk-post-norm"}, {"model_type": "jina_bert_code"}):
        config = BertConfig.from_dict({**unnamed, **named})
        config.save_pretrained(tmp_path)
        assert type(BertModel(BertConfig.from_pretrained(tmp_path))) is JinaCodeModel
    with pytest.raises(ValueError, match="feed_forward_type: got 'original', expected one of geglu, reglu"):
        BertModel(BertConfig.from_dict({**CONFIG, "feed_forward_type": "original"}))


def test_embeddings_and_attentions() -> None:
    """Catches embeddings in the place of ids, and attention weights without the norms of queries."""
    exact = code_model()
    exact.policy = ops.AUTO
    batch = {"inputs_embeds": randn(BATCH, LENGTH, 32), "attention_mask": mask("right")}
    judge = reference.encode(dict(exact.named_parameters()), exact.config, **batch)
    both = run(exact, batch, output_attentions=True)
    assert_close("embeddings", both[0], judge.last_hidden_state)
    for mine, expected in zip(both.attentions, judge.attentions, strict=True):
        assert_close("attentions", mine, expected)


def test_sentences(tmp_path: Path) -> None:
    """Catches a folder of the code model that is not pooled by the mean, or that is read as another model's."""
    texts = ["def add(a, b):", "return a + b", "a"]
    tokenizer = fastbert.Tokenizer.train(texts * 3, vocab_size=60)
    tokenizer.save_pretrained(tmp_path)
    model = code_model(dtype=torch.float32, config={"vocab_size": tokenizer.vocab_size})
    model.save_pretrained(tmp_path)
    encoder = fastbert.SentenceEncoder.from_pretrained(tmp_path, dtype="float32")
    assert type(encoder.model) is JinaCodeModel
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    state = reference.encode(dict(model.named_parameters()), model.config, ids, attention_mask).last_hidden_state
    expected = state.sum(1) / attention_mask.sum(1, keepdim=True)
    assert torch.allclose(torch.from_numpy(encoder.encode(texts)).double(), expected, atol=1e-4)
