"""Vectors of tokens are those of sentence-transformers' MultiVectorEncoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

import fastbert
from fastbert import BackendError, BertModel, SentenceEncoder
from helpers import tiny_bert

TEXTS = [
    "boats cross the river, every morning.", "", "a", "the river is wide and slow; fish live in it!", "fish " * 60,
    "a [MASK] river", "boats, fish",
]  # fmt: skip
EXPANSIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "unseen": {"strategy": "fixed", "attend": False, "length": 12},
    "seen": {"strategy": "fixed", "attend": True, "length": 12},
    "at least, unseen": {"strategy": "min", "attend": False, "length": 8},
    "at least, another token": {"strategy": "min", "attend": True, "length": 8, "token": "[PAD]"},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config, tokenizer = tiny_bert([*TEXTS, ". , ; !"] * 3, 160)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_theirs(bert: Path, folder: Path, expansion: dict[str, Any] | None, **lengths: int) -> Path:
    torch.manual_seed(1)
    modules = [
        Transformer(str(bert), query_expansion=expansion, **lengths),
        Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=[",", ".", "nothing"]),
        Normalize(module_input_name="token_embeddings"),
    ]
    prompts = {"query": "boats ", "document": "fish "}
    MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts).save(str(folder))
    return folder


def assert_same_vectors(ours: SentenceEncoder, theirs: Any, bound: float = 2e-6) -> None:
    for method in ("encode", "encode_query", "encode_document"):
        got, expected = getattr(ours, method)(TEXTS), getattr(theirs, method)(TEXTS)
        assert type(got) is type(expected) is list
        for text, mine, other in zip(TEXTS, got, expected, strict=True):
            assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device), (method, text)
            assert (mine - other).abs().max() < bound, (method, text)


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_vectors_agree_with_sentence_transformers(expansion: str, bert: Path, tmp_path: Path) -> None:
    """Catches another mask, prompt, length, expansion or order, and a query's token that sees the expansion."""
    lengths = {"document_length": 14} if expansion != "none" else {"query_length": 6}
    folder = save_theirs(bert, tmp_path / "theirs", EXPANSIONS[expansion], **lengths)
    ours = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float32")
    theirs = MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)
    assert ours.outputs == ("multi",) and ours.similarity_fn_name == "maxsim"
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension() == 16
    assert_same_vectors(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    again = SentenceEncoder.from_pretrained(tmp_path / "ours", device="cpu", dtype="float32")
    for method in ("encode_query", "encode_document"):
        assert all(map(torch.equal, getattr(again, method)(TEXTS), getattr(ours, method)(TEXTS)))
    assert_same_vectors(ours, MultiVectorEncoder(str(tmp_path / "ours"), device="cpu", local_files_only=True))
    queries, documents = ours.encode_query(TEXTS[:2]), ours.encode_document(TEXTS)
    torch.testing.assert_close(ours.similarity(queries, documents), theirs.similarity(queries, documents))


FAMILIES: dict[str, dict[str, Any]] = {
    "modernbert": {"local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
                   "sep_token_id": 2, "num_hidden_layers": 4},
    "mpnet": {},
    "gte": {"type_vocab_size": 2, "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_unseen_expansion_of_other_layers(family: str, bert: Path, tmp_path: Path) -> None:
    """Catches a ColBERT on rotary layers, windows or a position bias whose queries are refused or get other vectors.

    ModernBERT's windows are shorter than a query: some of the tokens that fill it up reach none of its own.
    """
    tokenizer = fastbert.Tokenizer.from_pretrained(bert)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 37,
             "max_position_embeddings": 40, "initializer_range": 0.2, "vocab_size": tokenizer.vocab_size}  # fmt: skip
    torch.manual_seed(2)
    config = transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    names = ["input_ids", "attention_mask"]
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    lengths = {"document_length": 14, "max_seq_length": 24}
    folder = save_theirs(tmp_path / "model", tmp_path / "theirs", EXPANSIONS["unseen"], **lengths)
    ours = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float64")
    theirs = MultiVectorEncoder(str(folder), device="cpu", local_files_only=True).double()
    assert_same_vectors(ours, theirs, 1e-6 if family == "modernbert" else 1e-10)  # theirs turns in float32


def test_forms_of_the_result(bert: Path, tmp_path: Path) -> None:
    """Catches an array where tensors were asked for, a text alone in a list, and arguments without a meaning here."""
    folder = save_theirs(bert, tmp_path, None)
    ours = SentenceEncoder.from_pretrained(folder, device="cpu")
    one = ours.encode("boats, fish")
    assert one.shape == (4, 16) and torch.equal(one, ours.encode(["boats, fish"])[0])  # without the comma
    (array,) = ours.encode(["boats"], convert_to_numpy=True)
    assert type(array).__name__ == "ndarray" and ours.encode([]) == []
    assert torch.allclose(one.norm(dim=1), torch.ones(4))
    for arguments, message in (
        ({"convert_to_tensor": True}, "convert_to_tensor, for output 'multi'"),
        ({"output_value": None}, "output_value, for output 'multi'"),
        ({"output": "dense"}, "output: got 'dense', but this model has multi vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.encode(TEXTS, **arguments)
    with pytest.raises(ValueError, match="output: got 'dense'"):
        next(ours.encode_stream(TEXTS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, bert: Path, tmp_path: Path) -> None:
    """Catches vectors that are projected or normalised in half precision."""
    folder = save_theirs(bert, tmp_path, EXPANSIONS["unseen"])
    exact, half = (
        SentenceEncoder.from_pretrained(folder, device="cpu", dtype=name).encode_query(TEXTS)
        for name in ("float64", dtype)
    )
    eager = MultiVectorEncoder(str(folder), device="cpu").to(getattr(torch, dtype)).encode_query(TEXTS)
    want = torch.cat(exact)
    errors = [float((torch.cat(vectors).double() - want).norm() / want.norm()) for vectors in (half, eager)]
    assert half[0].dtype == torch.float32
    assert errors[0] <= 1.25 * errors[1] + 4 * torch.finfo(getattr(torch, dtype)).eps


def test_batch_invariance(bert: Path, tmp_path: Path) -> None:
    """Catches bits of a token's vector that depend on the texts beside it, and a promise that nothing keeps."""
    folder = save_theirs(bert, tmp_path, EXPANSIONS["unseen"])
    ours = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float32", batch_invariant=True)
    for text, vectors in zip(TEXTS, ours.encode_document(TEXTS), strict=True):
        assert torch.equal(ours.encode_document(text), vectors)
    with pytest.raises(BackendError, match="query expansion with attend=False: does not support"):
        ours.encode_query(TEXTS)


@pytest.mark.parametrize("layout", ["pylate", "pylate, no model_type", "pylate, no words", "stanford"])
def test_older_folders(layout: str, bert: Path, tmp_path: Path) -> None:
    """Catches ColBERT's markers taken apart, its expansion, its norm or its list of punctuation left out.

    PyLate wrote no model_type before sentence-transformers 5: GTE-ModernColBERT and its contemporaries have none.
    """
    for path in bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3)) / 6
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    markers = [next(token for token in sorted(vocab) if token.startswith("##")), "[unused1]"]  # one that is split
    if layout.startswith("pylate"):
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ]
        settings = {
            "model_type": "ColBERT", "query_prefix": markers[0], "document_prefix": markers[1], "query_length": 13,
            "document_length": 20, "attend_to_expansion_tokens": False, "skiplist_words": [",", "!"],
            "similarity_fn_name": "cosine", "do_query_expansion": True,
        }  # fmt: skip
        for name in layout.split(", no ")[1:]:
            settings.pop("model_type"), settings.pop("skiplist_words" if name == "words" else "query_length")
        dense = {"in_features": 32, "out_features": 16, "bias": False,
                 "activation_function": "torch.nn.modules.linear.Identity"}  # fmt: skip
        (tmp_path / "1_Dense").mkdir()
        save_file({"linear.weight": weight}, tmp_path / "1_Dense" / "model.safetensors")
        for name, content in (("modules.json", modules), ("config_sentence_transformers.json", settings),
                              ("1_Dense/config.json", dense)):  # fmt: skip
            (tmp_path / name).write_text(json.dumps(content))
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
        state = load_file(tmp_path / "model.safetensors")
        state = {f"bert.{name}": tensor for name, tensor in state.items()} | {"linear.weight": weight}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        metadata = {"query_token_id": markers[0], "doc_token_id": markers[1], "query_maxlen": 11, "doc_maxlen": 17,
                    "attend_to_mask_tokens": False}  # fmt: skip
        (tmp_path / "artifact.metadata").write_text(json.dumps(metadata))
    ours = SentenceEncoder.from_pretrained(tmp_path, device="cpu", dtype="float32")
    theirs = MultiVectorEncoder(str(tmp_path), device="cpu", local_files_only=True)
    assert ours.prompts["query"].strip() == markers[0]
    assert_same_vectors(ours, theirs)
