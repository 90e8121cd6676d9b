"""Every argument of transformers' from_pretrained, save_pretrained and forward is taken or refused by name."""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.checkpoint.loading_arguments import (
    _SAVE_IGNORED,
    _SAVE_REFUSED,
    HUB,
    IGNORED,
    REFUSED,
    TAKEN,
    device_of,
    n_bytes,
)
from fastbert.models.inputs import HARMLESS
from fastbert.models.inputs import REFUSED as REFUSED_BY_FORWARD

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
IDS = torch.arange(5, 15).view(2, 5)
# What transformers 4.48 to 4.57 take besides the installed version.
OLDER = {"use_auth_token", "resume_download", "from_tf", "from_flax", "mirror", "_fast_init", "low_cpu_mem_usage",
         "offload_state_dict", "load_in_8bit", "load_in_4bit", "use_flash_attention_2", "code_revision"}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "mlm")
    return tmp_path / "mlm"


def theirs() -> set[str]:
    """Every name that from_pretrained of the installed transformers takes out of its arguments."""
    method = transformers.PreTrainedModel.from_pretrained.__func__
    source = inspect.getsource(method)
    popped = set(re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", source)) | set(re.findall(r"\"(\w+)\" in kwargs", source))
    named = {n for n, p in inspect.signature(method).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    return popped | named - {"cls", "pretrained_model_name_or_path"}


def test_every_argument_of_transformers_is_known() -> None:
    """Catches an argument that is called an unknown override of the config."""
    known = {*HUB, *TAKEN, *IGNORED, *REFUSED, "dtype", "weights_only", "revision"}
    assert len(theirs()) > 20
    assert theirs() | OLDER <= known, sorted((theirs() | OLDER) - known)


def test_every_ignored_argument_is_taken_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an argument that changes nothing and is refused, or one that is dropped without a word."""
    for name in IGNORED:
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastbert"):
            fastbert.BertModel.from_pretrained(folder, **{name: True})
            assert name.startswith("_") or f"ignores {name}=True" in caplog.text
            caplog.clear()
            fastbert.BertModel.from_pretrained(folder, **{name: None})
            assert "ignores" not in caplog.text


def test_every_refused_argument_is_named(folder: Path) -> None:
    """Catches an argument that asks for something and is dropped, or that asks for nothing and is refused."""
    for name in REFUSED:
        with pytest.raises(ValueError, match=f"^{name}: got "):
            fastbert.BertModel.from_pretrained(folder, **{name: "something"})
        for nothing in (None, False, {}):
            fastbert.BertModel.from_pretrained(folder, **{name: nothing})
    with pytest.raises(ValueError, match="weights_only: got False"):
        fastbert.BertModel.from_pretrained(folder, weights_only=False)
    with pytest.raises(TypeError, match="unknown config override nonsense"):
        fastbert.BertModel.from_pretrained(folder, nonsense=1)


def test_arguments_of_the_hub_with_a_local_folder(folder: Path, tmp_path: Path) -> None:
    """Catches an argument of the hub that a local folder refuses."""
    hub = {"cache_dir": tmp_path, "token": "x", "local_files_only": True, "force_download": False, "revision": "main"}
    fastbert.BertModel.from_pretrained(folder, use_safetensors=True, weights_only=True, use_auth_token=True, **hub)
    model = fastbert.BertModel.from_pretrained(pretrained_model_name_or_path=tmp_path, subfolder="mlm")
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    assert fastbert.BertConfig.from_pretrained(tmp_path, subfolder="mlm", **hub).vocab_size == 50
    with pytest.raises(FileNotFoundError, match=r"looked for pytorch_model.bin.index.json"):
        fastbert.BertModel.from_pretrained(folder, use_safetensors=False)


def test_dtype_and_device(folder: Path) -> None:
    """Catches torch_dtype or device_map that is taken and not followed."""
    assert fastbert.BertModel.from_pretrained(folder, torch_dtype=torch.float64).dtype == torch.float64
    assert fastbert.BertModel.from_pretrained(folder, torch_dtype="bfloat16").dtype == torch.bfloat16
    for device_map in ("cpu", "auto" if not torch.cuda.is_available() else "cpu", {"": "cpu"}, torch.device("cpu")):
        assert fastbert.BertModel.from_pretrained(folder, device_map=device_map).device.type == "cpu"
    assert device_of({"bert": "cuda:1", "cls": "cuda:1"}) == torch.device("cuda", 1) == device_of({"": "cuda:1"})
    assert device_of("cuda:1") == torch.device("cuda:1")
    for bad in ({"a": "cpu", "b": "cuda"}, "disk", "meta", "nowhere", {"": "disk"}, 1.5):
        with pytest.raises(ValueError, match="device_map: got "):
            fastbert.BertModel.from_pretrained(folder, device_map=bad)
    with pytest.raises(ValueError, match="device_map: got cpu, and device meta"):
        fastbert.BertModel.from_pretrained(folder, device_map="cpu", device="meta")


def test_pooling_layer(folder: Path) -> None:
    """Catches add_pooling_layer=False that keeps a pooler, or warns of a missing one."""
    assert fastbert.BertModel.from_pretrained(folder, add_pooling_layer=False).pooler is None
    with pytest.raises(TypeError, match="add_pooling_layer: BertForMaskedLM has no choice of it"):
        fastbert.BertForMaskedLM.from_pretrained(folder, add_pooling_layer=False)


def test_config_and_state_dict(folder: Path) -> None:
    """Catches a config or weights that are given and not used."""
    state = fastbert.BertForMaskedLM.from_pretrained(folder).state_dict()
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    config = transformers.BertConfig(**SIZES, num_labels=7)
    for source in (config, fastbert.BertConfig.from_dict(config.to_dict()), folder, str(folder / "config.json")):
        model = fastbert.BertForMaskedLM.from_pretrained(folder, config=source, state_dict=doubled)
        assert torch.equal(
            model.bert.encoder.layer[0].output.dense.weight, doubled["bert.encoder.layer.0.output.dense.weight"]
        )
        assert model.config.num_labels == (7 if source in (config,) or hasattr(source, "extra") else 2)
    bare = fastbert.BertForMaskedLM.from_pretrained(None, config=config, state_dict=state, hidden_dropout_prob=0.25)
    assert bare.config.hidden_dropout_prob == 0.25
    with pytest.raises(TypeError, match="config: expected a config, a folder or a hub id, got int"):
        fastbert.BertForMaskedLM.from_pretrained(folder, config=3)


def test_mismatched_sizes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches weights of another size that load, or that are started afresh without a word."""
    with pytest.raises(ValueError, match="do not have the shape"):
        fastbert.BertForMaskedLM.from_pretrained(folder, vocab_size=60)
    with caplog.at_level(logging.WARNING, "fastbert"):
        model, info = fastbert.BertForMaskedLM.from_pretrained(
            folder, vocab_size=60, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert model.bert.embeddings.word_embeddings.weight.shape == (60, 32)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert ("bert.embeddings.word_embeddings.weight", (50, 32), (60, 32)) in info["mismatched_keys"]
    assert "(50, 32), not (60, 32): freshly initialised" in caplog.text and model(IDS).logits.shape == (2, 5, 60)


def test_loading_info(folder: Path) -> None:
    """Catches names that are missing or unused and not told."""
    model, info = fastbert.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"} <= set(info["missing_keys"])
    assert "cls.predictions.bias" in info["unexpected_keys"] and info["error_msgs"] == []
    base, info = fastbert.BertModel.from_pretrained(folder, output_loading_info=True)
    assert base.pooler is None and "pooler.dense.weight" in info["missing_keys"]


def test_key_mapping(folder: Path) -> None:
    """Catches weights under other names that key_mapping translates and we do not find."""
    plain = fastbert.BertForMaskedLM.from_pretrained(folder)
    state = {name.replace("bert.", "model.encoder."): tensor for name, tensor in plain.state_dict().items()}
    mapped = fastbert.BertForMaskedLM.from_pretrained(
        folder, state_dict=state, key_mapping={r"^model\.encoder\.": "bert."}
    )
    assert torch.equal(mapped(IDS).logits, plain(IDS).logits)


def test_saving(folder: Path, tmp_path: Path) -> None:
    """Catches an argument of save_pretrained that is taken and not followed, or not known."""
    model = fastbert.BertForMaskedLM.from_pretrained(folder)
    names = set(inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters)
    ours = set(inspect.signature(model.save_pretrained).parameters)
    assert names - {"self", "kwargs"} <= ours | set(_SAVE_IGNORED) | set(_SAVE_REFUSED)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    for name in _SAVE_IGNORED:
        model.save_pretrained(save_directory=tmp_path / "a", **{name: True})
    for name in _SAVE_REFUSED:
        with pytest.raises(ValueError, match=f"^{name}: got True"):
            model.save_pretrained(tmp_path / "b", **{name: True})
    with pytest.raises(ValueError, match="safe_serialization: got False"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        model.save_pretrained(tmp_path / "b", nonsense=1)
    assert not (tmp_path / "b").exists()
    model.save_pretrained(tmp_path / "c", max_shard_size="5KB", variant="fp16")
    assert len(list((tmp_path / "c").glob("model.fp16-*.safetensors"))) > 1
    for again in (fastbert.BertForMaskedLM, transformers.BertForMaskedLM):
        loaded = again.from_pretrained(tmp_path / "c", variant="fp16").eval()
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "d", state_dict=zeros)
    assert not fastbert.BertForMaskedLM.from_pretrained(tmp_path / "d").cls.predictions.bias.any()


@pytest.mark.parametrize(("text", "size"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("20kB", 20_000)])
def test_sizes_as_text(text: Any, size: int) -> None:
    """Catches a unit that is read as another."""
    assert n_bytes(text) == size
    with pytest.raises(ValueError, match="max_shard_size: got 'much'"):
        n_bytes("much")


MODELS = ["BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
          "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_arguments_of_forward(name: str) -> None:
    """Catches an argument of transformers that asks for nothing and raises, or for something and does not."""
    model = getattr(fastbert, name)(fastbert.BertConfig(**SIZES)).eval()
    taken = inspect.signature(model.forward).parameters
    wanted = inspect.signature(getattr(transformers, name).forward).parameters.values()
    assert {p.name for p in wanted if p.kind is not p.VAR_KEYWORD} - {"self"} <= taken.keys()
    assert all(p.kind is not p.VAR_KEYWORD for p in taken.values())
    expected = model(IDS)[0]
    for argument in (*HARMLESS, *REFUSED_BY_FORWARD):
        assert torch.equal(model(IDS, **{argument: None})[0], expected)
    assert torch.equal(model(IDS, use_cache=False)[0], expected) and torch.equal(
        model(IDS, use_cache=True)[0], expected
    )
    for argument in REFUSED_BY_FORWARD:
        with pytest.raises(ValueError, match=f"^{argument}: got a Tensor, expected None"):
            model(IDS, **{argument: torch.ones(1)})
    with pytest.raises(TypeError, match="nonsense"):
        model(IDS, nonsense=None)


def test_masks_of_one_row() -> None:
    """Catches (1, S) masks and segments, which transformers takes for every row, refused or misread."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    ours = fastbert.BertModel(fastbert.BertConfig(**SIZES)).eval()
    ours.load_state_dict(theirs.state_dict())
    mask, token_type_ids = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 1]])
    expected = theirs(IDS, attention_mask=mask.expand(2, 5), token_type_ids=token_type_ids)[0][:, :4]
    came = ours(IDS, attention_mask=mask, token_type_ids=token_type_ids)[0][:, :4]
    torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=re.escape("attention_mask: expected shape (2, 5) as input_ids, got (2, 4)")):
        ours(IDS, attention_mask=torch.ones(2, 4))


def test_settings_written_later() -> None:
    """Catches a setting of model.config that is written after loading and has no effect."""
    model = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SIZES)).eval()
    config = model.config
    config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 2
    config.update({"output_hidden_states": False, "output_attentions": True})
    output = model(IDS)
    assert output.hidden_states is None and output.attentions[0].shape == (2, 4, 5, 5)
    config.output_attentions = False
    config.return_dict = False
    assert isinstance(model(IDS), tuple) and not config.use_return_dict
    config.return_dict, config.torchscript = True, True
    assert isinstance(model(IDS), tuple)
    config.torchscript = False
    config.problem_type = "multi_label_classification"
    loss = model(IDS, labels=torch.ones(2, 2)).loss
    torch.testing.assert_close(
        loss, torch.nn.functional.binary_cross_entropy_with_logits(model(IDS).logits, torch.ones(2, 2))
    )
    config.num_labels = 5
    assert config.id2label[4] == "LABEL_4" and config.label2id["LABEL_4"] == 4
    config.id2label = {"0": "no", "1": "yes"}
    assert config.num_labels == 2 and config.id2label == {0: "no", 1: "yes"}
    config.label2id = {"yes": 0, "no": 1}
    assert config.id2label == {0: "yes", 1: "no"}
    for name in ("is_decoder", "add_cross_attention"):
        setattr(config, name, False)
        with pytest.raises(ValueError, match=f"{name}: got True"):
            setattr(config, name, True)


def test_config_has_what_transformers_configs_have(tmp_path: Path) -> None:
    """Catches an attribute or a method of a config that tools read and ours lacks."""
    theirs, ours = transformers.BertConfig(**SIZES), fastbert.BertConfig(**SIZES)
    for name, value in theirs.to_dict().items():
        if name not in ("transformers_version", "model_type"):
            assert getattr(ours, name) == value, name
    assert ours.get_text_config() is ours and ours.is_encoder_decoder is False and not hasattr(ours, "text_config")
    assert not hasattr(ours, "quantization_config") and not hasattr(ours, "pretraining_tp")
    assert json.loads(ours.to_json_string()) == {**SIZES, "model_type": "bert"}
    ours.use_cache, ours.custom, ours._note = False, [1], object()
    ours.to_json_file(tmp_path / "config.json")
    again = fastbert.BertConfig.from_json_file(tmp_path / "config.json")
    assert again.use_cache is False and again.custom == [1] and again == ours
    distil = fastbert.BertConfig.from_dict({"model_type": "distilbert", "dim": 32, "n_heads": 4})
    distil.dropout = 0.3
    assert distil.dim == 32 and distil.hidden_dropout_prob == 0.3 and distil.n_layers == 6
    named = fastbert.BertConfig(**SIZES, num_labels=3, output_attentions=True, torch_dtype=torch.float16)
    assert (named.num_labels, named.output_attentions, named.dtype) == (3, True, "float16")
    with pytest.raises(TypeError, match="unknown config override hiden_size"):
        fastbert.BertConfig(hiden_size=3)
