"""The Rust tokenizer inside a ``Tokenizer``: read from a checkpoint's files, or trained."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordPiece

from fastbert.checkpoint import read_json, resolve
from fastbert.families import FAMILIES, Family

logger = logging.getLogger("fastbert")

NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CASING = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
SETTINGS = ("model_max_length", "padding_side", "truncation_side")
# Tokenizer classes that transformers builds anew from vocabulary and casing options, whatever else tokenizer.json says.
# Any other class takes tokenizer.json as it stands.
_BERT_KINDS = ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_NO_LIMIT = 10**12  # a model_max_length from here on means none; transformers writes 1e30


class Source(NamedTuple):
    """What a Tokenizer is made of."""

    rust: RustTokenizer  # knows all tokens; neither pads nor truncates
    names: dict[str, str | None]  # keys: NAMES
    settings: dict[str, Any]  # keys: SETTINGS
    as_bert: bool  # vocabulary and casing options say all there is to know, as for transformers' BertTokenizer
    segments: bool = True  # whether the second text of a pair has segment id 1, where the post-processor says so


def load(src: str | os.PathLike[str], revision: str | None, overrides: dict[str, Any]) -> Source:
    """See ``Tokenizer.from_pretrained``."""
    known = (*NAMES, *CASING, *SETTINGS)
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(f"from_pretrained: got {', '.join(unknown)}, expected only {', '.join(known)}")
    file = Path(os.path.expanduser(src)) if src else None
    if file is None or not file.is_file():
        file = resolve(src, revision=revision, weights=False) / "tokenizer.json"
    vocab_file = file.with_name("vocab.txt") if file.suffix == ".json" else file
    stored = {} if file == vocab_file else _read_json(file)
    config, special_map, legacy = (
        _read_json(file.with_name(name))
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    added = config.get("added_tokens_decoder")
    if added is None:  # else the config is complete, and transformers ignores the other places
        config = config | special_map
    options = config | overrides
    of_model = _family_of_model(file.parent)
    name = config.get("tokenizer_class") or _read_json(file.with_name("config.json")).get("tokenizer_class")
    kind = (name or of_model.tokenizer).removesuffix("Fast").removesuffix("Tokenizer")
    family = next((family for family in FAMILIES.values() if family.tokenizer == kind), of_model)
    names = {name: options.get(name, family.special_tokens.get(name, default)) for name, default in NAMES.items()}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    if added is None:
        added = {i: {"content": token, "special": token in contents.values()} for token, i in legacy.items()}
        added |= {token["id"]: token for token in stored.get("added_tokens", [])}

    model = stored.get("model", {})
    as_bert = kind in _BERT_KINDS and model.get("type", "WordPiece") == "WordPiece"
    if as_bert:
        if stored and not isinstance(model.get("vocab"), dict):
            raise ValueError(f"{file} holds no vocabulary")
        vocab = model["vocab"] if stored else _read_vocab(vocab_file, contents)
        casing: dict[str, Any] = {name: options.get(name, default) for name, default in CASING.items()}
        rust = _bert_pipeline(vocab, contents["unk_token"] or "", **casing)
    elif not stored:
        name = config.get("tokenizer_class") or f"{kind}Tokenizer"
        raise FileNotFoundError(f"{file.parent}: tokenizer_class {name!r} needs a tokenizer.json, not a vocab.txt")
    elif given := sorted(set(overrides) & set(CASING)):
        raise ValueError(f"{given[0]}: cannot be changed, as {file} is not BERT's and is used as it stands")
    else:
        try:
            rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(f"{file} is no tokenizer: {error}") from error
        rust.no_truncation()
        rust.no_padding()
    _add_tokens(rust, file.parent, added, names, options)
    if as_bert:
        _set_bert_template(rust, contents["cls_token"], contents["sep_token"])
    limit = options.get("model_max_length")
    if limit is not None and not (isinstance(limit, (int, float)) and limit >= 1):
        raise ValueError(f"model_max_length: got {limit!r}, expected a positive int or None")
    settings = {"model_max_length": None if limit is None or limit >= _NO_LIMIT else int(limit)}
    settings |= {name: one_of(name, options.get(name, "right"), "right", "left") for name in SETTINGS[1:]}
    inputs = options.get("model_input_names")
    segments = family.segments if inputs is None else "token_type_ids" in inputs
    return Source(rust, contents, settings, as_bert, segments)


def _family_of_model(folder: Path) -> Family:
    """That of the model beside the tokenizer; BERT where there is none, or one that is not covered."""
    model_type = _read_json(folder / "config.json").get("model_type")
    return FAMILIES.get(model_type, FAMILIES["bert"]) if isinstance(model_type, str) else FAMILIES["bert"]


def learn(
    texts_or_files: Iterable[str | Path] | Path,
    casing: dict[str, Any],
    special_tokens: Sequence[str],
    limit_alphabet: int | None,
    trainer: dict[str, Any],
) -> Source:
    """See ``Tokenizer.train``; ``trainer`` has vocab_size, min_frequency and show_progress."""
    if isinstance(texts_or_files, (str, bytes)):
        raise TypeError(f"texts_or_files: got a single {type(texts_or_files).__name__}, expected texts or Paths")
    if missing := [token for token in NAMES.values() if token not in special_tokens]:
        raise ValueError(f"special_tokens: got {list(special_tokens)}, expected {', '.join(missing)} among them")
    items = [texts_or_files] if isinstance(texts_or_files, Path) else texts_or_files
    once = iter(items) is items
    counts: Counter[str] = Counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        for text in _read_texts(items):
            counts.update(text)
            if once:
                spool.write(json.dumps(text) + "\n")
        spool.seek(0)
        if any("\uac00" <= character <= "\ud7a3" for character in counts):
            if casing["strip_accents"]:
                logger.warning("strip_accents=True takes the Hangul syllables of the training text apart into Jamo")
            elif casing["do_lower_case"]:
                casing["strip_accents"] = False
        rust = _bert_pipeline({}, NAMES["unk_token"], **casing)
        vocab_size = trainer["vocab_size"]
        alphabet = _alphabet(rust, counts, vocab_size // 3 if limit_alphabet is None else limit_alphabet)
        if not alphabet:
            raise ValueError("texts_or_files: got no text to train on")
        base = [*dict.fromkeys(special_tokens), *alphabet]
        if len(base) > vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}, but special tokens and alphabet are {len(base)}")
        # Left to itself, the trainer numbers the alphabet in the order of a randomly seeded hash map, and breaks
        # ties between merges by these numbers. Passed as special tokens, the alphabet has a fixed order.
        texts = map(json.loads, spool) if once else _read_texts(items)
        rust.train_from_iterator(texts, trainers.WordPieceTrainer(limit_alphabet=0, special_tokens=base, **trainer))
    rust = _bert_pipeline(rust.get_vocab(with_added_tokens=False), NAMES["unk_token"], **casing)
    rust.add_special_tokens(list(special_tokens))
    _set_bert_template(rust, NAMES["cls_token"], NAMES["sep_token"])
    return Source(rust, dict(NAMES), dict(zip(SETTINGS, (None, "right", "right"), strict=True)), True)


def _bert_pipeline(
    vocab: dict[str, int],
    unk: str,
    do_lower_case: bool = True,
    strip_accents: bool | None = None,
    tokenize_chinese_chars: bool = True,
) -> RustTokenizer:
    rust = RustTokenizer(WordPiece(vocab, unk_token=unk))
    rust.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=tokenize_chinese_chars,
        strip_accents=strip_accents,
        lowercase=do_lower_case,
    )
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix="##")
    return rust


def _set_bert_template(rust: RustTokenizer, *cls_and_sep: str | None) -> None:
    cls, sep = ((token, rust.token_to_id(token)) for token in cls_and_sep if token is not None)
    rust.post_processor = processors.BertProcessing(sep, cls)  # type: ignore[arg-type]


def _added_token(token: str | dict[str, Any], **flags: bool) -> AddedToken:
    fields = {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k in TOKEN_FIELDS}
    return AddedToken(**(fields | flags))


def _add_tokens(
    rust: RustTokenizer, folder: Path, added: dict[Any, Any], names: dict[str, Any], options: dict[str, Any]
) -> None:
    """Have Rust take as whole tokens: the stored added ones, those in ``names``, extra special ones, in this order."""
    tokens = {t.content: t for t in (_added_token(added[i]) for i in sorted(added, key=int))}
    vocab = rust.get_vocab()
    for name, value in names.items():
        token = None if value is None else _added_token(value, special=True)
        if token is None and name in ("pad_token", "mask_token"):
            continue
        if token is None or (token.content not in vocab and token.content not in tokens):
            raise ValueError(f"{name}: got {value!r}, which the vocabulary in {folder} lacks")
        tokens.setdefault(token.content, token).special = True
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = options.get(key) or []
        for value in extra.values() if isinstance(extra, dict) else extra:
            token = _added_token(value, special=True)
            tokens.setdefault(token.content, token)
    rust.add_tokens(list(tokens.values()))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_vocab(path: Path, names: dict[str, str | None]) -> dict[str, int]:
    """Token to line number. Of a token that stands twice the last line counts, as everywhere; special ones may not."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {path.parent}: looked for tokenizer.json and vocab.txt")
    try:
        lines = path.read_bytes().decode().split("\n")  # read_text would take a stray \r for a line's end
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    tokens = [line.rstrip() for line in (lines if lines[-1] else lines[:-1])]
    for name, token in names.items():
        if token is not None and tokens.count(token) > 1:
            raise ValueError(f"{name}: {token!r} stands {tokens.count(token)} times in {path}, expected once")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        logger.warning(f"{path}: {len(tokens) - len(vocab)} lines repeat a token; the last of equal lines gives its id")
    return vocab


def _read_texts(items: Iterable[str | Path]) -> Iterator[str]:
    """The texts among the items, and the lines of the files."""
    for i, item in enumerate(items):
        if not isinstance(item, Path):
            check_text(item, f"texts_or_files[{i}]")
            yield item
            continue
        with item.open(encoding="utf-8") as lines:
            try:
                yield from lines
            except UnicodeDecodeError as error:
                raise ValueError(f"{item} is not UTF-8: {error}") from error


def _alphabet(rust: RustTokenizer, counts: Counter[str], limit: int) -> list[str]:
    """The most frequent characters after normalisation, sorted, then those that can continue a word, with ##."""

    def words(text: str) -> list[str]:
        return [word for word, _ in rust.pre_tokenizer.pre_tokenize_str(rust.normalizer.normalize_str(text))]

    normalized: Counter[str] = Counter()
    for character, n in counts.items():
        for word in words(character):
            normalized.update(dict.fromkeys(word, n))
    kept = sorted(sorted(normalized, key=lambda character: (-normalized[character], character))[:limit])
    return kept + [f"##{character}" for character in kept if len(words("a" + character)) == 1]


def check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected str")
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, half of a UTF-16 pair "
            "and not a character. To join halves that belong together and replace the others by U+FFFD: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def one_of(name: str, value: Any, *expected: Any) -> Any:
    for choice in expected:
        if type(value) is type(choice) and value == choice:
            return value
    raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}")
