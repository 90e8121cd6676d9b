"""SentenceEncoder: text in, vectors out, beside sentence-transformers."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertConfig, BertModel, SentenceEncoder, Tokenizer
from fastbert.pipelines.batching import batches
from fastbert.pipelines.folder import read_layout
from fastbert.pipelines.modules import Dense, Dropout, LayerNorm, Normalize
from fastbert.pipelines.pipeline import Pooling
from helpers import docstrings, tiny_bert

TEXTS = [
    "the river is wide and slow",
    "a",
    "",
    "small boats cross the river every morning, and in the evening they come back full of fish",
    "the river is wide and slow, and small boats cross it",
    "Fish!",
    "  every   evening ",
    "boats boats boats boats boats boats",
]


def tiny(folder: Path, *, lowercase: bool = True, seed: int = 0) -> Path:
    """A plain BERT checkpoint with random weights and a vocabulary of its own: hidden 32, two layers."""
    torch.manual_seed(seed)
    config, tokenizer = tiny_bert([*TEXTS, "A River Is Wide", "query: passage: "] * 3, 150, lowercase=lowercase)
    tokenizer.save_pretrained(folder)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def encoder(plain: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(plain, device="cpu")


@pytest.fixture(scope="module")
def real_texts() -> list[str]:
    return [text[:200] for text in docstrings(500)]


@pytest.fixture(scope="module")
def real_vectors(real_texts: list[str], minilm: Path) -> np.ndarray:
    """What sentence-transformers makes of the texts in float32."""
    return theirs(minilm).encode(real_texts)


def theirs(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def assert_close(ours: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Largest difference against the largest value: fp32 sums of a few thousand terms, in another order."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    if ours.size:
        assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1.0)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.999)])
def test_real_weights_agree_with_sentence_transformers(
    minilm: Path, real_texts: list[str], real_vectors: np.ndarray, device: torch.device, dtype: str, least: float
) -> None:
    """Catches any error from text to vector on 500 real texts: tokens, weights, layers, pooling, order."""
    vectors = SentenceEncoder.from_pretrained(minilm, dtype=dtype, device=device).encode(real_texts)
    assert vectors.dtype == np.float32 and vectors.shape == real_vectors.shape
    norms = np.linalg.norm(vectors, axis=1)
    assert np.abs(norms - 1).max() < 1e-5, "MiniLM's folder ends in Normalize"
    assert ((vectors * real_vectors).sum(1) / norms).min() >= least


def test_single_list_and_order(encoder: SentenceEncoder) -> None:
    """Catches results in the order of the batches, and a text whose vector depends on its neighbours."""
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    assert alone.shape == (len(TEXTS), 32)
    assert_close(encoder.encode(TEXTS), alone)
    assert_close(encoder.encode(TEXTS[::-1]), alone[::-1])


@pytest.mark.parametrize(
    "make", [tuple, iter, lambda texts: (t for t in texts), np.array, lambda texts: np.array(texts, dtype=object)]
)
def test_any_iterable_of_str(encoder: SentenceEncoder, make: Any) -> None:
    """Catches inputs that need a length or an index, and numpy's own kinds of str."""
    assert_close(encoder.encode(make(TEXTS)), encoder.encode(TEXTS))


@pytest.mark.parametrize(("budget", "batch_size"), [(1, None), (9, None), (20, 3), (None, 1), (None, None)])
def test_batches_are_packed_and_within_the_budget(
    plain: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, budget: int | None, batch_size: int | None
) -> None:
    """Catches a padded batch, a budget that is not kept, and vectors that depend on how texts are batched."""
    expected = encoder.encode(TEXTS)
    one = SentenceEncoder.from_pretrained(plain, device="cpu", token_budget=budget)
    seen: list[list[int]] = []
    run = one.model.encode_packed

    def spy(batch: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = batch.cu_seqlens_cpu.diff().tolist()
        assert input_ids.shape == (sum(lengths),), "rows beyond the tokens"
        seen.append(lengths)
        return run(batch, input_ids, *args, **kwargs)

    monkeypatch.setattr(one.model, "encode_packed", spy)
    vectors = one.encode(TEXTS, batch_size=batch_size)
    lengths = [len(ids) for ids in one.tokenizer(TEXTS)["input_ids"]]
    assert sorted(sum(seen, [])) == sorted(lengths)
    for batch in seen:
        assert len(batch) == 1 or sum(batch) <= (budget or 2048)
        assert len(batch) <= (batch_size or len(TEXTS))
    assert_close(vectors, expected)


def test_batches_cover_all_texts_once() -> None:
    """Catches a text lost or doubled where a batch is cut: too long for the budget, of length 0, at the very limit."""
    ends = np.cumsum([50, 10, 10, 5, 5, 0, 0])
    assert list(batches(ends, 20, None)) == [(0, 1), (1, 3), (3, 7)]
    assert list(batches(ends, 20, 2)) == [(0, 1), (1, 3), (3, 5), (5, 7)]
    assert list(batches(np.cumsum([]), 20, None)) == []


def test_windows(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a window boundary that loses or swaps texts, and an error that counts from the window's start."""
    texts = TEXTS * 5
    expected = encoder.encode(texts)
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 7)
    assert_close(encoder.encode(texts), expected)
    assert_close(encoder.encode(iter(texts), convert_to_tensor=True), expected)
    tokens = encoder.encode(texts, output_value="token_embeddings")
    assert [len(t) for t in tokens] == [len(ids) for ids in encoder.tokenizer(texts)["input_ids"]]
    with pytest.raises(ValueError, match=r"^sentences\[23\]: lone surrogate U\+D83D"):
        encoder.encode([*texts[:23], "half \ud83d", *texts])


def test_stream_is_lazy_and_equal(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stream that reads everything first, and windows that differ from `encode`."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 4)
    read, done = [], []

    def texts() -> Iterator[str]:
        for text in TEXTS * 10:
            read.append(text)
            yield text

    stream = encoder.encode_stream(texts(), normalize_embeddings=True, progress=done.append)
    parts = [next(stream)]
    assert len(read) <= 8
    parts.extend(stream)
    assert {len(part) for part in parts} == {4} and sum(done) == len(TEXTS) * 10
    assert_close(np.concatenate(parts), encoder.encode(TEXTS * 10, normalize_embeddings=True))


def test_nothing_to_encode(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a crash, or another shape or dtype than sentence-transformers gives, where there are no texts."""
    other = theirs(plain)
    for arguments in ({}, {"convert_to_tensor": True, "truncate_dim": 5}, {"precision": "binary"}, {"device": "cpu"}):
        for nothing in ([], (), np.array([], dtype=str)):
            result, expected = encoder.encode(nothing, **arguments), other.encode(nothing, **arguments)
            assert type(result) is type(expected)
            assert result.shape == expected.shape == (0,) and result.dtype == expected.dtype
    assert encoder.encode(iter(())).shape == (0,)
    assert encoder.encode([], convert_to_numpy=False) == [] == encoder.encode([], output_value="token_embeddings")
    assert list(encoder.encode_stream([])) == []


def test_odd_texts(encoder: SentenceEncoder) -> None:
    """Catches a crash or NaN on an empty text, NUL, a megabyte of one word, which is one [UNK], and one of many."""
    vectors = encoder.encode(["", "\0", "a" * 2**20, "fish " * 200_000])
    assert np.isfinite(vectors).all()
    assert_close(vectors[0], vectors[1])


@pytest.mark.parametrize("bad", [5, b"boats", {"query": "boats"}, None])
def test_what_is_not_text_raises(encoder: SentenceEncoder, bad: Any) -> None:
    """Catches an item that is taken for text in silence, and an error that does not say where it stands."""
    with pytest.raises(TypeError, match=r"^sentences\[1\]: got \w+, expected str"):
        encoder.encode(["boats", bad])
    with pytest.raises(TypeError, match="^sentences: "):
        encoder.encode(bad)


def test_lone_surrogate_names_its_place(encoder: SentenceEncoder) -> None:
    """Catches a message about an index where one text came, and a prompt that is not looked at."""
    with pytest.raises(ValueError, match=r"^sentences: lone surrogate U\+DC00 at character 1"):
        encoder.encode("a\udc00")
    with pytest.raises(ValueError, match="^prompt: lone surrogate"):
        encoder.encode("a", prompt="\ud800")


def test_truncation_is_counted_once(
    encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches texts cut in silence, a warning for each window, and wrong counts."""
    monkeypatch.setattr("fastbert.pipelines.run.WINDOW", 3)
    encoder.max_seq_length = 10
    lengths = [len(ids) for ids in encoder.tokenizer(TEXTS, max_length=10**6)["input_ids"]]
    cut = [length - 10 for length in lengths if length > 10]
    with caplog.at_level(logging.WARNING, "fastbert"):
        vectors = encoder.encode(TEXTS)
        encoder.encode(TEXTS[1])
    assert [r.getMessage() for r in caplog.records] == [
        f"encode: {len(cut)} of {len(TEXTS)} texts were longer than max_seq_length = 10 and truncated: "
        f"{sum(cut)} tokens cut"
    ]
    assert len(cut) >= 2
    longer = encoder.tokenizer.decode(encoder.tokenizer(TEXTS[3])["input_ids"])
    assert_close(encoder.encode(longer), vectors[3])


def test_max_seq_length(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a limit above the model's positions, and one that is not kept."""
    assert encoder.max_seq_length == 40, "the positions, where the tokenizer has no limit"
    with pytest.raises(ValueError, match="max_seq_length: got 41, but the model has 40 positions"):
        encoder.max_seq_length = 41
    with pytest.raises(ValueError, match="max_seq_length: got 0"):
        encoder.max_seq_length = 0
    encoder.tokenizer.model_max_length = 10**6
    assert encoder.encode("fish " * 100, output_value="token_embeddings").shape == (40, 32)
    encoder.max_seq_length = 12
    assert encoder.encode("fish " * 100, output_value="token_embeddings").shape == (12, 32)
    encoder.max_seq_length = None
    assert encoder.max_seq_length == 40


TAILS: dict[str, tuple[Any, list[Any]]] = {
    "mean, normalised": ("mean", [Normalize()]),
    "cls, dense": ("cls", [Dense(32, 7)]),
    "all modes": (("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"), []),
    "another order": (("mean", "cls"), [Dropout(0.3), Dense(64, 9, False, "GELU"), LayerNorm(9), Normalize()]),
    "identity": ("weightedmean", [Dense(32, 9, activation="Identity")]),
    "sigmoid": ("max", [Dense(32, 5, activation="Sigmoid"), Dense(5, 4, activation="ReLU")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_saved_folder_loads_in_sentence_transformers(plain: Path, tmp_path: Path, name: str) -> None:
    """Catches a module, setting or limit that sentence-transformers reads otherwise, or that we do not read again."""
    pooling, tail = TAILS[name]
    torch.manual_seed(1)
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    ours = SentenceEncoder(model, tokenizer, pooling, tail, prompts={"query": "query: "}, similarity_fn_name="dot")
    ours.max_seq_length = 12
    expected = ours.encode(TEXTS)
    assert expected.shape == (len(TEXTS), ours.get_embedding_dimension())
    ours.save_pretrained(tmp_path)
    again, other = SentenceEncoder.from_pretrained(tmp_path, device="cpu"), theirs(tmp_path)
    for loaded in (again, other):
        assert loaded.max_seq_length == 12 and len(loaded) == len(ours) and loaded.similarity_fn_name == "dot"
        assert loaded.prompts["query"] == "query: "
        assert_close(loaded.encode(TEXTS), expected)
        assert_close(loaded.encode(TEXTS, prompt_name="query"), ours.encode(TEXTS, prompt="query: "))
    other.save_pretrained(str(tmp_path / "theirs"))
    back = SentenceEncoder.from_pretrained(tmp_path / "theirs", device="cpu")
    assert back.max_seq_length == 12 and back.pooling.modes == ours.pooling.modes
    assert_close(back.encode(TEXTS), expected)


def test_earlier_names_and_pickled_dense(plain: Path, tmp_path: Path) -> None:
    """Catches a folder of earlier versions: model in 0_Transformer, pytorch_model.bin, settings without a prompt."""
    torch.manual_seed(1)
    dense = Dense(64, 6)
    write(tmp_path / "modules.json", modules("0_Transformer:Transformer", "1_Pooling:Pooling", "2_Dense:Dense"))
    shutil.copytree(plain, tmp_path / "0_Transformer")
    write(tmp_path / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 11, "do_lower_case": False})
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    write(tmp_path / "1_Pooling" / "config.json", {**flags, "pooling_mode_max_tokens": False})
    write(tmp_path / "2_Dense" / "config.json", dense.settings())
    torch.save(dense.state_dict(), tmp_path / "2_Dense" / "pytorch_model.bin")
    ours = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert ours.max_seq_length == 11 and ours.pooling == Pooling(("cls", "mean"))
    assert_close(ours.encode(TEXTS), theirs(tmp_path).encode(TEXTS))


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def modules(*entries: str) -> list[dict[str, Any]]:
    """modules.json from "path:Type" or "path:full.name"."""
    listed = []
    for i, entry in enumerate(entries):
        path, _, kind = entry.partition(":")
        kind = kind if "." in kind else f"sentence_transformers.models.{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": kind})
    return listed


def test_plain_folder_gets_mean_pooling(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a plain checkpoint refused, normalised, or pooled without a word."""
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours = SentenceEncoder.from_pretrained(plain, device="cpu")
    assert any("mean pooling without normalisation" in r.getMessage() for r in caplog.records)
    assert_close(ours.encode(TEXTS), theirs(plain).encode(TEXTS))


def test_do_lower_case(tmp_path: Path) -> None:
    """Catches do_lower_case ignored, and accents stripped along with it."""
    tiny(tmp_path, lowercase=False)
    SentenceEncoder.from_pretrained(tmp_path, device="cpu").save_pretrained(tmp_path)
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    texts = ["A River Is Wide", "Fïsh RIVER", "small boats"]
    ours = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert ours.tokenizer.tokenize("A River") == ours.tokenizer.tokenize("a river")
    assert_close(ours.encode(texts), theirs(tmp_path).encode(texts))
    ours.save_pretrained(tmp_path / "again")
    assert_close(SentenceEncoder.from_pretrained(tmp_path / "again", device="cpu").encode(texts), ours.encode(texts))


@pytest.mark.parametrize(
    "modes", ["mean", "cls", "weightedmean", ("mean", "weightedmean"), ("max", "lasttoken", "mean_sqrt_len_tokens")]
)
def test_prompts(plain: Path, tmp_path: Path, modes: Any) -> None:
    """Catches a prompt that is not put in front, and prompt tokens pooled where the settings leave them out."""
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    prompts = {"query": "query: ", "passage": "passage: "}
    pooling = Pooling(modes, include_prompt=False)
    SentenceEncoder(model, tokenizer, pooling, prompts=prompts, default_prompt_name="query").save_pretrained(tmp_path)
    ours, other = SentenceEncoder.from_pretrained(tmp_path, device="cpu"), theirs(tmp_path)
    texts = [text for text in TEXTS if text]
    for arguments in ({}, {"prompt_name": "passage"}, {"prompt": "the river: "}, {"prompt": ""}):
        assert_close(ours.encode(texts, **arguments), other.encode(texts, **arguments))
    assert np.abs(ours.encode(texts) - ours.encode(texts, prompt="")).max() > 1e-3
    assert_close(ours.encode_query(texts), other.encode_query(texts))
    assert_close(ours.encode_document(texts), other.encode_document(texts))
    with pytest.raises(ValueError, match="prompt_name: got 'nope', expected one of"):
        ours.encode(texts, prompt_name="nope")


def test_prompt_left_out_of_a_normalised_weighted_mean(plain: Path, tmp_path: Path) -> None:
    """Catches a normalisation before the weights are put right."""
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    pooling = Pooling("weightedmean", include_prompt=False)
    ours = SentenceEncoder(model, tokenizer, pooling, [Normalize()])
    ours.save_pretrained(tmp_path)
    texts = [text for text in TEXTS if text]
    assert_close(ours.encode(texts, prompt="query: "), theirs(tmp_path).encode(texts, prompt="query: "))
    assert np.isfinite(ours.encode(["", *texts], prompt="query: ")).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"normalize_embeddings": True},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"output_value": "token_embeddings"},
        {"precision": "binary"},
        {"precision": None},
        {"precision": "ubinary", "convert_to_tensor": True},
        {"precision": "ubinary", "convert_to_numpy": False},
    ],
    ids=str,
)
def test_results_are_those_of_sentence_transformers(plain: Path, encoder: SentenceEncoder, arguments: Any) -> None:
    """Catches another type, shape, dtype or value than SentenceTransformer.encode gives for the same arguments."""
    other = theirs(plain)
    for texts in (TEXTS, TEXTS[3]):
        result, expected = encoder.encode(texts, **arguments), other.encode(texts, **arguments)
        assert type(result) is type(expected)
        pairs = list(zip(result, expected, strict=True)) if isinstance(expected, list) else [(result, expected)]
        for got, want in pairs:
            assert type(got) is type(want) and got.dtype == want.dtype
            assert_close(got, want)


def test_output_value_none(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a dict without the ids, token vectors or sentence vector that sentence-transformers puts there."""
    expected = theirs(plain).encode(TEXTS, output_value=None)
    for got, want in zip(encoder.encode(TEXTS, output_value=None), expected, strict=True):
        n = len(got["input_ids"])
        for name in ("input_ids", "token_type_ids", "attention_mask", "token_embeddings"):
            assert_close(got[name], want[name][:n])
        assert_close(got["sentence_embedding"], want["sentence_embedding"])
    assert encoder.encode("boats", output_value=None)["token_embeddings"].shape[1] == 32


def test_signature_is_that_of_sentence_transformers() -> None:
    """Catches an argument in another place or under another name than where callers of SentenceTransformer put it."""
    from sentence_transformers import SentenceTransformer

    ours = list(inspect.signature(SentenceEncoder.encode).parameters)
    expected = list(inspect.signature(SentenceTransformer.encode).parameters)
    assert ours[2 : len(expected) - 1] == expected[2:-1], "all but self, the texts and **kwargs"
    assert ours[1] == "sentences" and expected[1] in (*ours, "sentences")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": {}}, "several processes"),
        ({"device": ["cpu", "cpu"]}, "several processes"),
        ({"precision": "int4"}, "precision: got 'int4', expected one of 'float32', 'int8', 'uint8', 'binary'"),
        ({"precision": "binary", "output_value": None}, "precision: got 'binary'"),
        ({"output_value": "vectors"}, "output_value: got 'vectors'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"truncate_dim": -1}, "truncate_dim: got -1"),
    ],
)
def test_unsupported_arguments(encoder: SentenceEncoder, arguments: dict[str, Any], message: str) -> None:
    """Catches an argument that is ignored in silence."""
    with pytest.raises(ValueError, match=message):
        encoder.encode(TEXTS, **arguments)
    with pytest.raises(TypeError, match="normalise"):
        encoder.encode(TEXTS, normalise=True)  # type: ignore[call-arg]


def test_inputs_is_another_name_for_sentences(encoder: SentenceEncoder) -> None:
    """Catches callers of sentence-transformers 6, which calls the texts `inputs`."""
    assert_close(encoder.encode(inputs=TEXTS), encoder.encode(sentences=TEXTS))
    for arguments in ({}, {"sentences": "a", "inputs": "b"}):
        with pytest.raises(TypeError, match="^sentences: expected"):
            encoder.encode(**arguments)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(plain: Path, encoder: SentenceEncoder, name: str) -> None:
    """Catches a function that differs from the one sentence-transformers has under that name."""
    other = theirs(plain)
    encoder.similarity_fn_name = other.similarity_fn_name = name
    vectors = encoder.encode(TEXTS)
    assert_close(encoder.similarity(vectors, vectors[:3]), other.similarity(vectors, vectors[:3]), 1e-4)
    assert encoder.similarity(vectors[0], list(torch.from_numpy(vectors))).shape == (1, len(TEXTS))
    for a, b in ((vectors, vectors[::-1].copy()), (torch.from_numpy(vectors), list(torch.from_numpy(vectors)))):
        assert_close(encoder.similarity_pairwise(a, b), other.similarity_pairwise(a, b), 1e-4)
    with pytest.raises(ValueError, match=r"embeddings2: expected shape \(8, 32\), as embeddings1, got \(3, 32\)"):
        encoder.similarity_pairwise(vectors, vectors[:3])
    with pytest.raises(ValueError, match="similarity_fn_name: got 'chebyshev'"):
        encoder.similarity_fn_name = "chebyshev"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_are_at_least_float32(plain: Path, encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    """Catches vectors in the model's 16-bit dtype, and a Dense module that does not take them."""
    torch.manual_seed(1)
    tail = [Dense(32, 8), LayerNorm(8)]
    vectors = SentenceEncoder(encoder.model, encoder.tokenizer, "mean", tail).encode(TEXTS)
    halved = SentenceEncoder(encoder.model, encoder.tokenizer, "mean", tail).to(dtype)
    result = halved.encode(TEXTS, convert_to_tensor=True)
    assert halved.dtype == dtype
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result, vectors, 0.1)


def test_vectors_can_be_used_in_training(encoder: SentenceEncoder) -> None:
    """Catches inference tensors, which autograd refuses."""
    weight = torch.ones(32, requires_grad=True)
    (encoder.encode(TEXTS, convert_to_tensor=True) * weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_progress_bar_only_where_asked_for(encoder: SentenceEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a bar that shows by default, goes to standard output, or counts batches."""
    encoder.encode(TEXTS)
    encoder.encode(TEXTS, show_progress_bar=False)
    assert capsys.readouterr() == ("", "")
    encoder.encode(TEXTS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == "" and f"{len(TEXTS)}/{len(TEXTS)}" in err


def test_triton_backend_under_strict(plain: Path, encoder: SentenceEncoder, device: torch.device) -> None:
    """Catches an operation of the sentence path that the kernels do not run, or run wrong."""
    expected = encoder.encode(TEXTS[:4], normalize_embeddings=True)
    kernels = SentenceEncoder.from_pretrained(plain, device=device, backend="triton", strict=True)
    assert_close(kernels.encode(TEXTS[:4], normalize_embeddings=True), expected, 1e-5)


@pytest.mark.gpu
def test_moves_to_the_gpu(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches tensors left on the host, a race with an unfinished copy, and a device argument that is ignored."""
    expected = encoder.encode(TEXTS * 50)
    result = encoder.encode(TEXTS * 50, device="cuda", convert_to_tensor=True)
    assert result.device.type == encoder.device.type == "cuda"
    assert_close(result.cpu(), expected, 1e-4)


DENSE = {"in_features": 32, "out_features": 7}
BROKEN: list[tuple[str, Any, str]] = [
    ("modules.json", {}, "expected a list of modules"),
    ("modules.json", modules(":Transformer", "1_Pooling:Pooling", "2_CNN:CNN"), "type .*models.CNN' is not supported"),
    ("modules.json", modules(":Transformer", "1_Pooling:my_code.Pooling"), "type 'my_code.Pooling' is not supported"),
    ("modules.json", modules(":Transformer"), "expected a Transformer, a Pooling and what follows it"),
    ("modules.json", modules(":Transformer", "1_Pooling:Pooling", "1_Pooling:Pooling"), "a second Pooling"),
    ("modules.json", modules(":Transformer", "../1_Pooling:Pooling"), "leads out of the folder"),
    ("1_Pooling/config.json", {"pooling_mode": "median"}, r"pooling: got \['median'\]"),
    ("2_Dense/config.json", {**DENSE, "activation_function": "torch.nn.PReLU"}, "'torch.nn.PReLU'"),
    ("2_Dense/config.json", {**DENSE, "activation_function": "torch.SiLU"}, "'torch.SiLU'"),
    ("2_Dense/config.json", {**DENSE, "use_residual": True}, "the weights lack residual.weight"),
    ("2_Dense/config.json", {**DENSE, "dropout": 0.5}, "the key 'dropout' is not supported"),
    ("2_Dense/config.json", {**DENSE, "module_input_name": "token_embeddings"}, "module_input_name"),
    ("2_Dense/config.json", {"out_features": 5}, "lacks 'in_features'"),
    ("2_Dense/config.json", {**DENSE, "out_features": 5}, r"linear.weight: came \(7, 32\), expected \(5, 32\)"),
    ("sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
    ("sentence_bert_config.json", {"query_length": 32}, "query_length is 32"),
    ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "model_type is 'CrossEncoder'"),
    ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name: got 'maxsim'"),
    ("config_sentence_transformers.json", {"default_prompt_name": "nope"}, "default_prompt_name: got 'nope'"),
    ("config.json", {"model_type": "mpnet"}, "model_type: got 'mpnet'"),
]


@pytest.fixture(scope="module")
def with_dense(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    model, tokenizer = BertModel.from_pretrained(plain), Tokenizer.from_pretrained(plain)
    SentenceEncoder(model, tokenizer, "mean", [Dense(32, 7)]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("file", "content", "message"), BROKEN, ids=[f"{b[0]}-{b[2][:30]}" for b in BROKEN])
def test_what_is_not_supported_is_named(
    with_dense: Path, tmp_path: Path, file: str, content: Any, message: str
) -> None:
    """Catches a folder whose settings are ignored in silence, which would give other vectors."""
    folder = tmp_path / "folder"
    shutil.copytree(with_dense, folder)
    write(folder / file, content)
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_missing_files_are_named(with_dense: Path, tmp_path: Path) -> None:
    """Catches a module whose weights or settings are gone and that starts afresh."""
    folder = tmp_path / "folder"
    shutil.copytree(with_dense, folder)
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*2_Dense"):
        SentenceEncoder.from_pretrained(folder, device="cpu")
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="1_Pooling"):
        SentenceEncoder.from_pretrained(folder, device="cpu")


def test_modules_must_fit(encoder: SentenceEncoder) -> None:
    """Catches modules that fail in the middle of a run for their size."""
    with pytest.raises(ValueError, match=r"tail\[0\], Dense: takes vectors of 30, gets 32"):
        SentenceEncoder(encoder.model, encoder.tokenizer, "mean", [Dense(30, 5)])
    with pytest.raises(ValueError, match="pooling: got"):
        SentenceEncoder(encoder.model, encoder.tokenizer, ())
    with pytest.raises(ValueError, match="activation: got 'PReLU'"):
        Dense(3, 3, True, "PReLU")


def test_tokenizer_larger_than_the_model(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches ids outside the embedding table, which on a GPU end the process."""
    config = BertConfig.from_pretrained(plain, vocab_size=30)
    with pytest.raises(IndexError, match="input_ids: expected values from 0 to 29"):
        SentenceEncoder(BertModel(config), encoder.tokenizer).encode(TEXTS)


def test_truncate_dim_of_the_settings(plain: Path, tmp_path: Path, encoder: SentenceEncoder) -> None:
    """Catches the stored truncation lost in a round trip, and a wrong dimension reported."""
    encoder.truncate_dim = 6
    encoder.save_pretrained(tmp_path)
    again = SentenceEncoder.from_pretrained(tmp_path, device="cpu")
    assert again.get_embedding_dimension() == again.get_sentence_embedding_dimension() == 6
    assert_close(again.encode(TEXTS), theirs(tmp_path).encode(TEXTS))
    assert again.encode(TEXTS, truncate_dim=50).shape == (len(TEXTS), 32)
    with again.truncate_embeddings(4):
        assert again.get_embedding_dimension() == 4 and again.encode(TEXTS).shape == (len(TEXTS), 4)
    assert again.truncate_dim == 6


def test_pooling_can_leave_the_prompt_out(plain: Path, encoder: SentenceEncoder) -> None:
    """Catches a change that sentence-transformers makes to its pooling, and that ours does not follow."""
    other = theirs(plain)
    for include in (False, True):
        encoder.set_pooling_include_prompt(include)
        other.set_pooling_include_prompt(include)
        texts = [text for text in TEXTS if text]
        assert_close(encoder.encode(texts, prompt="query: "), other.encode(texts, prompt="query: "))


def test_layout_of_a_plain_folder(plain: Path) -> None:
    """Catches a plain checkpoint taken for a sentence-transformers folder."""
    assert read_layout(plain) is None
