"""Nomic and GTE give what transformers' classes and the reference give, from transformers' files and the hub's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fastbert
from family_cases import head_batch, make_batch, our_state, run, their_class, theirs, twin
from fastbert import reference
from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.rotary import gated_rotary_layer
from helpers import assert_as_accurate, cu_seqlens_of
from model_cases import BATCH, LENGTH, MASKS, VOCAB, assert_close, generator, in_dtype, randn, valid_of

FAMILY = pytest.mark.parametrize("model_type", ["gte", "nomic_bert"])
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 37}
NEW = {  # config.json of Alibaba-NLP/gte-base-en-v1.5 as it was published, but for the sizes
    "architectures": ["NewModel"], "attention_probs_dropout_prob": 0.0, "auto_map": {"AutoModel": "modeling.NewModel"},
    "classifier_dropout": None, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
    "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm", "logn_attention_clip1": False,
    "logn_attention_scale": False, "max_position_embeddings": 8192, "model_type": "new", "pack_qkv": True,
    "pad_token_id": 0, "position_embedding_type": "rope", "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "rope_theta": 500000, "torch_dtype": "float32", "transformers_version": "4.39.1", "type_vocab_size": 0,
    "unpad_inputs": False, "use_memory_efficient_attention": False, "vocab_size": VOCAB, **SIZES,
}  # fmt: skip
NOMIC = {  # config.json of nomic-ai/nomic-embed-text-v1.5 as it was published, but for the sizes
    "activation_function": "swiglu", "architectures": ["NomicBertModel"], "attn_pdrop": 0.0, "causal": False,
    "embd_pdrop": 0.0, "fused_bias_fc": True, "fused_dropout_add_ln": True, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "model_type": "nomic_bert", "n_embd": 32, "n_head": 2, "n_inner": 37, "n_layer": 2, "n_positions": 8192,
    "parallel_block": False, "prenorm": False, "qkv_proj_bias": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None, "scale_attn_weights": True, "tie_word_embeddings": True, "torch_dtype": "float32",
    "type_vocab_size": 2, "use_rms_norm": False, "vocab_size": VOCAB,
}  # fmt: skip


def check(ours: Any, model: Any, batch: dict[str, Any]) -> None:
    """Hidden states equal transformers' at tokens, are zero elsewhere, and are those of the reference."""
    mine, other = (run(m, batch, output_hidden_states=True) for m in (ours, model))
    judge = reference.encode(dict(ours.named_parameters()), ours.config, **batch)
    mask = batch.get("attention_mask")
    valid = torch.ones(mine[0].shape[:2], dtype=torch.bool) if mask is None else valid_of(mask)
    triples = zip(mine.hidden_states, other.hidden_states, judge.hidden_states, strict=True)
    for i, (state, expected, judged) in enumerate(triples):
        assert_close(f"hidden_states[{i}]", state[valid], expected[valid])
        assert_close(f"reference, hidden_states[{i}]", state, judged)
        assert (state[~valid] == 0).all()


@FAMILY
@pytest.mark.parametrize("kind", MASKS)
def test_float64_matches_transformers(model_type: str, kind: str) -> None:
    """Catches a base, gate, bias, segment or norm that is off."""
    model = theirs(model_type)
    ours, batch = twin(model), make_batch(model_type, kind)
    check(ours, model, batch)
    if model_type == "nomic_bert":
        segments = torch.randint(2, (BATCH, LENGTH), generator=generator(8))
        check(ours, model, {**batch, "token_type_ids": segments})
    check(ours, model, {"inputs_embeds": randn(BATCH, LENGTH, 32), "attention_mask": batch["attention_mask"]})


def test_without_segments_and_packed() -> None:
    """Catches a table of segments where a checkpoint has none, and positions that go on from the text before."""
    model = theirs("gte", type_vocab_size=0)
    ours = twin(model)
    assert ours.embeddings.token_type_embeddings is None
    check(ours, model, make_batch("gte", "holes"))
    lengths = [5, 0, 1, 30]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator(6))
    alone = [run(model, {"input_ids": text[None]})[0][0] for text in ids.split(lengths) if len(text)]
    assert_close("forward_packed", ours.forward_packed(ids, cu_seqlens_of(lengths)), torch.cat(alone))


@FAMILY
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"])
def test_heads_and_files(model_type: str, name: str, tmp_path: Path) -> None:
    """Catches a head with another pooler or activation, and a tensor lost on the way to a file and back."""
    model = theirs(model_type, name)
    model.save_pretrained(tmp_path / "theirs")
    ours = getattr(fastbert, name).from_pretrained(tmp_path / "theirs", backend="cpu")
    assert ours.missing_names == []
    batch = head_batch(model_type, name, "right")
    rows: Any = valid_of(batch["attention_mask"]) if name != "BertForSequenceClassification" else slice(None)
    mine, other = run(ours, batch), run(model, batch)
    assert_close(name, mine.logits[rows], other.logits[rows])
    task = {v: k for k, v in reference.heads._CLASSES.items()}[name.removeprefix("BertFor")]
    judge = reference.head(task, dict(ours.named_parameters(remove_duplicate=False)), ours.config, **batch)
    assert_close("reference", mine.logits, judge["logits"])
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close("saved", run(again, batch).logits[rows], other.logits[rows])


@FAMILY
def test_gradients_and_policy(model_type: str) -> None:
    """Catches a parameter that is trained on another one's gradient, and numbers that are rounded too often."""
    model, batch = theirs(model_type), make_batch(model_type, "right")
    valid = valid_of(batch["attention_mask"])
    for dtype in (torch.float32, torch.bfloat16):
        eager, exact = in_dtype(model, dtype), in_dtype(in_dtype(model, dtype), torch.float64)
        outputs = [run(m, batch)[0][valid] for m in (twin(model, dtype=dtype), eager, exact)]
        assert_as_accurate(model_type, *outputs)
    ours, weights = twin(model), randn(BATCH, LENGTH, 32)
    for m in (ours, model):
        (m(**batch).last_hidden_state * weights)[valid].sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[ours.config.family.to_theirs(name)].grad
        if not name.endswith("k_proj.bias"):  # rounding alone
            assert_close(name, parameter.grad, gradient, 1e-9)


# The hub's own files


def as_published(model: Any, model_type: str) -> dict[str, torch.Tensor]:
    """The tensors of a model of transformers as the hub's own code names and fuses them."""
    state = {name: t.float() for name, t in model.state_dict().items()}
    table = {
        "gte": {"layers.": "encoder.layer.", "self_attn.o_proj": "attention.o_proj", "post_mlp_layernorm": "mlp_ln",
                "post_attention_layernorm": "attn_ln"},
        "nomic_bert": {"layers.": "encoder.layers.", "embeddings.LayerNorm": "emb_ln", "self_attn.o_proj":
                       "attn.out_proj", "up_proj": "fc11", "gate_proj": "fc12", "down_proj": "fc2",
                       "post_attention_layernorm": "norm1", "post_mlp_layernorm": "norm2"},
    }[model_type]  # fmt: skip
    fused = {"q_proj": "attention.qkv_proj" if model_type == "gte" else "attn.Wqkv"}
    published = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name or (model_type == "gte" and ".mlp.gate_proj" in name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", fused["q_proj"])
        elif model_type == "gte" and ".mlp.up_proj" in name:
            tensor = torch.cat([tensor, state[name.replace("up_proj", "gate_proj")]])
            name = name.replace("up_proj", "up_gate_proj")
        for before, after in table.items():
            name = name.replace(before, after, 1)
        published[name] = tensor.contiguous()
    return published


@FAMILY
@pytest.mark.parametrize("prefix", ["", "new."])
def test_published_files(model_type: str, prefix: str, tmp_path: Path) -> None:
    """Catches a fused tensor that is cut elsewhere, up and gate exchanged, or code of the hub's that runs."""
    options = {"type_vocab_size": 0} if model_type == "gte" else {}
    model = theirs(model_type, **options).float()
    folder = tmp_path / "hub"
    folder.mkdir()
    prefix = prefix if model_type == "gte" else prefix.replace("new.", "bert.")
    save_file({prefix + n: t for n, t in as_published(model, model_type).items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(NEW if model_type == "gte" else NOMIC))
    (folder / "modeling.py").write_text("raise RuntimeError('it ran')")
    ours = fastbert.BertModel.from_pretrained(folder, backend="cpu").double()
    model = model.double()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in our_state(model).items()}
    batch = make_batch(model_type, "right")
    if model_type == "gte":
        assert ours.config.model_type == "gte"
        layer = gated_rotary_layer(ours.config)
        assert layer.base == 1_000_000 and layer.factor == 2 ** (2 / 16)
        model.config.rope_parameters.update(rope_theta=1_000_000.0, rope_type="linear", factor=layer.factor)
        moved = their_class(model_type, "BertModel")(model.config).double().eval()
        moved.load_state_dict(model.state_dict())
        model = moved
    valid = valid_of(batch["attention_mask"])
    assert_close("published", run(ours, batch)[0][valid], run(model, batch)[0][valid])
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert type(again) is type(model)
    assert_close("saved", run(again, batch)[0][valid], run(model, batch)[0][valid])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**NOMIC, "rotary_emb_interleaved": True}, "rotary_emb_interleaved: got True, expected False"),
        ({**NOMIC, "activation_function": "gelu"}, "activation_function: got 'gelu', expected 'swiglu'"),
        ({**NEW, "logn_attention_scale": True}, "logn_attention_scale: got True, expected False"),
        ({**NEW, "position_embedding_type": "absolute"}, "position_embedding_type: got 'absolute', but only 'rope'"),
        ({**NEW, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type: got 'yarn', expected 'default'"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    """Catches a setting of the hub's own code that is ignored, so that other numbers come out."""
    with pytest.raises(ValueError, match=message):
        fastbert.BertConfig.from_dict(settings)
    assert FAMILIES["gte"].text == FAMILIES["nomic_bert"].text


def test_sentence_encoder(tmp_path: Path) -> None:
    """Catches a sentence encoder that adds BERT's positions, or that sentence-transformers reads as another."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = fastbert.Tokenizer.train(["small boats cross the river", "is it wide?"] * 3, vocab_size=60)
    tokenizer.save_pretrained(tmp_path)
    theirs("nomic_bert").float().save_pretrained(tmp_path)
    texts = ["small boats", "is the river wide? small boats cross it", ""]
    expected = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    ours = fastbert.SentenceEncoder.from_pretrained(tmp_path, dtype="float32").encode(texts)
    assert_close("encode", torch.from_numpy(ours), torch.from_numpy(expected), 2e-6)
