"""Accelerated models pass through pickles and into other processes, and are accelerated there."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor

import fastbert
from accelerate_cases import ROWS, accelerated
from fastbert.adapters import counts
from fastbert.adapters.acceleration import AcceleratedEncoder
from fastbert.adapters.classes import originals
from model_cases import make_batch, run

TEXTS = ["A short text.", "", "word " * 90, "Another one, of more words.", "x"]


def dumps_in_python(value: Any) -> bytes:
    """Pickles by the pickler that is written in Python."""
    buffer = io.BytesIO()
    pickle._Pickler(buffer).dump(value)  # type: ignore[attr-defined]
    return buffer.getvalue()


def by_cloudpickle(value: Any) -> bytes:
    data: bytes = pytest.importorskip("cloudpickle", reason="cloudpickle is not installed").dumps(value)
    return data


WAYS: dict[str, Any] = {
    "pickle": pickle.dumps,
    "protocol 2": lambda value: pickle.dumps(value, 2),
    "in Python": dumps_in_python,
    "between processes": lambda value: bytes(ForkingPickler.dumps(value)),
    "cloudpickle": by_cloudpickle,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_classes(way: str, name: str) -> None:
    """Catches a class that pickle looks for under the name of the original, and does not find."""
    kind: Any = type(accelerated(name))
    original = originals[kind][0]
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (name, name, original.__module__)
    assert kind is not original and issubclass(kind, original) and original is getattr(transformers, name)
    assert pickle.loads(WAYS[way](kind)) is kind
    assert pickle.loads(WAYS[way]([original, kind, original])) == [original, kind, original]
    assert copy.copy(kind) is copy.deepcopy(kind) is kind
    if way != "cloudpickle":  # which sends a class method by value, with all that transformers' names
        assert pickle.loads(WAYS[way](kind.from_pretrained)).__self__ is kind


@pytest.mark.parametrize("way", WAYS)
def test_objects_and_their_methods(way: str) -> None:
    """Catches a bound method or an object that cannot be sent, or arrives as one that is not accelerated."""
    model = accelerated()
    expected = run(model, make_batch("right"))[0]
    methods = [model, model.forward, model.eval]
    twin, forward, evaluate = pickle.loads(WAYS[way](methods))
    for live in (twin, forward.__self__, evaluate.__self__):
        assert type(live) is type(model)
        with torch.no_grad():
            assert torch.equal(live.forward(**make_batch("right"))[0][ROWS], expected[ROWS])
    assert forward.__self__ is evaluate.__self__ is twin and counts(twin) == {"fastbert": 3}


@pytest.mark.parametrize("name", ["SentenceTransformer", "CrossEncoder"])
@pytest.mark.parametrize("way", WAYS)
def test_sentence_transformers(way: str, name: str, minilm: Path) -> None:
    """Catches the worker function of a pool that cannot be sent: a method of the class, whose metaclass is ABCMeta."""
    model = fastbert.accelerate({"SentenceTransformer": SentenceTransformer, "CrossEncoder": CrossEncoder}[name](
        str(minilm), device="cpu"))  # fmt: skip
    kind: Any = type(model)
    method = "encode" if name == "SentenceTransformer" else "predict"
    texts: Any = TEXTS if method == "encode" else [("a", text) for text in TEXTS]
    bound, cls, twin = pickle.loads(WAYS[way]((getattr(model, method), kind, model)))
    assert cls is kind is type(twin) and isinstance(twin, originals[kind][0])
    assert np.array_equal(bound(texts), getattr(model, method)(texts))
    assert counts(bound.__self__) == counts(model)


def test_what_is_derived_from_a_derived_class() -> None:
    """Catches a user's class, or one made for an isinstance check, that the metaclass gets in the way of."""
    model = accelerated()
    kind: Any = type(model)
    global Found

    class Found(kind):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "mine", super().forward(*args, **kwargs)

    Found.__qualname__ = "Found"
    assert pickle.loads(pickle.dumps(Found)) is pickle.loads(dumps_in_python(Found)) is Found
    assert issubclass(Found, transformers.BertModel) and issubclass(Found, AcceleratedEncoder)
    model_again = Found(model.config).eval()
    assert model_again(torch.tensor([[1, 2]]))[0] == "mine"
    assert type(kind(model.config)) is kind and kind(model.config).config is model.config


def test_torch_save(tmp_path: Path) -> None:
    """Catches a whole model that torch.save writes and torch.load does not read."""
    model = accelerated("BertForSequenceClassification")
    torch.save({"model": model, "class": type(model.bert), "call": model.bert.forward}, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=False)
    assert loaded["class"] is type(model.bert) and loaded["call"].__self__ is loaded["model"].bert
    assert torch.equal(run(loaded["model"], make_batch())[0], run(model, make_batch())[0])
    assert counts(loaded["model"]) == {"fastbert": 1}


def test_from_pretrained_of_the_class(tmp_path: Path) -> None:
    """Catches a class of an accelerated object that loads no model, or has another name in config.json."""
    model = accelerated(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["BertModel"] and counts(loaded) == {}
    assert counts(fastbert.accelerate(loaded)) == {}
    run(loaded, make_batch())
    assert counts(loaded) == {"fastbert": 1}


def in_a_process(model: Any, bound: Any, kind: type, queue: Any) -> None:
    """The outputs, the counts, whether the class is the object's, and its name, in another process."""
    with torch.no_grad():
        output = bound(**make_batch("right"))[0]
    same = kind is type(model) is type(bound.__self__) and kind in originals
    queue.put((output.numpy(), counts(model), same, f"{kind.__module__}.{kind.__qualname__}"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes(method: str) -> None:
    """Catches a process that cannot be given a model, or runs it by the original code."""
    model = accelerated()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=in_a_process, args=(model, model.forward, type(model), queue), daemon=True)
    process.start()
    output, counted, same, name = queue.get(timeout=300)
    process.join(60)
    assert counted == {"fastbert": 1} and same and name == "transformers.models.bert.modeling_bert.BertModel"
    assert np.array_equal(output[ROWS], run(model, make_batch("right"))[0][ROWS].numpy())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["devices", "pool"])
def test_encode_in_several_processes(way: str, minilm: Path) -> None:
    """Catches a pool that does not start, other vectors, and workers without us: strict=True would raise in them."""
    plain = SentenceTransformer(str(minilm), device="cpu")
    model = fastbert.accelerate(SentenceTransformer(str(minilm), device="cpu"), strict=True)
    expected = plain.encode(TEXTS)
    if way == "devices":
        vectors = model.encode(TEXTS, device=["cpu", "cpu"], chunk_size=2)
    else:
        pool = model.start_multi_process_pool(["cpu"])
        vectors = model.encode(TEXTS, pool=pool)
        tensors: Any = model.encode(TEXTS, pool=pool, convert_to_tensor=True, normalize_embeddings=True)
        model.stop_multi_process_pool(pool)
        assert isinstance(tensors, Tensor) and np.allclose(tensors.norm(dim=1), 1, atol=1e-5)
    assert np.allclose(vectors, expected, atol=2e-6)
    assert np.allclose(model.encode(TEXTS), expected, atol=2e-6)
    assert counts(model)["by the processes of a pool"] >= 1 and len(counts(model)) == 2


@pytest.mark.slow
def test_predict_in_several_processes(minilm: Path) -> None:
    """Catches a CrossEncoder whose pool does not start, or that scores in another order."""
    model = CrossEncoder(str(minilm), device="cpu", num_labels=1)
    pairs = [("a question", text) for text in TEXTS]
    expected = model.predict(pairs)
    scores = fastbert.accelerate(model, strict=True).predict(pairs, device=["cpu"])
    assert np.allclose(scores, expected, atol=2e-6)


@pytest.mark.slow
def test_joblib_sends_a_bound_method(minilm: Path) -> None:
    """Catches a worker of joblib's that cannot be given `model.encode`."""
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    model = fastbert.accelerate(SentenceTransformer(str(minilm), device="cpu"))
    results = joblib.Parallel(n_jobs=2)(joblib.delayed(model.encode)(TEXTS) for _ in range(2))
    assert all(np.allclose(each, model.encode(TEXTS), atol=2e-6) for each in results)
