"""This module learns a WordPiece vocabulary from texts. ``loading`` reads that of a checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

from fastbert.checks import check_text
from fastbert.text.settings import FLAGS, NAMES, SETTINGS

logger = logging.getLogger("fastbert")

TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Source(NamedTuple):
    """A Source holds the parts of a Tokenizer."""

    rust: RustTokenizer  # knows all tokens; neither pads nor truncates
    names: dict[str, str | None]  # keys: NAMES
    settings: dict[str, Any]  # keys: SETTINGS, FLAGS
    as_bert: bool  # vocabulary and casing options describe it completely, as for transformers' BertTokenizer
    has_token_types: bool = True  # whether the second text of a pair has token type 1, if the post-processor gives it
    add_prefix_space: bool | None = None  # of the pre-tokenizer, if it has this setting


def learn(
    texts_or_files: Iterable[str | Path] | Path,
    casing: dict[str, Any],
    special_tokens: Sequence[str],
    limit_alphabet: int | None,
    trainer: dict[str, Any],
) -> Source:
    """Learns a vocabulary, as in ``Tokenizer.train``. ``trainer``: vocab_size, min_frequency and show_progress."""
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
        rust = bert_pipeline({}, NAMES["unk_token"], **casing)
        vocab_size = trainer["vocab_size"]
        alphabet = _alphabet(rust, counts, vocab_size // 3 if limit_alphabet is None else limit_alphabet)
        if not alphabet:
            raise ValueError("texts_or_files: got no text to train on")
        base = [*dict.fromkeys(special_tokens), *alphabet]
        if len(base) > vocab_size:
            raise ValueError(f"vocab_size: got {vocab_size}, but special tokens and alphabet are {len(base)}")
        # The trainer numbers its own alphabet in the order of a randomly seeded hash map, and uses these numbers for
        # ties between merges. An alphabet that is passed as special tokens has a fixed order.
        texts = map(json.loads, spool) if once else _read_texts(items)
        rust.train_from_iterator(texts, trainers.WordPieceTrainer(limit_alphabet=0, special_tokens=base, **trainer))
    rust = bert_pipeline(rust.get_vocab(with_added_tokens=False), NAMES["unk_token"], **casing)
    rust.add_special_tokens(list(special_tokens))
    set_bert_template(rust, NAMES["cls_token"], NAMES["sep_token"])
    settings = dict(zip(SETTINGS, (None, "right", "right"), strict=True)) | dict.fromkeys(FLAGS, False)
    return Source(rust, dict(NAMES), settings, True)


def bert_pipeline(
    vocab: dict[str, int],
    unk: str,
    do_lower_case: bool = True,
    strip_accents: bool | None = None,
    tokenize_chinese_chars: bool = True,
) -> RustTokenizer:
    """Returns BERT's tokenizer in Rust, without the special tokens around a text."""
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


def set_bert_template(rust: RustTokenizer, *cls_and_sep: str | None) -> None:
    """Puts [CLS] before a text and [SEP] after each."""
    cls, sep = ((token, rust.token_to_id(token)) for token in cls_and_sep if token is not None)
    rust.post_processor = processors.BertProcessing(sep, cls)  # type: ignore[arg-type]


def _read_texts(items: Iterable[str | Path]) -> Iterator[str]:
    """Yields the texts of the items, and the lines of the files."""
    for i, item in enumerate(items):
        if not isinstance(item, Path):
            check_text(f"texts_or_files[{i}]", item)
            yield item
            continue
        with item.open(encoding="utf-8") as lines:
            try:
                yield from lines
            except UnicodeDecodeError as error:
                raise ValueError(f"{item} is not UTF-8: {error}") from error


def _alphabet(rust: RustTokenizer, counts: Counter[str], limit: int) -> list[str]:
    """Returns the most frequent characters after normalisation, sorted, then with ## those that can continue a word."""

    def words(text: str) -> list[str]:
        return [word for word, _ in rust.pre_tokenizer.pre_tokenize_str(rust.normalizer.normalize_str(text))]

    normalized: Counter[str] = Counter()
    for character, n in counts.items():
        for word in words(character):
            normalized.update(dict.fromkeys(word, n))
    kept = sorted(sorted(normalized, key=lambda character: (-normalized[character], character))[:limit])
    return kept + [f"##{character}" for character in kept if len(words("a" + character)) == 1]
