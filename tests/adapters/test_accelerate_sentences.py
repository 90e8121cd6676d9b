"""SentenceTransformer.encode and CrossEncoder keep arguments, order and dtypes after accelerate, and run packed."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import Tensor

import fastbert
from fastbert.adapters import counts, versions
from fastbert.adapters.acceleration import parts
from fastbert.adapters.live_encoder import LiveEncoder
from helpers import docstrings

try:
    from sentence_transformers.sentence_transformer import modules
except ImportError:  # before version 6
    from sentence_transformers import models as modules

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
TEXTS = [
    "A short text.",
    "",
    "word " * 300,
    "  Of  ANOTHER length, with caf\u00e9.  ",
    "x",
    *(text[:200] for text in docstrings(5)),
]


@pytest.fixture(scope="module")
def real(minilm: Path) -> SentenceTransformer:
    return SentenceTransformer(str(minilm), device="cpu", prompts={"query": "find this: ", "document": ""})


@pytest.fixture(scope="module")
def tiny_folder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with MiniLM's vocabulary, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=2,
                                     num_hidden_layers=2, intermediate_size=37, num_labels=1)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def tiny(folder: Path, *after: Any, pooling: Any = "mean", **options: Any) -> SentenceTransformer:
    transformer = modules.Transformer(str(folder))
    transformer.max_seq_length = 64
    return SentenceTransformer(modules=[transformer, modules.Pooling(32, pooling, **options), *after], device="cpu")


def both(model: SentenceTransformer) -> tuple[Any, Any]:
    """The model as it is, and an accelerated copy."""
    return model, fastbert.accelerate(copy.deepcopy(model))


def assert_alike(ours: Any, expected: Any, tolerance: float = 2e-6) -> None:
    assert type(ours) is type(expected)
    if isinstance(expected, list):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert_alike(one, other, tolerance)
        return
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    if isinstance(expected, Tensor):
        assert ours.device == expected.device
        ours, expected = ours.float().numpy(), expected.float().numpy()
    np.testing.assert_allclose(ours, expected, rtol=tolerance * 5, atol=tolerance)


REQUESTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tensor": {"convert_to_tensor": True},
    "list": {"convert_to_numpy": False},
    "small batches": {"batch_size": 2},
    "truncated": {"truncate_dim": 17, "normalize_embeddings": True},
    "tokens": {"output_value": "token_embeddings"},
    "prompt": {"prompt": "query: "},
    "prompt name": {"prompt_name": "query"},
    "binary": {"precision": "binary"},
    "ubinary tensor": {"precision": "ubinary", "convert_to_tensor": True},
    "device": {"device": "cpu", "show_progress_bar": False},
}


@pytest.mark.parametrize("case", REQUESTS)
def test_encode_gives_what_it_gave(real: SentenceTransformer, tiny_folder: Path, case: str) -> None:
    """Catches another order, dtype, type or number than SentenceTransformer gives, or a call that is not packed."""
    original, model = both(real if case == "defaults" else tiny(tiny_folder))
    original.prompts = model.prompts = {"query": "find this: "}
    assert_alike(model.encode(TEXTS, **REQUESTS[case]), original.encode(TEXTS, **REQUESTS[case]))
    assert_alike(model.encode(TEXTS[0], **REQUESTS[case]), original.encode(TEXTS[0], **REQUESTS[case]))
    assert counts(model) == {"fastbert": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_encode_in_other_dtypes(tiny_folder: Path, dtype: torch.dtype) -> None:
    """Catches vectors in float32 where the original gives the model's dtype."""
    original, model = both(tiny(tiny_folder, modules.Dense(32, 8), modules.Normalize()).to(dtype))
    for options in ({}, {"convert_to_tensor": True}, {"convert_to_numpy": False}):
        tolerance = 1e-12 if dtype == torch.float64 else 0.02
        assert_alike(model.encode(TEXTS[:4], **options), original.encode(TEXTS[:4], **options), tolerance)
    assert counts(model) == {"fastbert": 3}


@pytest.mark.parametrize("mode", [*MODES, MODES[:3], ("lasttoken", "cls")])
def test_every_pooling(tiny_folder: Path, mode: Any) -> None:
    """Catches a mode that is another one, or modes in another order."""
    if not isinstance(mode, str) and not isinstance(getattr(tiny(tiny_folder)[1], "pooling_mode", None), str):
        pytest.skip("sentence-transformers before 6 takes one mode by name")
    original, model = both(
        tiny(tiny_folder, modules.LayerNorm(32 * (1 if isinstance(mode, str) else len(mode))), pooling=mode)
    )
    assert_alike(model.encode(TEXTS, normalize_embeddings=True), original.encode(TEXTS, normalize_embeddings=True))
    assert counts(model) == {"fastbert": 1}


def test_prompts_that_pooling_leaves_out(tiny_folder: Path) -> None:
    """Catches prompt tokens that are pooled, or others that are not."""
    for mode in MODES:
        original, model = both(tiny(tiny_folder, modules.Dropout(0.1), pooling=mode, include_prompt=False))
        for options in ({}, {"normalize_embeddings": True}):
            vectors, expected = (each.encode(TEXTS[3:], prompt="find: ", **options) for each in (model, original))
            assert_alike(vectors, expected)
        if mode == "cls" and versions.takes_prompt_for_cls(original[1]):
            assert counts(model)[f"pooling by {mode} that leaves the prompt out"] == 2
        else:
            assert counts(model) == {"fastbert": 2}


def test_two_prompts_are_warned_of_as_before(
    real: SentenceTransformer, minilm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a warning in other words than those that programs, and tests of sentence-transformers, look for."""
    warnings = []
    for model in (real, fastbert.accelerate(copy.deepcopy(real)), fastbert.SentenceEncoder.from_pretrained(minilm)):
        caplog.clear()
        model.encode("A cat.", prompt="a: ", prompt_name="query")
        warnings.append([record.getMessage() for record in caplog.records])
    assert len(warnings[0]) == 1 and warnings == [warnings[0]] * 3


def test_other_methods_are_packed_too(real: SentenceTransformer) -> None:
    """Catches encode_query, encode_document and similarity that go past the packed encode."""
    original, model = both(real)
    queries, documents = ["cats", "a dog"], TEXTS[:4]
    assert_alike(model.encode_query(queries), original.encode_query(queries))
    assert_alike(model.encode_document(documents), original.encode_document(documents))
    assert counts(model) == {"fastbert": 2}
    assert inspect.signature(model.encode) == inspect.signature(original.encode)
    name = next(iter(inspect.signature(model.encode).parameters))
    assert_alike(model.encode(np.array(documents)), original.encode(np.array(documents)))
    assert_alike(model.encode(tuple(documents)), original.encode(tuple(documents)))
    assert_alike(model.encode(**{name: documents}), original.encode(documents))


DEFERRED: dict[str, tuple[dict[str, Any], str]] = {
    "all outputs": ({"output_value": None}, "output_value=None"),
    "pairs": ({"texts": [("a", "b"), ("c", "d")]}, "inputs that are not all str"),
}


@pytest.mark.parametrize("case", DEFERRED)
def test_what_is_not_known_runs_as_before(tiny_folder: Path, case: str, caplog: Any) -> None:
    """Catches a request that is answered with something else, or deferred in silence."""
    original, model = both(tiny(tiny_folder))
    options, reason = DEFERRED[case]
    options = dict(options)
    texts = options.pop("texts", TEXTS[:3])
    with caplog.at_level(logging.WARNING, "fastbert"):
        vectors, expected = model.encode(texts, **options), original.encode(texts, **options)
    if case == "pairs":
        assert_alike(vectors, expected)
    else:
        assert [set(item) for item in vectors] == [set(item) for item in expected]
        assert_alike([item["sentence_embedding"] for item in vectors], [i["sentence_embedding"] for i in expected])
    assert counts(model)[reason] == 1
    assert f"SentenceTransformer.encode runs by the original code: {reason}" in caplog.text
    with pytest.raises(fastbert.BackendError, match="strict"):
        fastbert.accelerate(model, strict=True).encode(texts, **options)


def test_errors_are_those_of_before(tiny_folder: Path) -> None:
    """Catches another error, or none, for what sentence-transformers refuses, and a count for what never ran."""
    original, model = both(tiny(tiny_folder))
    for options in ({"prompt_name": "none such"}, {"precision": "int3"}, {"unknown": 1}):
        errors = []
        for each in (original, model):
            with pytest.raises(Exception) as raised:  # noqa: PT011
                each.encode(TEXTS[:1], **options)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
    assert_alike(model.encode([]), original.encode([]))
    with pytest.raises(TypeError):
        model.encode()


def test_changed_modules_are_seen(tiny_folder: Path, caplog: Any) -> None:
    """Catches a pipeline that is kept from before: its limit, its tokenizer, its modules, its model."""
    original, model = both(tiny(tiny_folder))
    steps: list[Any] = [
        lambda m: setattr(m, "max_seq_length", 7),
        lambda m: m.tokenizer.add_tokens(["xyzzyx"]) and m[0].auto_model.resize_token_embeddings(len(m.tokenizer)),
        lambda m: m[0].auto_model.encoder.layer[0].output.dense.weight.data.mul_(0.5),
        lambda m: m.train().eval(),
        lambda m: m.append(modules.Normalize()),
        lambda m: m.half().float(),
    ]
    for step in steps:
        step(original)
        step(model)
        model[0].auto_model.load_state_dict(original[0].auto_model.state_dict())
        assert_alike(model.encode([*TEXTS, "xyzzyx"]), original.encode([*TEXTS, "xyzzyx"]))
    assert counts(model) == {"fastbert": len(steps)}
    model[1].register_forward_hook(lambda *_: None)
    model.encode(TEXTS)
    assert counts(model)["a module has hooks or its own forward"] == 1


def test_copies_saving_and_restoring(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a copy that is not accelerated, a folder that names our class, and something left after restore."""
    model = tiny(tiny_folder, modules.Normalize())
    expected = model.encode(TEXTS)
    names = list(model.state_dict())
    assert fastbert.accelerate(model) is model and fastbert.accelerate(model) is model
    assert list(model.state_dict()) == names and isinstance(model, SentenceTransformer)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_alike(twin.encode(TEXTS), expected)
        assert counts(twin) == {"fastbert": 1}
        assert type(fastbert.restore(twin)) is SentenceTransformer
    model.save(str(tmp_path))
    assert "fastbert" not in "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    assert_alike(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), expected)
    fastbert.restore(model)
    assert type(model) is SentenceTransformer and type(model[0].auto_model) is transformers.BertModel
    assert_alike(model.encode(TEXTS), expected, 0.0)


def test_forward_of_the_pipeline(tiny_folder: Path) -> None:
    """Catches features that go past the accelerated model, as in training and in `model(features)`."""
    original, model = both(tiny(tiny_folder))
    with torch.no_grad():
        vectors = [each(each.tokenize(TEXTS[:3]))["sentence_embedding"] for each in (model, original)]
    assert_alike(*vectors)
    assert counts(model) == {"fastbert": 1}


def test_features_that_were_used_before(tiny_folder: Path) -> None:
    """Catches vectors among the features, as a guide gets them after the model, that make a call run as before."""
    plain, model = both(tiny(tiny_folder).eval())
    features, vectors = [model.tokenize(TEXTS) for _ in range(2)], []
    with torch.no_grad():
        for each, its in zip((plain, model), features, strict=True):
            vectors.append([each(its)["sentence_embedding"] for _ in range(2)])
    assert torch.equal(*vectors[1]) and torch.allclose(vectors[0][1], vectors[1][1], 1e-5, 1e-6)
    assert counts(model) == {"fastbert": 2}


@pytest.mark.parametrize("way", ["made", "copied", "pickled"])
def test_convolutions_see_the_padding_of_before(tiny_folder: Path, way: str) -> None:
    """Catches a convolution over tokens that reads zeros where the model has other values at padding."""
    torch.manual_seed(0)
    convolved = modules.CNN(32, 16), modules.Pooling(48)
    plain = SentenceTransformer(modules=[modules.Transformer(str(tiny_folder)), *convolved], device="cpu")
    model = fastbert.accelerate(copy.deepcopy(plain))
    model = {"made": lambda: model, "copied": lambda: copy.deepcopy(model), "pickled": lambda: repickled(model)}[way]()
    assert np.abs(model.encode(TEXTS) - plain.encode(TEXTS)).max() < 1e-5
    assert counts(model)["padding, which a CNN reads"] == 1
    assert np.abs(model.encode(TEXTS[:1]) - plain.encode(TEXTS[:1])).max() < 1e-5
    assert counts(model)["fastbert"] == 1  # one text has no padding


def repickled(model: SentenceTransformer) -> Any:
    return pickle.loads(pickle.dumps(model))


def test_forward_that_was_put_back(tiny_folder: Path) -> None:
    """Catches an `encode` that runs as before for good, after a loss has decorated `forward` and undone it."""
    _, model = both(tiny(tiny_folder))
    model.forward = model.forward
    model.encode(TEXTS)
    assert counts(model)["fastbert"] >= 1 and set(counts(model)) == {"fastbert"}
    model.forward = lambda features: features
    with pytest.raises(KeyError):
        model.encode(TEXTS)
    assert counts(model)["a module has hooks or its own forward"] == 1


def test_what_has_no_covered_model(tiny_folder: Path, minilm: Path) -> None:
    """Catches a SentenceTransformer that is half changed, around a model of a family that is not covered."""
    model = tiny(tiny_folder)
    inner = model[0].auto_model
    inner.__class__ = type("Other", (transformers.BertModel,), {})
    with pytest.raises(ValueError, match="covered"):
        fastbert.accelerate(model)
    assert type(model) is SentenceTransformer


def test_cross_encoder(tiny_folder: Path) -> None:
    """Catches scores or an order of ranks that differ, or pairs that are computed as before."""
    model = sentence_transformers.CrossEncoder(str(tiny_folder), device="cpu")
    pairs = [("a query", text) for text in TEXTS]
    scores, ranks = model.predict(pairs), model.rank("a query", TEXTS, top_k=3)
    assert fastbert.accelerate(model) is model
    assert_alike(model.predict(pairs), scores)
    assert [rank["corpus_id"] for rank in model.rank("a query", TEXTS, top_k=3)] == [r["corpus_id"] for r in ranks]
    assert set(counts(model)) == {"fastbert"}
    assert inspect.signature(type(model).predict) == inspect.signature(sentence_transformers.CrossEncoder.predict)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_alike(twin.predict(pairs), scores)
        assert type(fastbert.restore(twin)) is sentence_transformers.CrossEncoder

    encoder = next(encoder for part in parts(model) if (encoder := getattr(part, "encoder", None)) is not None)
    weight = encoder.layer[0].output.dense.weight
    weight.data.mul_(-1.0)
    model.eval()  # tells of a write that nothing counts; the eval() of predict does not drop that
    changed = model.predict(pairs)
    fastbert.restore(model)
    assert_alike(changed, model.predict(pairs))
    assert not np.allclose(changed, scores)


def test_predict_keeps_what_is_made_of_the_weights(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are packed anew in every call, because predict calls eval()."""
    looks = []
    monkeypatch.setattr(LiveEncoder, "invalidate", lambda self: looks.append(1))
    model = fastbert.accelerate(sentence_transformers.CrossEncoder(str(tiny_folder), device="cpu"))
    for _ in range(3):
        model.predict([("a", "b")])
    assert len(looks) == 1
    model.eval()
    model.predict([("a", "b")])
    model.train()
    model.predict([("a", "b")])
    assert len(looks) == 3
