"""accelerate finds encoders by their modules, and says at once which ones would never run in our code."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

import fastbert
from fastbert.adapters import counts
from model_cases import assert_close, make_batch, randomise, run, theirs

SIZES: dict[str, Any] = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "intermediate_size": 37}  # fmt: skip


class MyConfig(transformers.BertConfig):
    """A user's config, of another name."""

    model_type = "my-bert"


class MyBert(transformers.BertModel):
    """A user's model, which may compute anything."""


class Wrapped(transformers.PreTrainedModel):
    """A user's model around BERT."""

    config_class = MyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = transformers.BertModel(config)
        self.linear = nn.Linear(config.hidden_size, 8)
        self.post_init()

    def forward(self, **batch: Any) -> Tensor:
        output: Tensor = self.linear(self.inner(**batch).last_hidden_state)
        return output


def settled(model: Any) -> Any:
    model.double().eval()
    randomise(model)
    return model


def models() -> dict[str, Any]:
    dpr = transformers.DPRConfig(**SIZES)
    projected = transformers.DPRConfig(**SIZES, projection_dim=8)
    encoder = transformers.BertConfig(**SIZES)
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    clip = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=1,
                                         num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(clip, encoder, projection_dim=8)
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return {
        "DPR question": lambda: transformers.DPRQuestionEncoder(dpr),
        "DPR context": lambda: transformers.DPRContextEncoder(projected),
        "DPR reader": lambda: transformers.DPRReader(dpr),
        "a user's config": lambda: transformers.BertModel(MyConfig(**SIZES)),
        "a user's model": lambda: Wrapped(MyConfig(**SIZES)),
        "text tower": lambda: transformers.VisionTextDualEncoderModel(both),
        "encoder and decoder": lambda: transformers.EncoderDecoderModel(pair),
    }


def call(name: str, model: Any) -> Any:
    batch = {key: value for key, value in make_batch("right").items() if key in ("input_ids", "attention_mask")}
    if name == "text tower":
        return run(model, {**batch, "pixel_values": torch.zeros(4, 3, 8, 8).double()})
    if name == "encoder and decoder":
        return run(model, {**batch, "decoder_input_ids": torch.ones(4, 3, dtype=torch.int64)})
    return run(model, batch)


@pytest.mark.parametrize("name", models())
def test_encoders_under_other_configs(name: str) -> None:
    """Catches an encoder that is known by its modules, and deferred for the name of its config."""
    model = settled(models()[name]())
    plain = copy.deepcopy(model)
    fastbert.accelerate(model)
    output, expected = call(name, model), call(name, plain)
    real = make_batch("right")["attention_mask"].bool()
    key = {"text tower": "text_embeds", "encoder and decoder": "logits"}.get(name, 0)
    ours, theirs = (each if isinstance(each, Tensor) else each[key] for each in (output, expected))
    if ours.shape[:2] == real.shape:
        ours, theirs = ours[real], theirs[real]
    assert_close(name, ours, theirs)
    encoders = [part for part in model.modules() if "_fastbert" in part.__dict__]
    assert counts(encoders[0]) == {"fastbert": 1}


def test_counts_under_their_first_name() -> None:
    """Catches programs that ask where calls ran, and end with an ImportError since the module has another name."""
    from fastbert.adapters import counts, swap

    assert swap.counts is counts


def test_dpr_reads_the_first_column() -> None:
    """Catches rows of zeros in what DPR gives for texts that are padded on the left."""
    model = settled(models()["DPR question"]())
    fastbert.accelerate(model)
    batch = make_batch("left")
    left = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(run(model, left)[0], run(fastbert.restore(copy.deepcopy(model)), left)[0])
    assert counts(model) == {"padding in the first column": 1}


def spoil(name: str) -> Any:
    """A model in a state in which no call of it runs here, and the reason."""
    model = copy.deepcopy(theirs("BertModel"))
    if name == "decoder":
        model = settled(transformers.BertModel(transformers.BertConfig(**SIZES, is_decoder=True)))
    elif name == "module":
        model.encoder.layer[1].output.LayerNorm = nn.Identity()
    elif name == "hook":
        model.encoder.register_forward_hook(lambda *_: None)
    elif name == "heads":
        model.encoder.layer[0].attention.self.num_attention_heads = 1
    elif name == "chunks":
        model.config.chunk_size_feed_forward = 1
    elif name == "patched":
        model.encoder.forward = model.encoder.layer[0].forward
    return model


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decoder", "decoder mode"),
        ("module", "encoder.layer.1.output.LayerNorm is a Identity"),
        ("hook", "a module inside has hooks"),
        ("heads", "heads were pruned"),
        ("chunks", "chunk_size_feed_forward: got 1, expected 0"),
        ("patched", "a module inside the encoder has its own forward"),
    ],
)
def test_what_would_never_run_here_is_said_at_once(name: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a model that is accepted, and whose every call runs as before without a word."""
    model = spoil(name)
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.accelerate(model)
    assert "BertModel.forward will always run by the original code" in caplog.text and reason in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.accelerate(model)
    assert not caplog.text  # known already


def test_what_runs_here_is_no_news(caplog: pytest.LogCaptureFixture, minilm: Path) -> None:
    """Catches a warning for a model that is fast, in training mode as it was made or in eval mode."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        for name in ("BertModel", "BertForSequenceClassification"):
            fastbert.accelerate(copy.deepcopy(theirs(name)))
        fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**SIZES)))
        fastbert.accelerate(SentenceTransformer(str(minilm), device="cpu"))
    assert not [record for record in caplog.records if record.name == "fastbert"]


def test_pipelines_of_sentences_that_encode_does_not_know(caplog: pytest.LogCaptureFixture, minilm: Path) -> None:
    """Catches an encode that never runs here without a word."""
    model = SentenceTransformer(str(minilm), device="cpu")
    model.append(nn.Identity())
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.accelerate(model)
    assert (
        "SentenceTransformer.encode will always run by the original code" in caplog.text and "Identity" in caplog.text
    )


def test_classes_of_a_user_s_own(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a class derived from a covered one that is passed over without a word, beside one that is taken."""
    with pytest.raises(ValueError, match=r"MyBert is a subclass of BertModel and may compute another result"):
        fastbert.accelerate(MyBert(transformers.BertConfig(**SIZES)))
    pair = nn.ModuleList([MyBert(transformers.BertConfig(**SIZES)), copy.deepcopy(theirs())])
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.accelerate(pair)
    assert "MyBert is a subclass of BertModel" in caplog.text
