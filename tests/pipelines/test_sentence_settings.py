"""Each setting of a sentence-transformers folder is followed as there, or refused by name."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastbert import BertForSequenceClassification, BertModel, CrossEncoder, SentenceEncoder, Tokenizer
from fastbert.pipelines import settings
from fastbert.pipelines.cross import ACTIVATION_CLASSES
from fastbert.pipelines.modules import ACTIVATIONS, Dense
from helpers import tiny_bert

TEXTS = ["The River is wide and slow, and Small Boats cross it every morning", "a fish", "", "Fish! and more of it"]
NAMES = settings.TRANSFORMER_CONFIGS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Dense module, a cased vocabulary and no settings of the Transformer module."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    config, tokenizer = tiny_bert([*TEXTS, *map(str.lower, TEXTS)] * 3, 150, lowercase=False)
    SentenceEncoder(BertModel(config), tokenizer, "mean", [Dense(32, 32, activation="Tanh")]).save_pretrained(folder)
    (folder / NAMES[0]).unlink()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "folder")
    return tmp_path / "folder"


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def theirs(folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


def assert_same(folder: Path, tolerance: float = 1e-9, **options: Any) -> SentenceEncoder:
    """Vectors are those of sentence-transformers in float64. In float32 processors differ by what weights magnify."""
    ours, other = SentenceEncoder.from_pretrained(folder, device="cpu", **options), theirs(folder, **options)
    result, expected = copy.deepcopy(ours).double().encode(TEXTS), other.double().encode(TEXTS)
    assert result.shape == expected.shape and np.abs(result - expected).max() <= tolerance
    assert result.dtype == expected.dtype == np.float64 and ours.encode(TEXTS).dtype == np.float32
    return ours


def test_the_names_are_those_of_sentence_transformers() -> None:
    """Catches a name that sentence-transformers looks for and we do not, or in another order."""
    from sentence_transformers.models import Transformer

    looked_for = re.findall(r"sentence_[\w-]+_config\.json", inspect.getsource(Transformer.load_config))
    assert tuple(dict.fromkeys(looked_for)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_read(folder: Path, name: str) -> None:
    """Catches a limit and a lower-casing that stand under a name that is not read."""
    write(folder / name, {"max_seq_length": 7, "do_lower_case": True})
    ours = assert_same(folder)
    assert ours.max_seq_length == 7 and ours.tokenizer.tokenize("River") == ours.tokenizer.tokenize("river")


def test_the_first_name_that_says_anything_counts(folder: Path) -> None:
    """Catches an empty file that hides the next, and a later name that counts before an earlier."""
    write(folder / NAMES[0], {})
    write(folder / NAMES[2], {"max_seq_length": 6})
    write(folder / NAMES[1], {"max_seq_length": 9})
    assert assert_same(folder).max_seq_length == 9
    write(folder / NAMES[0], {"max_seq_length": 5})
    assert assert_same(folder).max_seq_length == 5


def test_settings_in_the_folder_of_the_transformer(folder: Path) -> None:
    """Catches settings that are looked for in the root where the model is in 0_Transformer."""
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write(folder / "modules.json", modules)
    (folder / "0_Transformer").mkdir()
    for file in folder.glob("*.*"):
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(folder / "0_Transformer" / file.name)
    write(folder / NAMES[1], {"max_seq_length": 5})
    write(folder / "0_Transformer" / NAMES[1], {"max_seq_length": 8})
    assert assert_same(folder).max_seq_length == 8


def test_settings_beside_a_plain_checkpoint(folder: Path) -> None:
    """Catches settings followed where sentence-transformers, for want of modules.json, does not look at them."""
    (folder / "modules.json").unlink()
    write(folder / NAMES[0], {"max_seq_length": 5})
    assert assert_same(folder).max_seq_length == 40


@pytest.mark.parametrize(
    ("file", "settings"),
    [("tokenizer_config.json", {"padding_side": "left"}), (NAMES[0], {"tokenizer_args": {"padding_side": "left"}})],
)
def test_padding_on_the_left_is_said(folder: Path, file: str, settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a folder whose texts are padded on the left elsewhere, and get other vectors here without a word."""
    stored = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    write(folder / file, {**stored, **settings})
    with caplog.at_level("WARNING", "fastbert"):
        encoder = SentenceEncoder.from_pretrained(folder, device="cpu")
    assert "padding_side='left' is not followed" in caplog.text
    alone, together = encoder.encode(TEXTS[:1]), encoder.encode(TEXTS)
    assert np.abs(alone[0] - together[0]).max() < 1e-6


def test_every_key_of_sentence_transformers_is_known(saved: Path, tmp_path: Path) -> None:
    """Catches a key of sentence-transformers that is neither followed nor passed over nor refused here."""
    from sentence_transformers import models
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    others = {"SpladePooling": SpladePooling, "MultiVectorMask": MultiVectorMask}
    known = settings.FOLLOWED | settings.EXPECTED | settings.TASKS | settings.REFUSED | settings.HARMLESS
    keys = set(inspect.signature(inspect.unwrap(models.Transformer.__init__)).parameters) - {
        "self",
        "model_name_or_path",
    }
    assert keys | set(getattr(models.Transformer, "config_keys", ())) <= known
    for kind, expected in settings.MODULE_KEYS.items():
        module = others.get(kind) or getattr(models, kind)
        renamed = getattr(module, "config_key_renames", {})
        assert {*module.config_keys, *renamed} <= expected, kind
    other = theirs(saved)
    other.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert set(stored) <= settings.MODEL_KEYS | settings.MODEL_KEYS_HARMLESS
    assert all(set(entry) <= settings.MODULES_KEYS for entry in json.loads((tmp_path / "modules.json").read_text()))


FOLLOWED: list[Any] = [
    {"model_args": {"torch_dtype": "float32", "attn_implementation": "eager", "trust_remote_code": True}},
    {"model_args": {"attn_implementation": "sdpa", "low_cpu_mem_usage": True, "add_pooling_layer": False}},
    {"tokenizer_args": {"model_max_length": 6, "use_fast": True}, "max_seq_length": 11},
    {"tokenizer_args": {"do_lower_case": True}},
    {"config_args": {"output_attentions": True, "use_cache": False, "attention_probs_dropout_prob": 0.3}},
    {"processing_kwargs": {"text": {"max_length": 6, "truncation": "longest_first"}}, "max_seq_length": 9},
    {"processing_kwargs": {"common": {"max_length": 6}, "text": {"padding": "longest"}}},
    {"unpad_inputs": False, "transformer_task": "feature-extraction", "query_length": None},
    {
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
    },
]


@pytest.mark.parametrize("content", FOLLOWED, ids=str)
def test_settings_that_are_followed(folder: Path, content: dict[str, Any]) -> None:
    """Catches a setting without effect on the numbers that is refused, and one with an effect that is not followed."""
    write(folder / NAMES[0], content)
    assert_same(folder)


REFUSED: list[tuple[Any, str]] = [
    ({"model_args": {"quantization_config": {}}}, "model_args has quantization_config"),
    ({"model_args": {"file_name": "model.onnx"}}, "model_args has file_name"),
    ({"model_args": 3}, "model_args is 3, expected an object"),
    ({"tokenizer_args": {"foo": 1}}, "tokenizer_args: .*foo"),
    ({"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path is 'other'"),
    ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs: add_special_tokens is False"),
    ({"processing_kwargs": {"text": {"max_length": "5"}}}, "processing_kwargs: max_length is '5'"),
    ({"query_length": 32}, "query_length is 32"),
    ({"query_expansion": {"length": 32}}, "query_expansion is"),
    ({"module_output_name": "sentence_embedding"}, "module_output_name is 'sentence_embedding'"),
    (
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
        "modality_config is .*pooler_output",
    ),
    ({"modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}}}, "modality_"),
    ({"pooling": "cls"}, "the key 'pooling' is not supported"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_that_are_refused(folder: Path, content: dict[str, Any], message: str) -> None:
    """Catches a setting that would change the vectors, and is left aside in silence."""
    write(folder / NAMES[3], content)
    with pytest.raises(ValueError, match=f"{NAMES[3]}.*{message}"):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_dtypes_of_the_settings(folder: Path) -> None:
    """Catches a dtype of the folder, of model_kwargs or of the caller that is not followed, or in another order."""
    write(folder / NAMES[0], {"model_args": {"torch_dtype": "float16"}})

    def dtype(**options: Any) -> torch.dtype:
        return SentenceEncoder.from_pretrained(folder, device="cpu", **options).dtype

    assert dtype() == torch.float16
    assert dtype(model_kwargs={"dtype": torch.float64}) == torch.float64
    assert dtype(model_kwargs={"torch_dtype": "bfloat16"}) == torch.bfloat16
    assert dtype(model_kwargs={"torch_dtype": "bfloat16"}, dtype="float32") == torch.float32
    assert dtype(torch_dtype="bfloat16", device_map="cpu", attn_implementation="sdpa") == torch.bfloat16
    write(folder / NAMES[0], {"config_args": {"torch_dtype": "float16"}})
    assert dtype() == torch.float16


def test_arguments_of_sentence_transformer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an argument of SentenceTransformer(...) that is unknown here, and one that is not followed as there."""
    write(folder / NAMES[0], {"max_seq_length": 11})
    for arguments in (
        {"prompts": {"query": "boats: ", "q": "a "}, "default_prompt_name": "q"},
        {"similarity_fn_name": "dot", "truncate_dim": 5},
        {"model_kwargs": {"attn_implementation": "eager"}, "trust_remote_code": True, "local_files_only": True},
        {"tokenizer_kwargs": {"model_max_length": 5}},
        {"config_kwargs": {"hidden_dropout_prob": 0.5}, "token": False, "cache_folder": str(folder)},
    ):
        options = {key: value for key, value in arguments.items() if key != "local_files_only"}
        ours = assert_same(folder, **options)
        other = theirs(folder, **options)
        assert ours.prompts == other.prompts and ours.similarity_fn_name == other.similarity_fn_name
        assert ours.max_seq_length == min(other.max_seq_length, 40)
        assert ours.get_embedding_dimension() == other.get_embedding_dimension()
    load = SentenceEncoder.from_pretrained
    with pytest.raises(TypeError, match="model_kwargs: got quantization_config"):
        load(folder, model_kwargs={"quantization_config": 1})
    with pytest.raises(TypeError, match="processor_kwargs: got dict and dict|tokenizer_kwargs"):
        load(folder, tokenizer_kwargs={}, processor_kwargs={})
    with pytest.raises(TypeError, match="model_kwargs: got str, expected a dict"):
        load(folder, model_kwargs="float16")
    with pytest.raises(ValueError, match="backend: .*onnx"):
        load(folder, backend="onnx")
    with pytest.raises(ValueError, match="device_map: got .*expected one device"):
        load(folder, model_kwargs={"device_map": {"a": "cpu", "b": "meta"}})
    with pytest.raises(TypeError, match="output_loading_info: got True"):
        load(folder, output_loading_info=True)
    inner = load(folder.parent, subfolder=folder.name, force_download=True, device="cpu")
    assert np.array_equal(inner.encode(TEXTS), load(folder, device="cpu").encode(TEXTS))
    with pytest.raises(TypeError, match="num_beams"):
        load(folder, num_beams=4)


def test_keys_of_the_model_settings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches requirements of the author, and arguments of modules, that are passed over without a word."""
    file = folder / "config_sentence_transformers.json"
    write(file, {**json.loads(file.read_text()), "requirements": {"transformers": ">=4"}, "prompts": None})
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["kwargs"] = ["task"]
    write(folder / "modules.json", modules)
    with caplog.at_level(logging.WARNING, "fastbert"):
        SentenceEncoder.from_pretrained(folder, device="cpu")
    assert "requirements has no effect" in caplog.text and "ignores the argument task of a call" in caplog.text
    modules[0]["optional"] = True
    write(folder / "modules.json", modules)
    with pytest.raises(ValueError, match=r"modules\.json: the key 'optional' is not supported"):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    """Catches a PEFT adapter that sentence-transformers would load, and whose weights would be missing here."""
    write(folder / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match=r"adapter_config\.json: the checkpoint is a PEFT adapter"):
        SentenceEncoder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_dense(folder: Path, name: str) -> None:
    """Catches an activation function with other numbers than sentence-transformers' Dense gives it, on any path."""
    for path in (f"{getattr(nn, name).__module__}.{name}", f"torch.nn.{name}"):
        file = folder / "2_Dense" / "config.json"
        write(file, {**json.loads(file.read_text()), "activation_function": path})
        ours = assert_same(folder)
    ours.save_pretrained(folder / "again")
    assert json.loads((folder / "again/2_Dense/config.json").read_text())["activation_function"].endswith(f".{name}")
    assert_same(folder / "again")


@pytest.mark.parametrize("out_features", [32, 9])
def test_residual_of_dense(saved: Path, tmp_path: Path, out_features: int) -> None:
    """Catches a residual that is left out, added before the activation, or lost in a saved folder."""
    torch.manual_seed(3)
    base = SentenceEncoder.from_pretrained(saved, device="cpu")
    dense = Dense(32, out_features, activation="ReLU", use_residual=True)
    SentenceEncoder(base.model, base.tokenizer, "mean", [dense]).save_pretrained(tmp_path)
    assert_same(tmp_path)
    expected = theirs(tmp_path).encode(TEXTS)
    assert np.abs(expected).max() > 0.05


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cross")
    config, tokenizer = tiny_bert(TEXTS * 3, 150, id2label={i: f"LABEL_{i}" for i in range(3)})
    tokenizer.save_pretrained(folder)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def their_cross(folder: Path, **options: Any) -> Any:
    from sentence_transformers import CrossEncoder as Theirs

    return Theirs(str(folder), device="cpu", local_files_only=True, **options)


PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


def assert_same_scores(ours: CrossEncoder, other: Any) -> None:
    """Scores of models in float64, which both round to float32, are the same but for the last bit."""
    scores, expected = ours.double().predict(PAIRS), other.double().predict(PAIRS)
    assert scores.dtype == expected.dtype == np.float32
    assert np.abs(scores - expected).max() <= 2e-7 * max(np.abs(expected).max(), 1.0)


@pytest.mark.parametrize("name", ACTIVATION_CLASSES)
def test_activations_of_cross_encoders(cross: Path, tmp_path: Path, name: str) -> None:
    """Catches an activation function that is refused, or gives other scores than in sentence-transformers."""
    kind = getattr(nn, name)
    CrossEncoder.from_pretrained(cross, device="cpu", activation_fn=kind()).save_pretrained(tmp_path)
    ours, other = CrossEncoder.from_pretrained(tmp_path, device="cpu"), their_cross(tmp_path)
    assert type(ours.activation_fn) is type(other.activation_fn) is kind
    assert_same_scores(ours, other)
    again = CrossEncoder.from_pretrained(tmp_path, device="cpu")
    again.save_pretrained(tmp_path / "again")


def test_an_activation_with_arguments_is_not_saved(cross: Path, tmp_path: Path) -> None:
    """Catches a tanh GELU that comes back as another one, because the folder holds the name of the class alone."""
    ours = CrossEncoder.from_pretrained(cross, device="cpu", activation_fn=nn.GELU(approximate="tanh"))
    with pytest.raises(ValueError, match="activation_fn: got GELU.*whose arguments cannot be saved"):
        ours.save_pretrained(tmp_path)


def test_settings_of_cross_encoders(cross: Path, tmp_path: Path) -> None:
    """Catches settings and arguments that a SentenceEncoder follows and a CrossEncoder does not."""
    their_cross(cross, max_length=30).save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / NAMES[0]).read_text())
    (tmp_path / NAMES[0]).unlink()
    write(tmp_path / NAMES[5], {**stored, "processing_kwargs": {"text": {"max_length": 9}}})
    ours, other = CrossEncoder.from_pretrained(tmp_path, device="cpu"), their_cross(tmp_path)
    assert_same_scores(ours, other)
    options: dict[str, Any] = {"num_labels": 3, "max_length": 8, "model_kwargs": {"torch_dtype": "float32"}}
    ours, other = CrossEncoder.from_pretrained(cross, device="cpu", **options), their_cross(cross, **options)
    assert_same_scores(ours, other)
    write(
        tmp_path / NAMES[5], {**stored, "modality_config": {"text": {"method": "forward", "method_output_name": "x"}}}
    )
    with pytest.raises(ValueError, match="modality_config"):
        CrossEncoder.from_pretrained(tmp_path, device="cpu")


def test_tokenizer_of_the_folder(folder: Path) -> None:
    """Catches a tokenizer's own limit that is lost where the settings have none."""
    write(folder / NAMES[0], {"do_lower_case": False})
    tokenizer = Tokenizer.from_pretrained(folder, model_max_length=6)
    tokenizer.save_pretrained(folder)
    assert assert_same(folder).max_seq_length == 6
