"""The tokenizer converts text to token ids and token ids to text, with the ``tokenizers`` library.

The ids equal those of transformers' tokenizer for the same folder. ``encoding`` truncates and pads arrays. In the
library's Rust object, truncation and padding are state. With arrays, threads that share a tokenizer may use different
``max_length``, and the cut tokens can be counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordPiece

from fastbert.checkpoint.files import write_text
from fastbert.checks import check_text, one_of
from fastbert.text import offsets, windows
from fastbert.text.encoding import (
    Encoding,
    LongText,
    PackedEncoding,
    Rows,
    assemble,
    join_rows,
    kept_counts,
    pad_rows,
    template_of,
)
from fastbert.text.loading import load
from fastbert.text.settings import CASING, FLAGS, NAMES, PREFIX, SETTINGS, clean_up
from fastbert.text.vocabulary import TOKEN_FIELDS, Source, learn

logger = logging.getLogger("fastbert")


class Tokenizer:
    """A Tokenizer comes from ``from_pretrained`` or from ``train``. Threads may share it.

    ``vocab_size`` is the highest id + 1, the number of rows that an embedding table needs. ``model_max_length`` (in
    tokens, None for no limit), ``padding_side`` and ``truncation_side`` ("right" or "left") may be set at any time. The
    special tokens and their ids are read-only.
    """

    vocab_size: int
    pad_token: str | None
    pad_token_id: int | None
    unk_token: str
    unk_token_id: int
    cls_token: str
    cls_token_id: int
    sep_token: str
    sep_token_id: int
    mask_token: str | None
    mask_token_id: int | None
    model_max_length: int | None
    padding_side: str
    truncation_side: str
    split_special_tokens: bool
    clean_up_tokenization_spaces: bool

    def __init__(self, source: Source) -> None:
        """``from_pretrained`` and ``train`` call this."""
        rust = self._rust = source.rust
        self._as_bert, self._has_token_types = source.as_bert, source.has_token_types
        # The templates of a text and of a pair, with special tokens and without.
        self._templates = tuple(
            template_of(rust.encode(*texts), source.has_token_types) for texts in (("a",), ("a", "a"))
        )
        self._bare = tuple(tuple(piece for piece in pieces if piece.source >= 0) for pieces in self._templates)
        self.vocab_size = max(rust.get_vocab().values()) + 1
        self._add_prefix_space = source.add_prefix_space
        for name, value in source.settings.items():
            setattr(self, name, value)
        rust.encode_special_tokens = self.split_special_tokens
        for name, token in source.names.items():
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else rust.token_to_id(token))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rust.encode_special_tokens = self.split_special_tokens  # the Rust object loses this in a pickle

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, model_max_length={self.model_max_length})"

    @classmethod
    def from_pretrained(
        cls, src: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any
    ) -> Tokenizer:
        """Loads a local folder, a hub id, or the path of a ``vocab.txt``.

        Reads ``tokenizer.json`` if the folder has it, else ``vocab.txt``, ``vocab.json`` and ``merges.txt``, or a
        SentencePiece file. Also reads ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.
        ``tokenizer_class``, or without it ``model_type`` of ``config.json``, determines the kind of tokenizer, as in
        transformers 5.

        The classes in ``fastbert/text/kinds.py`` are built from the vocabulary and from ``do_lower_case`` (True for
        BERT and ALBERT), ``strip_accents`` (None: as lowercase), ``tokenize_chinese_chars`` (True) or
        ``add_prefix_space`` (False for byte-level BPE, else True); the other settings of ``tokenizer.json`` are
        ignored. For any other class ``tokenizer.json`` is used unchanged, except its truncation and padding: only
        their sides are used. Segment ids are all 0 if ``model_input_names``, of the config or the class, has none.
        Ignored keys are logged by name, and so are folders that transformers 4 reads in another way.

        ``overrides`` replace values of the config: these four, ``model_max_length``, ``padding_side``,
        ``truncation_side``, ``split_special_tokens``, ``clean_up_tokenization_spaces``, ``cls_token``, ``sep_token``,
        ``unk_token``, ``pad_token``, ``mask_token``. The last two may be None if the vocabulary has no such token.

        Raises FileNotFoundError if the file is missing. Raises ValueError for a file that cannot be read, a special
        token that the vocabulary lacks or holds twice, or a bad value. Raises TypeError for an unknown override.
        """
        return cls(load(src, revision, overrides))

    @classmethod
    def train(
        cls,
        texts_or_files: Iterable[str | Path] | Path,
        *,
        vocab_size: int = 30000,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        min_frequency: int = 2,
        special_tokens: Sequence[str] = tuple(NAMES.values()),
        limit_alphabet: int | None = None,
        show_progress: bool = False,
    ) -> Tokenizer:
        """Learns a WordPiece vocabulary. The same input gives the same tokens with the same ids.

        ``texts_or_files``: str items are texts, Path items are UTF-8 files with one text a line. They are read twice;
        an iterator is spooled to a temporary file. ``special_tokens`` get the ids from 0 on and must contain BERT's
        five. ``limit_alphabet``: the number of characters to keep, the most frequent first, by default a third of
        ``vocab_size``. A word with any other character is [UNK]. A kept character becomes a token, and a second token
        with ## if it can occur inside a word. A merge needs ``min_frequency`` occurrences.

        ``strip_accents=None`` follows ``lowercase``, as in BERT, unless the input contains a Hangul syllable anywhere.
        Then accents stay, because stripping them begins with Unicode's NFD, which splits syllables into Jamo. With
        True accents are always stripped, and Hangul causes a warning. Korean text in NFD stays in NFD: convert it to
        NFC before training and before encoding.

        Raises TypeError for an item that is neither str nor Path. Raises ValueError if there is no text, if it holds
        lone surrogates or is not UTF-8, or if special tokens and alphabet exceed ``vocab_size``.
        """
        casing: dict[str, Any] = {"do_lower_case": lowercase, "strip_accents": strip_accents}
        trainer = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": show_progress}
        return cls(learn(texts_or_files, casing, special_tokens, limit_alphabet, trainer))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that ``from_pretrained`` and transformers load to the same ids.

        They are tokenizer.json, tokenizer_config.json, special_tokens_map.json and, for WordPiece, vocab.txt.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = {name: getattr(self, name) for name in NAMES}
        added = sorted(self._rust.get_added_tokens_decoder().items())
        flags = {i: {flag: getattr(token, flag) for flag in TOKEN_FIELDS} for i, token in added}
        config = {"tokenizer_class": "BertTokenizer" if self._as_bert else "PreTrainedTokenizerFast", **names}
        config["added_tokens_decoder"] = flags
        if not self._has_token_types:
            config["model_input_names"] = ["input_ids", "attention_mask"]
        elif not self._as_bert:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        config |= {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        config |= {name: True for name in FLAGS if getattr(self, name)}
        if self._add_prefix_space is not None:
            config[PREFIX] = self._add_prefix_space
        if self._as_bert:
            normalizer = self._rust.normalizer
            casing = (normalizer.lowercase, normalizer.strip_accents, normalizer.handle_chinese_chars)
            config |= dict(zip(CASING, casing, strict=True))
        if isinstance(self._rust.model, WordPiece):
            lines = [f"[no token {i}]" for i in range(self.vocab_size)]  # line numbers are ids: no gaps
            for token, i in self._rust.get_vocab().items():
                lines[i] = lines[i] if "\n" in token else token
            write_text(folder / "vocab.txt", "\n".join(lines) + "\n")
        for name, content in (("special_tokens_map.json", names), ("tokenizer_config.json", config)):
            write_text(folder / name, json.dumps(content, indent=2) + "\n")
        write_text(folder / "tokenizer.json", self._rust.to_str(pretty=True))

    @property
    def all_special_ids(self) -> list[int]:
        """Returns the ids that ``skip_special_tokens`` skips, in ascending order."""
        return sorted(i for i, token in self._rust.get_added_tokens_decoder().items() if token.special)

    def for_raw_text(self) -> RustTokenizer:
        """Returns the tokenizer of ``tokenizers`` for running text, in which the text "[MASK]" is not a special token.

        It is a copy without truncation and padding.
        """
        rust = RustTokenizer.from_str(self._rust.to_str())
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        return rust

    @property
    def marks_continuations(self) -> bool:
        """Tells whether a token shows that it continues a word, as ## does in WordPiece."""
        return bool(getattr(self._rust.model, "continuing_subword_prefix", None))

    def get_vocab(self) -> dict[str, int]:
        """Returns the id of each token, added tokens included."""
        return self._rust.get_vocab()

    def num_special_tokens(self, pair: bool) -> int:
        """Returns the number of special tokens that a text gets, or a pair."""
        return len(self._templates[pair]) - len(self._bare[pair])

    def __call__(
        self,
        texts: str | Iterable[str],
        pairs: str | Iterable[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str = True,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Encodes a text to lists of int, or a batch of texts to lists of these.

        ``pairs``: the second texts, as many as ``texts``. ``padding``: False, True or "longest", "max_length".
        ``truncation``: True or "longest_first", "only_first", "only_second"; with False, a text over the limit is an
        error. ``max_length``: the limit, special tokens included; by default ``model_max_length``, and then one warning
        a call counts the truncated texts and the cut tokens. ``return_tensors``: None (lists), "pt" (tensors), "np"
        (arrays); with the last two a single text is a batch of 1.

        Raises TypeError for an item that is not a str. Raises ValueError for lone surrogates, for ``texts`` and
        ``pairs`` of different lengths, for a limit that cannot be met, and for tensors from rows of different lengths.
        """
        one_of("padding", padding, False, True, "longest", "max_length")
        one_of("return_tensors", return_tensors, None, "pt", "np")
        rows = self._encode(texts, pairs, truncation, max_length, add_special_tokens, warn=True)
        if padding or return_tensors:
            arrays = pad_rows(rows, padding, self.pad_token_id, self.padding_side)
            if return_tensors == "pt":
                return Encoding({name: torch.from_numpy(array) for name, array in arrays.items()})
            if return_tensors == "np":
                return Encoding(arrays)
            lists = {name: array.tolist() for name, array in arrays.items()}
        else:
            spans = list(zip(accumulate(rows.lengths), rows.lengths, strict=True))
            mask = np.ones_like(rows.input_ids)
            flat = {"input_ids": rows.input_ids, "token_type_ids": rows.token_type_ids, "attention_mask": mask}
            lists = {name: [array[end - n : end].tolist() for end, n in spans] for name, array in flat.items()}
        return Encoding({name: value[0] for name, value in lists.items()} if isinstance(texts, str) else lists)

    def encode_packed(
        self,
        texts: str | Iterable[str],
        pairs: str | Iterable[str] | None = None,
        *,
        truncation: bool | str = True,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        warn: bool = True,
    ) -> PackedEncoding:
        """Encodes texts one after the other, and never builds a padded batch. Arguments and errors are those of a call.

        ``warn=False``: no warning about cut texts. Their counts are in the result.
        """
        rows = self._encode(texts, pairs, truncation, max_length, add_special_tokens, warn)
        if len(rows.input_ids) >= 2**31:
            raise ValueError(f"texts: got {len(rows.input_ids)} tokens in all, expected fewer than 2**31")
        ends = np.array([0, *accumulate(rows.lengths)], np.int32)
        input_ids, token_type_ids, cu_seqlens = map(torch.from_numpy, (rows.input_ids, rows.token_type_ids, ends))
        return PackedEncoding(input_ids, token_type_ids, cu_seqlens, rows.n_truncated, rows.n_truncated_tokens)

    def encode_with_offsets(self, texts: str | Iterable[str]) -> list[offsets.TokenizedText]:
        """Returns each text's ids, token positions and words; not truncated, without special tokens."""
        return offsets.tokenize(self._rust, _as_list(texts, "texts"))

    def template(self, pair: bool) -> tuple[Any, ...]:
        """Returns the template of a row with a text or a pair, for `offsets.pack`."""
        return self._templates[pair]

    def tokenize(self, text: str) -> list[str]:
        """Returns the word pieces of a text, without special tokens, not truncated."""
        check_text("text", text)
        return self._rust.encode(text, add_special_tokens=False).tokens

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids in a sequence, a 1-D array or a 1-D tensor.

        Pieces are joined, and no space is put before punctuation. Raises ValueError for ids outside the vocabulary, and
        TypeError for anything except one row of ints.
        """
        return self._cleaned(self._rust.decode(self._check_ids(ids), skip_special_tokens=skip_special_tokens))

    def decode_batch(self, batch: Iterable[Any], *, skip_special_tokens: bool = True) -> list[str]:
        """Returns the text of each row, as ``decode`` does."""
        rows = [self._check_ids(ids) for ids in batch]
        return [self._cleaned(text) for text in self._rust.decode_batch(rows, skip_special_tokens=skip_special_tokens)]

    def _cleaned(self, text: str) -> str:
        return clean_up(text) if self.clean_up_tokenization_spaces else text

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Returns the token of an int, or a list of tokens. Raises ValueError for ids outside the vocabulary."""
        tokens = [self._rust.id_to_token(i) for i in self._check_ids(ids)]
        return tokens[0] if np.ndim(ids) == 0 else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Returns the id of a str, or a list of ids. A token that the vocabulary lacks has ``unk_token_id``."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        i = self._rust.token_to_id(tokens)
        return self.unk_token_id if i is None else i

    def _encode(
        self, texts: Any, pairs: Any, truncation: bool | str, max_length: int | None, special: bool, warn: bool
    ) -> Rows:
        sides = [_as_list(texts, "texts")]
        if pairs is not None:
            sides.append(_as_list(pairs, "pairs"))
            if isinstance(texts, str) != isinstance(pairs, str):
                raise TypeError(f"pairs: got {type(pairs).__name__} for texts of type {type(texts).__name__}")
            if len(sides[0]) != len(sides[1]):
                raise ValueError(f"pairs: got {len(sides[1])} for {len(sides[0])} texts, expected as many")
        one_of("truncation", truncation, True, False, "longest_first", "only_first", "only_second")
        if truncation == "only_second" and pairs is None:
            raise ValueError("truncation: got 'only_second' without pairs")
        template = (self._templates if special else self._bare)[len(sides) - 1]
        n_special = len(template) - len(sides)
        limit = self.model_max_length if max_length is None else max_length
        if limit is not None and not (isinstance(limit, (int, np.integer)) and limit >= n_special):
            raise ValueError(f"max_length: got {limit!r}, expected None or an int >= {n_special}, the special tokens")

        # For a single text, NumPy's functions cost more than all of its tokens. So the counts stay lists.
        from_left = one_of("truncation_side", self.truncation_side, "right", "left") == "left"
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        lengths: list[int] = []
        n_truncated = n_truncated_tokens = 0
        for start, end in windows.spans(sides[0], windows.TEXTS, windows.CHARACTERS, *sides[1:]):
            chunk = [text for side in sides for text in side[start:end]]
            encoded = self._encoded(chunk, limit)
            counts = list(map(len, encoded))
            n_rows = len(chunk) // len(sides)
            kept = [counts[i : i + n_rows] for i in range(0, len(chunk), n_rows)]  # of first texts, of second texts
            totals = [n_special + sum(row) for row in zip(*kept, strict=True)]
            if limit is not None and max(totals) > limit:
                n_truncated += sum(total > limit for total in totals)
                kept = kept_counts(np.array(kept), limit, n_special, truncation, start).tolist()
                before, totals = sum(totals), [n_special + sum(row) for row in zip(*kept, strict=True)]
                n_truncated_tokens += before - sum(totals)
            parts.append(assemble(template, encoded, kept, sum(totals), from_left))
            lengths += totals
        if n_truncated and warn and max_length is None:
            logger.warning(
                f"{n_truncated} of {len(sides[0])} texts were longer than model_max_length={limit} and truncated: "
                f"{n_truncated_tokens} tokens cut. Pass max_length= to set the limit yourself."
            )
        arrays = parts[0] if len(parts) == 1 else join_rows(parts)
        return Rows(*arrays, lengths, n_truncated, n_truncated_tokens, limit)

    def _encoded(self, texts: list[str], limit: int | None) -> list[Any]:
        """Returns for each text, without special tokens, an object with a length and with `ids`."""
        if len(texts) <= 2 and max(map(len, texts), default=0) > windows.CHARACTERS and windows.splits(self._rust):
            return [self._in_pieces(text, limit) for text in texts]
        # The library uses one thread per core. It ignores PyTorch's limit; a limit of one is applied here.
        batches = [[text] for text in texts] if torch.get_num_threads() == 1 else [texts]
        return [row for batch in batches for row in self._rust.encode_batch_fast(batch, add_special_tokens=False)]

    def _in_pieces(self, text: str, limit: int | None) -> LongText:
        """Counts all tokens of a long text, and keeps the ids that truncation can leave."""
        n_tokens, ids = 0, np.empty(0, np.int64)
        from_left = self.truncation_side == "left"
        for piece in windows.pieces(text, windows.CHARACTERS):
            (encoding,) = self._rust.encode_batch_fast([piece], add_special_tokens=False)
            n_tokens += len(encoding)
            if limit is None or from_left or len(ids) < limit:
                ids = np.concatenate([ids, np.array(encoding.ids, np.int64)])
            if limit is not None:
                ids = ids[max(len(ids) - limit, 0) :] if from_left else ids[:limit]
        return LongText(ids.tolist(), n_tokens)

    def _check_ids(self, ids: Any) -> list[int]:
        array = np.atleast_1d(np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"ids: got {array.ndim} dimensions of {array.dtype}, expected one row of ints")
        if (outside := (array < 0) | (array >= self.vocab_size)).any():
            raise ValueError(f"ids: got {array[outside][0]}, expected 0 to {self.vocab_size - 1}")
        return array.astype(np.int64).tolist()


def _as_list(texts: Any, name: str) -> list[str]:
    """Returns the texts as a list. Raises TypeError or ValueError for an item that is not a text."""
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a str or a sequence of str")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        check_text(f"{name}[{i}]", text)
    return texts
