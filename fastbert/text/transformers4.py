"""transformers 4 uses parts of tokenizer.json that transformers 5 builds again.

So some folders are read differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from fastbert.text.settings import CASING, PREFIX

# Values in the models that are built from a vocabulary. The first is used for a key that tokenizer.json lacks.
_MODELS: dict[str, dict[str, tuple[Any, ...]]] = {
    "WordPiece": {"continuing_subword_prefix": ("##",), "max_input_chars_per_word": (100,)},
    "Unigram": {"byte_fallback": (False,)},
    "BPE": {
        "dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
        "fuse_unk": (False,), "byte_fallback": (False,), "ignore_merges": (False,),
    },
}  # fmt: skip
_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}  # has no effect before a split at spaces


def parts_that_differ(
    tokenizer_json: Mapping[str, Any], rust: RustTokenizer, options: Mapping[str, Any], unknown_id: int | None
) -> list[str]:
    """Names the parts of tokenizer.json that differ from those of ``rust``, with the changes of transformers 4 applied.

    unknown_id: the id of the unknown token in a Unigram model. Raises ValueError for invalid content of a
    tokenizer.json.
    """
    try:
        model = _emptied(tokenizer_json["model"])
        theirs = RustTokenizer.from_str(json.dumps({**tokenizer_json, "added_tokens": [], "model": model}))
    except Exception as error:  # tokenizers raises no more precise class
        raise ValueError(f"no tokenizer: {error}") from error
    before, after = _parts(theirs), _parts(rust)
    state = before["normalizer"]
    if isinstance(state, dict) and state.get("type") == "BertNormalizer":
        casing = [options.get(name, default) for name, default in CASING.items()]
        state |= dict(zip(("lowercase", "strip_accents", "handle_chinese_chars"), casing, strict=True))
    state = before["pre_tokenizer"]
    if isinstance(state, dict) and PREFIX in state:
        state[PREFIX] = bool(options.get(PREFIX, False))
    names = [name for name in before if before[name] != after[name]]
    if _template(rust, theirs.post_processor) != _template(rust, rust.post_processor):
        names.append("post_processor")
    if _model_differs(tokenizer_json["model"], type(rust.model).__name__, unknown_id):
        names.append("model")
    return names


def _emptied(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model of the same type without words, because only the parts around it are compared."""
    if isinstance(model.get("vocab"), list):
        return {**model, "type": "Unigram", "vocab": [["?", 0.0]], "unk_id": 0, "byte_fallback": False}
    model_type = "BPE" if "merges" in model else "WordPiece"
    return {"type": model_type, **model, "vocab": {}, **({"merges": []} if model_type == "BPE" else {})}


def _parts(rust: RustTokenizer) -> dict[str, Any]:
    """Returns the normalizer and the pre-tokenizer, without settings that have no effect on ids."""
    shell = RustTokenizer(BPE())
    shell.normalizer, shell.pre_tokenizer = rust.normalizer, rust.pre_tokenizer
    content = json.loads(shell.to_str())
    parts = {"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"]}
    steps = (parts["normalizer"] or {}).get("normalizers")
    if steps is not None and _splits_at_spaces(rust):
        steps = [step for step in steps if step != _SPACES]
        parts["normalizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}
    if isinstance(parts["pre_tokenizer"], dict):
        parts["pre_tokenizer"].pop("trim_offsets", None)
    return parts


def _splits_at_spaces(rust: RustTokenizer) -> bool:
    return isinstance(rust.pre_tokenizer, pre_tokenizers.Sequence) and isinstance(
        rust.pre_tokenizer[0], pre_tokenizers.WhitespaceSplit
    )


def _template(rust: RustTokenizer, processor: Any) -> list[list[int]]:
    """Returns the ids of a text and of a pair under a post-processor."""
    own, rust.post_processor = rust.post_processor, processor
    try:
        return [rust.encode("a").ids, rust.encode("a", "a").ids]
    finally:
        rust.post_processor = own


def _model_differs(model: Mapping[str, Any], model_type: str, unknown_id: int | None) -> bool:
    if model_type == "Unigram" and model.get("unk_id", unknown_id) != unknown_id:
        return True
    if (
        model_type == "BPE"
        and model.get("unk_token")
        and not set(pre_tokenizers.ByteLevel.alphabet()) <= set(model["vocab"])
    ):
        return True
    return any(model.get(key, values[0]) not in values for key, values in _MODELS[model_type].items())


def prefix_that_differs(rust: RustTokenizer, options: Mapping[str, Any]) -> bool:
    """Tells whether transformers 4 changes ``add_prefix_space`` of a tokenizer.json that 5 uses unchanged."""
    stored = getattr(rust.pre_tokenizer, PREFIX, None)
    return stored is not None and bool(stored) != bool(options.get(PREFIX, False))
