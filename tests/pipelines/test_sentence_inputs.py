"""Names and inputs of sentence-transformers are taken: short names, pairs, dicts, columns, prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertForSequenceClassification, BertModel, CrossEncoder, SentenceEncoder, semantic_search
from fastbert.pipelines.names import CROSS_ENCODER, ORIGINAL_MODELS, SENTENCE_TRANSFORMERS, full_name
from helpers import tiny_bert

TEXTS = ["the river is wide and slow, and small boats cross it", "a fish", "", "fish and more of it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config, tokenizer = tiny_bert([*TEXTS, "query: "] * 3, 150)
    SentenceEncoder(BertModel(config), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cross")
    config, tokenizer = tiny_bert([*TEXTS, "query: "] * 3, 150, id2label={0: "LABEL_0"})
    tokenizer.save_pretrained(folder)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def assert_same(result: Any, expected: Any) -> None:
    assert type(result) is type(expected)
    if isinstance(expected, list):
        for got, want in zip(result, expected, strict=True):
            assert_same(got, want)
        return
    assert result.shape == expected.shape and result.dtype == expected.dtype
    largest = np.abs(np.asarray(expected)).max(initial=1.0)
    assert np.abs(np.asarray(result) - np.asarray(expected)).max(initial=0) <= 2e-6 * largest


PAIR = ["a fish", "the river"]
INPUTS: dict[str, Callable[[Any], Any]] = {
    "pairs": lambda m: m.encode([PAIR, ["boats " * 50, "fish " * 60]]),
    "pairs in tuples": lambda m: m.encode((("a", "b"), ("c", ""))),
    "pairs and a prompt": lambda m: m.encode([PAIR], prompt="query: "),
    "pairs among texts": lambda m: m.encode(["a fish", PAIR, "more", PAIR, PAIR, "of it"], batch_size=2),
    "pairs among texts and a prompt": lambda m: m.encode(["a fish", PAIR, "more"], prompt="query: "),
    "two texts in a tuple": lambda m: m.encode(("a fish", "the river")),
    "an array of pairs": lambda m: m.encode(np.array([PAIR, PAIR[::-1]])),
    "tokens of pairs": lambda m: m.encode([PAIR, ["a", "fish"]], output_value="token_embeddings"),
    "dicts": lambda m: m.encode([{"text": "a fish"}, {"text": "the river"}]),
    "a dict": lambda m: m.encode({"text": "a fish"}),
    "a dict of a pair": lambda m: m.encode([{"text": PAIR}]),
    "dicts among texts": lambda m: m.encode(["a", {"text": "a fish"}], convert_to_tensor=True),
    "array": lambda m: m.encode(np.array(["a", "a fish"])),
    "array of objects": lambda m: m.encode(np.array(["a", "a fish"], dtype=object)),
    "numpy's str": lambda m: m.encode([np.str_("a fish"), "a"]),
    "the prompt query": lambda m: m.encode(TEXTS, prompt_name="query"),
    "the prompt document": lambda m: m.encode("a fish", prompt_name="document"),
    "query's inputs": lambda m: m.encode_query(inputs="a fish"),
    "query's sentences": lambda m: m.encode_query(sentences=["a fish"]),
    "document's inputs": lambda m: m.encode_document(inputs=["a fish"], normalize_embeddings=True),
    "chunk_size without a pool": lambda m: m.encode(["a"], chunk_size=10, pool=None),
    "a task": lambda m: m.encode("a fish", task="query"),
    "max_length": lambda m: m.encode(TEXTS, processing_kwargs={"text": {"max_length": 5}}),
    "max_length for all": lambda m: m.encode(TEXTS, processing_kwargs={"common": {"max_length": 5}}),
    "batch_size of NumPy": lambda m: m.encode(TEXTS, batch_size=np.int64(2)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_sentence_transformers(ours: SentenceEncoder, theirs: Any, name: str) -> None:
    """Catches an input that sentence-transformers takes and we refuse, or that gets other vectors."""
    assert_same(INPUTS[name](ours), INPUTS[name](theirs))


def test_a_stream_of_pairs(ours: SentenceEncoder) -> None:
    """Catches iterators whose pairs and dicts are not read, and errors in them that name no place."""

    def texts() -> Iterator[Any]:
        yield from ("a fish", PAIR, {"text": "the river"})

    expected = ours.encode(["a fish", PAIR, "the river"])
    assert_same(ours.encode(texts()), expected)
    assert_same(next(ours.encode_stream(texts())), expected)
    with pytest.raises(TypeError, match=r"^sentences\[1\]: got list of 1 \(str\), expected str or two of them"):
        ours.encode(iter(["a", ["b"]]))


class Column:
    """A column of Arrow, whose items are no str."""

    def to_pylist(self) -> list[str]:
        return ["a", "a fish"]


class Table:
    columns = ("text",)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([["a", "b", "c"]], r"sentences\[0\]: got list of 3 \(str, str, str\), expected str or two of them"),
        (["a", []], r"sentences\[1\]: got list of 0"),
        ([("a", None)], r"sentences\[0\]: got tuple of 2 \(str, NoneType\)"),
        ([{"query": "a"}], r"sentences\[0\]: got dict, expected str, or .* its keys are 'query'"),
        ({"text": 5}, r"sentences\['text'\]: got int, expected str"),
        ([{"text": "a", "image": "b"}], r"its keys are 'text', 'image'"),
        ([{"role": "user", "content": "hi"}], r"its keys are 'role', 'content'"),
        (["a", float("nan")], r"sentences\[1\]: got float, expected str"),
        (np.array([b"a"]), r"sentences\[0\]: got bytes, expected str"),
        (np.array([1.0]), r"sentences\[0\]: got float, expected str"),
        pytest.param(Table(), r"sentences: got Table, .*: one of its columns", id="table"),
        (b"a", "sentences: got bytes"),
    ],
    ids=str,
)
def test_what_is_no_text_is_named(ours: SentenceEncoder, inputs: Any, message: str) -> None:
    """Catches the names of columns encoded as texts, and an error that does not say where it stands."""
    with pytest.raises(TypeError, match=f"^{message}|{message}$"):
        ours.encode(inputs)


def test_columns_of_arrow(ours: SentenceEncoder) -> None:
    """Catches columns whose items are scalars of another library."""
    assert_same(ours.encode(Column()), ours.encode(["a", "a fish"]))


def test_a_surrogate_in_a_second_text(ours: SentenceEncoder) -> None:
    """Catches a pair of which only the first text is looked at."""
    with pytest.raises(ValueError, match=r"^sentences\[1\]\[1\]: lone surrogate"):
        ours.encode([PAIR, ["a", "\ud800"]])


def test_prompts_of_every_model(ours: SentenceEncoder, theirs: Any) -> None:
    """Catches a model without the prompts that every model of sentence-transformers has."""
    assert ours.prompts == theirs.prompts == {"query": "", "document": ""}
    with pytest.raises(ValueError, match=r"prompt_name: got 'passage', expected one of \['query', 'document'\]"):
        ours.encode("a", prompt_name="passage")


def test_similarity_functions(ours: SentenceEncoder, folder: Path, theirs: Any) -> None:
    """Catches the enum of sentence-transformers refused, in the constructor, in the setter or in a search."""
    from sentence_transformers import SimilarityFunction

    a, b = ours.encode(TEXTS), ours.encode(TEXTS[:2])
    for function in (*list(SimilarityFunction), None):
        if function is not None and function.value not in ("cosine", "dot", "euclidean", "manhattan"):
            with pytest.raises(ValueError, match="similarity_fn_name: got"):
                ours.similarity_fn_name = function
            continue
        ours.similarity_fn_name = theirs.similarity_fn_name = function
        assert ours.similarity_fn_name == theirs.similarity_fn_name
        assert torch.allclose(ours.similarity(a, b), theirs.similarity(a, b), atol=1e-4)
        assert torch.allclose(
            ours.similarity_pairwise(a, a[::-1].copy()), theirs.similarity_pairwise(a, a[::-1].copy())
        )
        if function is not None:
            encoder = SentenceEncoder(ours.model, ours.tokenizer, similarity_fn_name=function)
            loaded = SentenceEncoder.from_pretrained(folder, device="cpu", similarity_fn_name=function)
            assert encoder.similarity_fn_name == loaded.similarity_fn_name == function.value
    dot = semantic_search(a, b, score="dot")
    assert semantic_search(a, b, score=SimilarityFunction.DOT_PRODUCT) == dot  # type: ignore[arg-type]
    assert semantic_search(ours.encode([]), b) == []

    class Other(Enum):
        COSINE = "cosines"

    with pytest.raises(ValueError, match="similarity_fn_name: got 'cosines'"):
        ours.similarity_fn_name = Other.COSINE


def test_pairs_of_cross_encoders(cross: Path) -> None:
    """Catches arguments and empty inputs of CrossEncoder.predict with other results than in sentence-transformers."""
    from sentence_transformers import CrossEncoder as Theirs

    ours, theirs = CrossEncoder.from_pretrained(cross, device="cpu"), Theirs(str(cross), device="cpu")
    long = [["boats " * 50, "fish " * 60], PAIR]
    for call in (
        lambda m: m.predict([]),
        lambda m: m.predict([], convert_to_tensor=True),
        lambda m: m.predict(np.array([], dtype=str)),
        lambda m: m.predict(long, processing_kwargs={"text": {"max_length": 7}}),
        lambda m: m.predict(PAIR, chunk_size=4),
        lambda m: m.predict(np.array([PAIR, PAIR])),
        lambda m: m.predict(tuple(long), convert_to_tensor=True),
    ):
        assert_same(call(ours), call(theirs))
    assert ours.predict([], convert_to_numpy=False) == []


def put(home: Path, owner: str, name: str, folder: Path) -> None:
    """Makes a cache of the hub's client of a folder."""
    repo, commit = home / f"models--{owner}--{name}", "0" * 40
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)


def test_names_without_an_owner(tmp_path: Path, folder: Path, cross: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a short name of sentence-transformers that is not found in the cache, or under another owner."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "cache", "sentence-transformers", "tiny-v1", folder)
    put(tmp_path / "cache", "cross-encoder", "tiny-v1", cross)
    options: dict[str, Any] = {"device": "cpu", "local_files_only": True}
    for name in ("tiny-v1", "sentence-transformers/tiny-v1"):
        encoder = SentenceEncoder.from_pretrained(name, cache_folder=tmp_path / "cache", **options)
        assert encoder.model_card_data.base_model == name
    assert CrossEncoder.from_pretrained("tiny-v1", cache_folder=tmp_path / "cache", **options).num_labels == 1
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "cache"))
    assert SentenceEncoder.from_pretrained("tiny-v1", **options).encode("a").shape == (32,)
    with pytest.raises(FileNotFoundError, match="sentence-transformers/tiny-v2"):
        SentenceEncoder.from_pretrained("tiny-v2", **options)
    shutil.copytree(folder, tmp_path / "tiny-v2")
    assert SentenceEncoder.from_pretrained("tiny-v2", **options).encode("a").shape == (32,)


def test_names_are_those_of_sentence_transformers() -> None:
    """Catches an original model taken for one of sentence-transformers', a path for a name, and another owner."""
    from sentence_transformers import CrossEncoder as Theirs
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util.misc import ORIGINAL_TRANSFORMER_MODELS

    assert set(ORIGINAL_TRANSFORMER_MODELS) == ORIGINAL_MODELS
    assert SentenceTransformer.default_huggingface_organization == SENTENCE_TRANSFORMERS
    assert Theirs.default_huggingface_organization == CROSS_ENCODER
    for name in ("bert-base-uncased", "BERT-base-uncased", "a/b", "./a", "/a", "~/a", Path("a"), ".", "", None):
        assert full_name(name, CROSS_ENCODER) == name
    assert full_name("all-MiniLM-L6-v2", SENTENCE_TRANSFORMERS) == "sentence-transformers/all-MiniLM-L6-v2"
