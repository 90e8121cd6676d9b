"""This module reads and writes folders of sparse models and of models with a vector for each token.

They are those of sentence-transformers' SparseEncoder (a SPLADE) and MultiVectorEncoder, PyLate's and Stanford's
ColBERT, a masked-language model that is used as a SPLADE, and bge-m3, which has two heads beside its dense vectors.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from fastbert._version import __version__
from fastbert.checkpoint.files import read_json, write_text
from fastbert.checkpoint.weights import read_state_dict, write_state_dict
from fastbert.models.tasks import BertForMaskedLM
from fastbert.pipelines.expansion import QueryExpansion
from fastbert.pipelines.folder import MODULES, SETTINGS, Layout, read_layout, read_modules, read_settings, read_tail
from fastbert.pipelines.modules import Dense, Normalize
from fastbert.pipelines.settings import MODULE_KEYS, TASKS, TRANSFORMER_CONFIGS, check_keys, read_transformer
from fastbert.pipelines.token_heads import SpladeHead, TokenVectors, TokenWeights
from fastbert.text.tokenizer import Tokenizer
from fastbert.vectors.maxsim import TOKEN_SIMILARITIES

SPARSE_LINEAR, COLBERT_LINEAR = "sparse_linear.pt", "colbert_linear.pt"  # bge-m3's
METADATA = "artifact.metadata"  # of Stanford's ColBERT
_STANFORD = "HF_ColBERT"

# Settings of PyLate in config_sentence_transformers.json.
_PYLATE = (*sorted(TASKS), "do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens", "query_prefix",
           "document_prefix", "skiplist_words")  # fmt: skip


def read_any_layout(folder: Path, output: str | None) -> Layout | None:
    """Reads the layout of a folder of any kind. Returns None for a plain checkpoint.

    output: the requested output; a plain checkpoint with "sparse" is a SPLADE. Errors are those of `read_layout`.
    """
    if not (folder / MODULES).is_file():
        if _STANFORD in (read_json(folder / "config.json").get("architectures") or []):
            return _read_stanford(folder)
        return Layout(folder, splade={}) if output == "sparse" else None
    entries = read_modules(folder / MODULES)
    kinds = [kind for kind, _ in entries]
    if kinds[1:] == ["SpladePooling"] and kinds[0] in ("Transformer", "MLMTransformer"):
        return _read_splade(folder, entries)
    if kinds[0] == "Transformer" and "Dense" in kinds and not {"Pooling", "SpladePooling"} & set(kinds):
        return _read_multi(folder, entries[0][1], entries[1:])
    return read_layout(folder)


def _read_splade(folder: Path, entries: list[tuple[str, Path]]) -> Layout:
    layout = Layout(entries[0][1])
    layout.settings = read_transformer(layout.transformer, "fill-mask", method_output="logits")
    file = entries[1][1] / "config.json"
    content = read_json(file) if file.is_file() else {}
    check_keys(file, content, MODULE_KEYS["SpladePooling"])
    names = {"pooling_strategy": "pooling", "activation_function": "activation"}
    layout.splade = {ours: content[name] for name, ours in names.items() if name in content}
    read_settings(layout, folder / SETTINGS, "SparseEncoder")
    return layout


def _read_multi(folder: Path, transformer: Path, modules: list[tuple[str, Path]]) -> Layout:
    layout = Layout(transformer, settings=read_transformer(transformer, has_tasks=True))
    stored = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    # PyLate named no model_type before sentence-transformers 5, and has never written a mask and a Normalize.
    model_type = stored.get("model_type", "SentenceTransformer")
    is_pylate = model_type in ("ColBERT", "SentenceTransformer")
    read_settings(layout, folder / SETTINGS, model_type if is_pylate else "MultiVectorEncoder")
    mask: dict[str, Any] = {}
    for kind, path in modules:
        if kind == "MultiVectorMask":
            mask = read_json(path / "config.json") if (path / "config.json").is_file() else {}
            check_keys(path / "config.json", mask, MODULE_KEYS[kind])
            if mask.get("keep_only_token_ids"):
                raise ValueError(f"{path / 'config.json'}: keep_only_token_ids is not supported: it is for images")
        elif kind in MODULE_KEYS and kind not in ("Pooling", "SpladePooling"):
            layout.tail.append(read_tail(kind, path, "token_embeddings"))
        else:
            raise ValueError(f"{folder / MODULES}: {kind} is not supported after a Transformer without Pooling")
    tasks = dict(layout.settings.tasks)
    if any(key in stored for key in _PYLATE):
        tasks = _pylate_tasks(stored) | tasks
    prefixes = {name: stored.get(f"{name}_prefix") or "" for name in ("query", "document")}
    for name, prefix in prefixes.items():
        if prefix:
            layout.prompts[name] = prefix + layout.prompts.get(name, "").removeprefix(prefix)
    if layout.similarity_fn_name not in TOKEN_SIMILARITIES:  # PyLate writes "cosine", of single vectors
        layout.similarity_fn_name = None
    words = mask.get("skiplist_words") or []
    if is_pylate:
        skipped = stored.get("skiplist_words")
        if skipped is None and (model_type == "ColBERT" or any(f"{name}_prefix" in stored for name in prefixes)):
            skipped = list(string.punctuation)
        words = [*words, *(skipped or [])]
        layout.tail.append(Normalize())
    layout.tokens = {**tasks, "words": words, "word_tasks": mask.get("skiplist_tasks"), "prefixes": prefixes}
    return layout


def _pylate_tasks(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns PyLate's settings for queries and documents, in the terms of sentence-transformers 6."""
    tasks = {key: stored[key] for key in TASKS if stored.get(key) is not None}
    if "query_expansion" not in stored and stored.get("do_query_expansion") is not False:
        attend = stored.get("attend_to_expansion_tokens", stored.get("attend_to_mask_tokens"))
        length = tasks.pop("query_length", None) or 32
        tasks["query_expansion"] = {"strategy": "fixed", "attend": bool(attend), "length": length}
    return tasks


def _read_stanford(folder: Path) -> Layout:
    metadata = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    weight = read_state_dict(folder).get("linear.weight")
    if weight is None:
        raise ValueError(f"{folder}: the weights lack linear.weight, which {_STANFORD} needs")
    dense = Dense(weight.shape[1], weight.shape[0], False, "Identity")
    dense.linear.weight = nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    names = {"query": "query_token_id", "document": "doc_token_id"}
    prefixes = {name: (metadata.get(key) or f"[unused{i}]") + " " for i, (name, key) in enumerate(names.items())}
    length = metadata.get("query_maxlen") or 32
    attend = bool(metadata.get("attend_to_mask_tokens"))
    tokens = {
        "document_length": metadata.get("doc_maxlen"),
        "query_expansion": {"strategy": "fixed", "attend": attend, "length": length},
        "words": list(string.punctuation) if metadata.get("mask_punctuation", True) else [],
        "prefixes": prefixes,
    }
    return Layout(folder, tail=[dense, Normalize()], prompts=dict(prefixes), tokens=tokens)


def token_vectors(layout: Layout, tokenizer: Tokenizer, positions: int) -> TokenVectors:
    """Makes the head of a layout with token vectors. positions: most tokens that the model reads."""
    assert layout.tokens is not None
    tokens = layout.tokens
    for prefix in tokens["prefixes"].values():
        _keep_whole(tokenizer, prefix)
    ids = {word: tokenizer.get_vocab().get(word) for word in tokens["words"]}
    expansion = None
    if (wanted := tokens.get("query_expansion")) is not None:
        token = wanted.get("token") or tokenizer.mask_token
        token_id = tokenizer.get_vocab().get(token or "")
        if token_id is None:
            raise ValueError(f"{layout.transformer}: query_expansion: token {token!r} is not in the vocabulary")
        settings = {key: wanted[key] for key in ("attend", "strategy") if key in wanted}
        expansion = QueryExpansion(wanted["length"], token_id, **settings)
        if expansion.length > positions:
            raise ValueError(
                f"{layout.transformer}: query_expansion: "
                f"{expansion.length} tokens, but the model has {positions} positions"
            )
    skip_tasks = tokens.get("word_tasks") or ["document"]
    return TokenVectors(
        layout.tail,
        skip=[i for i in ids.values() if i is not None],
        skip_tasks=[skip_tasks] if isinstance(skip_tasks, str) else skip_tasks,
        expansion=expansion,
        query_length=tokens.get("query_length"),
        document_length=tokens.get("document_length"),
    )


def _keep_whole(tokenizer: Tokenizer, prefix: str) -> None:
    """Makes a prefix in the vocabulary, such as "[unused0]" or "[Q] ", one token in every text."""
    for token in (prefix, *prefix.split()[:1]):
        if token and token in tokenizer.get_vocab():
            if tokenizer.tokenize(token) != [token]:
                tokenizer._rust.add_special_tokens([AddedToken(token, normalized=False, special=True)])
            return


def bge_heads(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> dict[str, nn.Module]:
    """Returns the heads in a dense model's folder in the form of bge-m3: "sparse", "multi", or none."""
    heads: dict[str, nn.Module] = {}
    if (linear := _read_linear(folder / SPARSE_LINEAR)) is not None:
        names = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        heads["sparse"] = TokenWeights(linear, [i for i in names if i is not None], vocab_size)
    if (linear := _read_linear(folder / COLBERT_LINEAR)) is not None:
        dense = Dense(linear.in_features, linear.out_features, linear.bias is not None, "Identity")
        dense.linear = linear
        heads["multi"] = TokenVectors([dense, Normalize()], without_first=True)
    return heads


def _read_linear(file: Path) -> nn.Linear | None:
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weight, bias = state["weight"], state.get("bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        linear.load_state_dict({name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in state.items()})
    except Exception as error:  # pickle, zip and torch raise many kinds of errors
        raise ValueError(f"{file}: expected the weight and the bias of a linear layer: {error}") from error
    return linear


def write_heads(folder: Path, heads: dict[str, nn.Module], layout: Layout, tokenizer: Tokenizer) -> None:
    """Writes the files of sparse or token vectors beside the model and its tokenizer.

    For a model with dense vectors these are bge-m3's two files; the other files are written already.
    """
    sparse, multi = heads.get("sparse"), heads.get("multi")
    if isinstance(sparse, TokenWeights):
        torch.save(sparse.linear.state_dict(), folder / SPARSE_LINEAR)
    if isinstance(multi, TokenVectors) and multi.without_first:
        torch.save(multi.tail[0].get_submodule("linear").state_dict(), folder / COLBERT_LINEAR)
    limits: dict[str, Any] = {"max_seq_length": layout.settings.max_seq_length, "do_lower_case": False}
    if isinstance(sparse, SpladeHead):
        modules: list[tuple[str, dict[str, Any], nn.Module | None]] = [("SpladePooling", sparse.settings(), None)]
        _write_modules(folder, "SparseEncoder", layout, limits, modules)
    elif isinstance(multi, TokenVectors) and not multi.without_first:
        names = {i: token for token, i in tokenizer.get_vocab().items()}
        expansion = multi.expansion
        limits |= {"query_length": multi.query_length, "document_length": multi.document_length}
        limits["query_expansion"] = expansion and {
            "strategy": expansion.strategy, "attend": expansion.attend, "token": names[expansion.token_id],
            "length": expansion.length,
        }  # fmt: skip
        own = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
        modules = []
        for module in multi.tail:
            kind = type(module).__name__
            modules.append((kind, {**_settings(module), **(own if kind in ("Dense", "Normalize") else {})}, module))
        words = {"skiplist_words": [names[i] for i in multi.skip], "skiplist_tasks": list(multi.skip_tasks)}
        _write_modules(folder, "MultiVectorEncoder", layout, limits, [*modules, ("MultiVectorMask", words, None)])


def _settings(module: nn.Module) -> dict[str, Any]:
    settings: dict[str, Any] = getattr(module, "settings", dict)()
    return settings


def _write_modules(
    folder: Path,
    model_type: str,
    layout: Layout,
    limits: dict[str, Any],
    modules: list[tuple[str, dict[str, Any], nn.Module | None]],
) -> None:
    """Writes the settings and the modules. modules.json comes last, and makes the folder valid."""
    is_sparse = model_type == "SparseEncoder"
    first = "sparse_encoder.models.MLMTransformer" if is_sparse else "models.Transformer"
    places = {"SpladePooling": "sparse_encoder.models", "MultiVectorMask": "multi_vector_encoder.modules"}
    entries: list[dict[str, Any]] = [{"idx": 0, "name": "0", "path": "", "type": f"sentence_transformers.{first}"}]
    _write_json(folder / TRANSFORMER_CONFIGS[0], limits)
    settings: dict[str, Any] = {
        "model_type": model_type,
        "__version__": {"fastbert": __version__, "pytorch": torch.__version__},
        "prompts": layout.prompts,
        "default_prompt_name": layout.default_prompt_name,
        "similarity_fn_name": layout.similarity_fn_name,
    }
    if is_sparse and layout.max_active_dims is not None:
        settings["max_active_dims"] = layout.max_active_dims
    _write_json(folder / SETTINGS, settings)
    for i, (kind, content, module) in enumerate(modules, start=1):
        path = f"{i}_{kind}"
        _write_json(folder / path / "config.json", content)
        if module is not None and (state := module.state_dict()):
            write_state_dict(state, folder / path)
        package = places.get(kind, "models")
        entries.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{package}.{kind}"})
    _write_json(folder / MODULES, entries)


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(content, indent=2) + "\n")


def splade_head(model: BertForMaskedLM, layout: Layout) -> SpladeHead:
    """Makes the head of a SPLADE. Raises ValueError for a checkpoint without the weights of its MLM head."""
    if model.missing_names:
        raise ValueError(f"{layout.transformer}: has no masked-LM head: it lacks {', '.join(model.missing_names)}")
    return SpladeHead(model, **(layout.splade or {}))
