"""Each key of tokenizer_config.json and special_tokens_map.json is followed, has no effect, or is logged.

The ids are those of transformers 5. Keys for which transformers 4 gives other ids are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("fastbert")

NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# The order in which transformers adds the tokens that a config names, if the vocabulary lacks them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CASING = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
SETTINGS = ("model_max_length", "padding_side", "truncation_side")
FLAGS = ("split_special_tokens", "clean_up_tokenization_spaces")
PREFIX = "add_prefix_space"

FOLLOWED = frozenset(
    (*NAMED, *CASING, *SETTINGS, *FLAGS, PREFIX, "keep_accents", "split_by_punct", "tokenizer_class", "max_len",
     "model_input_names", "fast_tokenizer_files", "added_tokens_decoder", "additional_special_tokens",
     "extra_special_tokens", "model_specific_special_tokens",
     "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
)  # fmt: skip

# Keys that transformers reads or has written, and that change no id, side or limit of these tokenizers.
NO_EFFECT = frozenset(
    ("add_bos_token", "add_eos_token", "backend", "chat_control_tokens", "chat_template", "device_map", "errors",
     "files_loaded", "full_tokenizer_file", "is_local", "language", "legacy", "local_files_only",
     "max_length", "merges_file", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding",
     "processor_class", "remove_space", "response_schema", "response_template", "sp_model_kwargs",
     "special_tokens_map_file", "spaces_between_special_tokens", "spm_file", "src_lang", "stride", "tgt_lang",
     "tokenizer_file", "tokenizer_type", "torch_dtype", "trim_offsets", "truncation", "truncation_strategy", "unk_id",
     "use_default_system_prompt", "use_fast", "verbose", "vocab_file", "vocab_size", "wordpieces_prefix",
     "transformers_version", "return_token_type_ids")
)  # fmt: skip

# Keys with an effect that is not followed, unless they have one of these values.
LOGGED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_basic_tokenize": (
        (True, None),
        "only BERT's tokenizer in Python has it: it does nothing, as in transformers 5",
    ),
    "never_split": ((None, []), "only BERT's tokenizer in Python has it: it does nothing, as in transformers 5"),
    "from_slow": ((False, None), "transformers 4 converts another tokenizer: it does nothing, as in transformers 5"),
    "fix_mistral_regex": ((False, None), "it does nothing to a model of BERT's family"),
    "auto_map": ((None, {}), "code that comes with a folder is not run: the class beside it is taken"),
}

# Tokenizers of transformers that run in Python, with rules that tokenizer.json cannot hold.
IN_PYTHON = frozenset(
    ("Bartpho", "BertJapanese", "Bertweet", "BioGpt", "BlenderbotSmall", "ByT5", "Canine", "Cpm", "CpmAnt", "CTRL",
     "Esm", "FSMT", "Flaubert", "MyT5", "PLBart", "Perceiver", "Phobert", "ProphetNet", "RoCBert", "Tapas", "XLM")
)  # fmt: skip

_CLEANED = (
    *((f" {sign}", sign) for sign in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
_NO_LIMIT = 10**12  # a model_max_length of at least this means no limit; transformers writes 1e30


def log_unfollowed(config: Mapping[str, Any], file: Any) -> None:
    """Logs the name of each key that is not followed. Raises ValueError for a key that would change the ids."""
    if config.get("init_inputs"):
        raise ValueError(f"{file}: init_inputs: got {config['init_inputs']!r}, expected none: arguments without names")
    for key, (harmless, reason) in LOGGED.items():
        if config.get(key) not in harmless:
            logger.warning("%s: %s=%r is not followed: %s", file, key, config[key], reason)
    unknown = [key for key, value in config.items() if not _is_known(key, value)]
    if unknown:
        logger.info("%s: %s: not known, and without effect on tokens", file, ", ".join(unknown))
    inputs = config.get("model_input_names")
    if isinstance(inputs, list) and not {"input_ids", "attention_mask"} <= set(inputs):
        logger.warning("%s: model_input_names=%r is not followed: there is always an attention_mask", file, inputs)


def _is_known(key: str, value: Any) -> bool:
    known = key in FOLLOWED or key in NO_EFFECT or key in LOGGED or key == "init_inputs"
    return known or key.startswith("_") or is_named_token(key, value)


def is_named_token(key: str, value: Any) -> bool:
    """Tells whether an entry of a config is a special token with its own name, such as "image_token": "<image>"."""
    token = isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))
    return key.endswith("_token") and key not in NAMED and token


def merged(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config; without added_tokens_decoder, special_tokens_map.json overrides it.

    In the result, "extra_special_tokens" is a list or None, and "model_specific_special_tokens" a dict. They include
    the values of other keys for both.
    """
    extra, additional = config.get("extra_special_tokens"), config.get("additional_special_tokens")
    if not extra and additional is not None:
        extra = additional
    named = {key: value for key, value in config.items() if isinstance(value, str) and is_named_token(key, value)}
    options = {key: value for key, value in config.items() if key not in named}
    if isinstance(extra, dict):
        named, extra = named | extra, None
    named = named or dict(config.get("model_specific_special_tokens") or {})
    if config.get("added_tokens_decoder") is None:
        options |= special_map
        more, additional = (
            special_map.get("extra_special_tokens"),
            special_map.get("additional_special_tokens", additional),
        )
        if isinstance(more, dict):
            named, extra = named | more, None
        elif more:
            extra = [*(extra or []), *(token for token in more if token not in (extra or []))]
    extra = additional if extra is None else extra
    options.pop("additional_special_tokens", None)
    return {**options, "extra_special_tokens": extra, "model_specific_special_tokens": named}


def names_extra_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> bool:
    """Tells whether the files name extra tokens, or none, instead of those of a SentencePiece file.

    transformers 5 then uses only those of the files. Tokens with their own names, and "additional_special_tokens" of
    special_tokens_map.json, do not count.
    """
    extra, more = config.get("extra_special_tokens", {}), special_map.get("extra_special_tokens")
    if isinstance(extra, dict):
        in_config = not extra and "additional_special_tokens" in config
        return in_config or (isinstance(more, list) and bool(more))
    return True


def limit_of(options: Mapping[str, Any]) -> int | None:
    """Returns the limit of tokens, or None. ``max_len``, the older name, is used if the newer is missing."""
    name = "model_max_length" if "model_max_length" in options else "max_len"
    limit = options.get(name)
    if limit is not None and not (type(limit) in (int, float) and limit >= 1):
        raise ValueError(f"{name}: got {limit!r}, expected a positive int or None")
    return None if limit is None or limit >= _NO_LIMIT else int(limit)


def flags_of(options: Mapping[str, Any]) -> dict[str, bool]:
    """Returns the settings of FLAGS, False if they are missing."""
    flags = {name: options.get(name, False) or False for name in FLAGS}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: got {value!r}, expected True or False")
    return flags


def clean_up(text: str) -> str:
    """Removes the spaces before punctuation and contractions from a decoded text, as transformers does."""
    for before, after in _CLEANED:
        text = text.replace(before, after)
    return text
