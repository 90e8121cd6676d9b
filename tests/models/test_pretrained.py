"""Models go from transformers to us and back by from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastbert
from model_cases import (
    HEADS,
    MODELS,
    assert_close,
    make_batch,
    run,
    theirs,
)
from pretrained_cases import (
    WEIGHTS,
    assert_same_outputs,
    assert_same_state,
    edit_weights,
    our_class,
    outputs,
    their_class,
    warnings_of,
)


def edit(folder: Path, **settings: Any) -> None:
    """Changes a config.json; None takes a setting away."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves a cached model of transformers to a folder of its own."""

    def save(name: str = "BertModel", **options: Any) -> Path:
        folder = tmp_path / name
        theirs(name, "tiny", **options).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_state_dict_names_are_those_of_transformers(name: str, tie: bool) -> None:
    """Catches a parameter or buffer of another name or shape, which no checkpoint, adapter or optimiser finds."""
    model = theirs(name, "tiny", tie_word_embeddings=tie)
    config = fastbert.BertConfig.from_dict(model.config.to_dict())
    ours = our_class(name)(config).double()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in model.named_parameters()]
    ours.load_state_dict(model.state_dict(), strict=True)
    back = their_class(name)(model.config).double()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(back.state_dict(), model.state_dict())


# Round trips
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tie: bool, saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a weight that is lost, cast, renamed or started afresh on the way from transformers to us and back."""
    model = theirs(name, "tiny", tie_word_embeddings=tie)
    ours = our_class(name).from_pretrained(saved(name, tie_word_embeddings=tie))
    assert not ours.training and ours.dtype == torch.float64 and ours.missing_names == []
    assert_same_state(ours.state_dict(), model.state_dict())
    assert_same_outputs(ours, model, name)

    ours.save_pretrained(tmp_path / "ours")
    back, info = their_class(name).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert back.dtype == torch.float64
    assert_same_state(back.state_dict(), model.state_dict())
    assert_same_outputs(back.eval(), model, name)

    again = our_class(name).from_pretrained(tmp_path / "ours")
    assert_same_state(again.state_dict(), model.state_dict())
    assert warnings_of(caplog) == []
    stored = set(load_file(tmp_path / "ours" / WEIGHTS))
    assert stored == set(load_file(tmp_path / name / WEIGHTS))


@pytest.mark.parametrize("name", HEADS)
def test_config_round_trip(name: str, saved: Any, tmp_path: Path) -> None:
    """Catches labels, dropout or a setting of others that saving loses, or a wrong architecture."""
    folder = saved(name, classifier_dropout=0.25, problem_type="regression")
    edit(folder, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}, a_setting_of_others=[1, 2])
    edit_weights(folder, drop=("classifier",))
    ours = our_class(name).from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "ours"))
    assert after["architectures"] == [name] and after["dtype"] == "float64" and after["model_type"] == "bert"
    for key in ("id2label", "label2id", "classifier_dropout", "problem_type", "a_setting_of_others", "vocab_size"):
        assert after[key] == before[key], key


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_shards(name: str, saved: Any, tmp_path: Path) -> None:
    """Catches a tensor that is lost between shards, theirs or ours."""
    model, theirs_folder = theirs(name), tmp_path / "theirs"
    model.save_pretrained(theirs_folder, max_shard_size="20KB")
    assert len(list(theirs_folder.glob("model-*.safetensors"))) > 2
    ours = our_class(name).from_pretrained(theirs_folder)
    assert_same_state(ours.state_dict(), model.state_dict())
    ours.save_pretrained(tmp_path / "ours", max_shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    back = their_class(name).from_pretrained(tmp_path / "ours", dtype="auto")
    assert_same_state(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_pickled_weights(name: str, saved: Any) -> None:
    """Catches a pytorch_model.bin that does not load for its tied copies, gamma and beta, or stored position_ids."""
    model, folder = theirs(name), saved(name)
    (folder / WEIGHTS).unlink()
    prefix = "" if name == "BertModel" else "bert."
    state = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in model.state_dict().items()
    }
    state[f"{prefix}embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "pytorch_model.bin")
    ours = our_class(name).from_pretrained(folder)
    assert ours.missing_names == []
    assert_same_state(ours.state_dict(), model.state_dict())


def test_saving_over_the_checkpoint_that_was_loaded(saved: Any) -> None:
    """Catches weights that are lost because they are mapped from the file they are saved over."""
    folder = saved("BertForMaskedLM")
    ours = fastbert.BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    expected = copy.deepcopy(ours.state_dict())
    ours.save_pretrained(folder)
    assert_same_state(fastbert.BertForMaskedLM.from_pretrained(folder).state_dict(), expected)
    assert_same_state(ours.state_dict(), expected)


def test_loaded_weights_are_independent(saved: Any) -> None:
    """Catches training that moves another model loaded from the same file, or the file."""
    folder = saved()
    first, second = (fastbert.BertModel.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert_same_state(second.state_dict(), theirs().state_dict())
    assert_same_state(fastbert.BertModel.from_pretrained(folder).state_dict(), theirs().state_dict())
    assert all(p.requires_grad and p.is_leaf for p in second.parameters())


def test_a_trained_model_is_saved_as_it_is(saved: Any, tmp_path: Path) -> None:
    """Catches a save in training mode or after a step that writes other weights than those that computed."""
    ours = fastbert.BertForMaskedLM.from_pretrained(saved("BertForMaskedLM")).train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    batch = make_batch("none")
    ours(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "trained")
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path / "trained", dtype="auto").eval()
    assert_same_outputs(ours.eval(), back, "BertForMaskedLM")


# dtype and device
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float64),
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
        ("torch.float32", torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype(dtype: Any, expected: torch.dtype, saved: Any, tmp_path: Path) -> None:
    """Catches a parameter left in another dtype, or a saved config.json that does not say which dtype the file has."""
    ours = fastbert.BertForSequenceClassification.from_pretrained(saved("BertForSequenceClassification"), dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {expected} and ours.dtype == expected
    model = theirs("BertForSequenceClassification")
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.to(expected)), name
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(expected)[6:]
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "ours", dtype="auto")
    assert back.dtype == expected


def test_output_settings_are_config_overrides(tmp_path):
    """Catches transformers' `from_pretrained(..., output_hidden_states=True)` refused as an unknown setting."""
    fastbert.BertModel(fastbert.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                                           intermediate_size=20)).save_pretrained(tmp_path)  # fmt: skip
    model = fastbert.BertModel.from_pretrained(tmp_path, output_hidden_states=True, return_dict=False)
    output = model(torch.tensor([[1, 2]]))
    assert isinstance(output, tuple) and len(output[2]) == 2


def test_saved_dtype_after_a_cast(saved: Any, tmp_path: Path) -> None:
    """Catches a config.json that names the dtype that was loaded, and would undo a cast at the next load."""
    fastbert.BertModel.from_pretrained(saved()).to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    for cls in (fastbert.BertModel, transformers.BertModel):
        assert cls.from_pretrained(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("config_dtype", [None, "bfloat16"])
def test_auto_dtype_without_and_against_the_config(config_dtype: str | None, saved: Any) -> None:
    """Catches "auto" that reads the stored dtype against the config's, or float32 although the file has another."""
    folder = saved()
    edit(folder, dtype=config_dtype)
    ours = fastbert.BertModel.from_pretrained(folder)
    assert ours.dtype == transformers.BertModel.from_pretrained(folder, dtype="auto").dtype
    assert ours.dtype == (torch.float64 if config_dtype is None else torch.bfloat16)


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "half a float", "Tensor", 16, None, "", torch.float8_e4m3fn])
def test_bad_dtype(dtype: Any, saved: Any) -> None:
    """Catches a dtype that no model computes in, taken or met with an AttributeError."""
    message = rf"^dtype: expected 'auto' or one of float32, bfloat16, float16, float64, got {dtype!r}$"
    with pytest.raises(ValueError, match=message):
        fastbert.BertModel.from_pretrained(saved(), dtype=dtype)


def test_device_and_backend(saved: Any, device: torch.device) -> None:
    """Catches device, backend or strict of from_pretrained not reaching the model."""
    folder = saved("BertForTokenClassification")
    ours = fastbert.BertForTokenClassification.from_pretrained(
        folder, dtype="float32", device=device, backend="triton", strict=True
    )
    assert {p.device.type for p in ours.parameters()} == {device.type}
    assert ours.bert.policy.backend == ours.policy.backend == "triton" and ours.bert.policy.strict
    on_cpu = fastbert.BertForTokenClassification.from_pretrained(folder, dtype="float32", device="cpu")
    for value, expected in zip(outputs(ours, "-"), outputs(on_cpu, "-"), strict=True):
        assert_close("logits", value.cpu(), expected, 1e-5)


def test_path_forms(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder that is not found as a string, as a Path, absolute or relative."""
    folder = saved()
    monkeypatch.chdir(folder.parent)
    for src in (folder, str(folder), f"{folder}/", folder.name, Path(folder.name)):
        assert fastbert.BertModel.from_pretrained(src).dtype == torch.float64


# Overrides of the config
def test_config_overrides(saved: Any) -> None:
    """Catches an override that reaches the config and not the model, or changes the weights."""
    ours = fastbert.BertForSequenceClassification.from_pretrained(
        saved("BertForSequenceClassification"),
        hidden_dropout_prob=0.5,
        layer_norm_eps=0.01,
        num_hidden_layers=1,
        problem_type="regression",
    )
    assert ours.dropout.p == ours.bert.embeddings.dropout.p == 0.5
    assert ours.bert.encoder.layer[0].output.LayerNorm.eps == 0.01 and len(ours.bert.encoder.layer) == 1
    model = theirs("BertForSequenceClassification")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_other_number_of_labels(name: str, saved: Any) -> None:
    """Catches num_labels=5 on a checkpoint with 3 that gives a random or a cut head in silence."""
    with pytest.raises(ValueError) as error:
        our_class(name).from_pretrained(saved(name), num_labels=5)
    assert "classifier.weight: came (3, 32), expected (5, 32)" in str(error.value)
    assert "num_labels: the checkpoint has 3, the model 5" in str(error.value)


def test_num_labels_without_a_head(saved: Any) -> None:
    """Catches num_labels that does not reach a head without weights, the way to start a fine-tuning."""
    ours = fastbert.BertForSequenceClassification.from_pretrained(saved(), num_labels=5)
    assert ours.classifier.weight.shape == (5, 32) and ours.config.num_labels == 5


def test_unknown_override(saved: Any) -> None:
    """Catches a misspelt setting ignored in silence."""
    with pytest.raises(TypeError, match="unknown config override hiden_size; expected one of num_labels,"):
        fastbert.BertModel.from_pretrained(saved(), hiden_size=64)


def test_real_weights(minilm: Path) -> None:
    """Catches a real checkpoint, in transformers' current layout, that loads into another model than transformers'."""
    ours = fastbert.BertModel.from_pretrained(minilm)
    model = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager").eval()
    assert ours.missing_names == []
    assert_same_state(ours.state_dict(), model.state_dict())
    ids = torch.randint(1000, 30000, (2, 16))
    assert_close("last_hidden_state", run(ours, {"input_ids": ids})[0], run(model, {"input_ids": ids})[0], 1e-5)
