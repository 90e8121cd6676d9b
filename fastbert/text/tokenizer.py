"""Text to token ids and back, on the ``tokenizers`` library: BERT's WordPiece, and what a tokenizer.json holds.

For one folder the ids are those of transformers' tokenizer. Truncation and padding are done here, on arrays, and
not by the Rust object, where both are state: threads that share a tokenizer may differ in ``max_length``, and the
tokens that are cut can be counted. ``B`` sequences, ``S`` longest sequence, ``T`` packed tokens.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers.models import WordPiece

from fastbert.checkpoint.files import write_text
from fastbert.checks import check_text, one_of
from fastbert.text import windows
from fastbert.text.loading import load
from fastbert.text.settings import CASING, FLAGS, NAMES, PREFIX, SETTINGS, clean_up
from fastbert.text.vocabulary import TOKEN_FIELDS, Source, learn

logger = logging.getLogger("fastbert")

_CHUNK = windows.TEXTS


class Encoding(dict[str, Any]):
    """``input_ids``, ``token_type_ids`` and ``attention_mask``, by key or attribute; ``model(**encoding)`` works.

    The values are lists of int (lists of these for a batch), int64 arrays (B, S) or int64 tensors (B, S).
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"Encoding has no {name!r}, only {', '.join(self)}")
        return self[name]

    def to(self, device: str | int | torch.device) -> Encoding:
        """Move the tensors to ``device``, in place, and return self. Raises TypeError where the values are none."""
        for name, value in self.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"to: {name} is a {type(value).__name__}; encode with return_tensors='pt'")
            self[name] = value.to(device)
        return self


@dataclass
class PackedEncoding:
    """B sequences end to end, without padding, on the CPU."""

    input_ids: torch.Tensor  # (T,) int64
    token_type_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32, starts at 0, ends at T
    n_truncated: int  # sequences that lost tokens to truncation
    n_truncated_tokens: int  # tokens they lost


class _Piece(NamedTuple):
    """A piece of a sequence, such as each of [CLS] A [SEP]."""

    source: int  # 0: first text, 1: second text, -1: one special token
    ids: list[int]  # the special token, or nothing
    type: int  # segment id


class _Rows(NamedTuple):
    ids: np.ndarray  # (T,)
    types: np.ndarray  # (T,)
    lengths: list[int]  # (B,)
    n_truncated: int
    n_truncated_tokens: int
    limit: int | None


class _Long:
    """A long text's number of tokens, and the ids of as many at one end as are needed."""

    def __init__(self, ids: list[int], n_tokens: int) -> None:
        self.ids, self.n_tokens = ids, n_tokens

    def __len__(self) -> int:
        return self.n_tokens


class Tokenizer:
    """The tokenizer of a BERT checkpoint, from ``from_pretrained`` or ``train``. Threads may share it.

    ``vocab_size`` is the highest id + 1: the rows an embedding table needs. ``model_max_length`` (tokens; None: no
    limit), ``padding_side`` and ``truncation_side`` ("right" or "left") may be set at any time; the special tokens and
    their ids are for reading.
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
        """Internal: use ``from_pretrained`` or ``train``."""
        rust = self._rust = source.rust
        self._as_bert = source.as_bert
        self._segments = source.segments
        # Of a text and of a pair, with special tokens and without.
        self._templates = tuple(_template(rust.encode(*texts), source.segments) for texts in (("a",), ("a", "a")))
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
        self._rust.encode_special_tokens = self.split_special_tokens  # which the Rust object forgets in a pickle

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, model_max_length={self.model_max_length})"

    @classmethod
    def from_pretrained(
        cls, src: str | os.PathLike[str], *, revision: str | None = None, **overrides: Any
    ) -> Tokenizer:
        """Load from a local folder, a hub id, or the path of a ``vocab.txt``.

        Reads ``tokenizer.json`` if it is there, else ``vocab.txt``, or RoBERTa's ``vocab.json`` and ``merges.txt``;
        beside it ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``. ``tokenizer_class``,
        or without one ``model_type`` of ``config.json``, says what is done with them, as in transformers 5. The
        tokenizers of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and their kin are made anew from the vocabulary and from
        ``do_lower_case`` (True), ``strip_accents`` (None: as lowercase), ``tokenize_chinese_chars`` (True) or
        ``add_prefix_space`` (False for RoBERTa, else True), whatever else ``tokenizer.json`` says. Of any other class
        ``tokenizer.json`` is taken as it stands. Of truncation and padding stored there, only the sides are taken.
        Where transformers gives no segment ids (by ``model_input_names`` of the config, or by its class) they are all
        0. Keys that are not followed are logged by name, and so are folders that transformers 4 reads in another way.

        ``overrides`` replace values of the config: these four, ``model_max_length``, ``padding_side``,
        ``truncation_side``, ``split_special_tokens``, ``clean_up_tokenization_spaces``, ``cls_token``, ``sep_token``,
        ``unk_token``, ``pad_token``, ``mask_token``. The last two may be None where the vocabulary has no such token.

        Raises FileNotFoundError if neither file is there; ValueError for a file that cannot be read, a special token
        the vocabulary lacks or holds twice, or a bad value; TypeError for an unknown override.
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
        """Learn a WordPiece vocabulary. The same input gives the same tokens with the same ids.

        ``texts_or_files``: str items are texts, Path items are UTF-8 files, one text a line. They are read twice; what
        can be iterated only once is spooled to a temporary file. ``special_tokens`` get the ids from 0 on and must
        contain BERT's five. ``limit_alphabet``: how many characters to keep, the most frequent first (default: a third
        of ``vocab_size``); a word with any other character is [UNK]. A kept character becomes a token, and a second
        one with ## if it can stand inside a word. A merge needs ``min_frequency`` occurrences.

        ``strip_accents=None`` follows ``lowercase``, as in BERT, except where the input contains a Hangul syllable,
        anywhere: then accents stay, because stripping them begins with Unicode's NFD, which takes syllables apart into
        Jamo. True is obeyed, with a warning if it meets Hangul. Korean text that comes in NFD stays in NFD: bring it
        to NFC before training and before encoding.

        Raises TypeError for an item that is neither str nor Path; ValueError if there is no text, if it holds lone
        surrogates or is not UTF-8, or if special tokens and alphabet exceed ``vocab_size``.
        """
        casing: dict[str, Any] = {"do_lower_case": lowercase, "strip_accents": strip_accents}
        trainer = {"vocab_size": vocab_size, "min_frequency": min_frequency, "show_progress": show_progress}
        return cls(learn(texts_or_files, casing, special_tokens, limit_alphabet, trainer))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write what ``from_pretrained`` and transformers load to the same ids.

        These are tokenizer.json, tokenizer_config.json, special_tokens_map.json and, for WordPiece, vocab.txt.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = {name: getattr(self, name) for name in NAMES}
        added = sorted(self._rust.get_added_tokens_decoder().items())
        flags = {i: {flag: getattr(token, flag) for flag in TOKEN_FIELDS} for i, token in added}
        config = {"tokenizer_class": "BertTokenizer" if self._as_bert else "PreTrainedTokenizerFast", **names}
        config["added_tokens_decoder"] = flags
        if not self._segments:
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
            lines = [f"[no token {i}]" for i in range(self.vocab_size)]  # the line is the id: no gaps
            for token, i in self._rust.get_vocab().items():
                lines[i] = lines[i] if "\n" in token else token
            write_text(folder / "vocab.txt", "\n".join(lines) + "\n")
        for name, content in (("special_tokens_map.json", names), ("tokenizer_config.json", config)):
            write_text(folder / name, json.dumps(content, indent=2) + "\n")
        write_text(folder / "tokenizer.json", self._rust.to_str(pretty=True))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that ``skip_special_tokens`` skips, ascending."""
        return sorted(i for i, token in self._rust.get_added_tokens_decoder().items() if token.special)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self._rust.get_vocab()

    def num_special_tokens(self, pair: bool) -> int:
        """How many special tokens a text gets, or a pair."""
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
        """Encode a text, to lists of int (with ``return_tensors``, to a batch of 1), or a batch.

        ``pairs``: the second texts, as many as ``texts``. ``padding``: False, True or "longest", "max_length".
        ``truncation``: True or "longest_first", "only_first", "only_second"; with False, a text over the limit is an
        error. ``max_length``: the limit, special tokens included; by default ``model_max_length``, and then one warning
        a call counts the texts and tokens cut. ``return_tensors``: None (lists), "pt" (tensors), "np" (arrays).

        Raises TypeError for an item that is not a str. Raises ValueError for lone surrogates, for ``texts`` and
        ``pairs`` of different lengths, for a limit that cannot be met, and for tensors from rows of different lengths.
        """
        one_of("padding", padding, False, True, "longest", "max_length")
        one_of("return_tensors", return_tensors, None, "pt", "np")
        rows = self._encode(texts, pairs, truncation, max_length, add_special_tokens, warn=True)
        if padding or return_tensors:
            arrays = self._pad(rows, padding)
            if return_tensors == "pt":
                return Encoding({name: torch.from_numpy(array) for name, array in arrays.items()})
            if return_tensors == "np":
                return Encoding(arrays)
            lists = {name: array.tolist() for name, array in arrays.items()}
        else:
            spans = list(zip(accumulate(rows.lengths), rows.lengths, strict=True))
            flat = {"input_ids": rows.ids, "token_type_ids": rows.types, "attention_mask": np.ones_like(rows.ids)}
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
        """Encode a batch end to end. No padded batch is built on the way. Arguments and errors: as ``__call__``.

        ``warn=False``: no warning about cut texts; the counts are in the result.
        """
        rows = self._encode(texts, pairs, truncation, max_length, add_special_tokens, warn)
        if len(rows.ids) >= 2**31:
            raise ValueError(f"texts: got {len(rows.ids)} tokens in all, expected fewer than 2**31")
        cu_seqlens = np.array([0, *accumulate(rows.lengths)], np.int32)
        ids, types, cu = map(torch.from_numpy, (rows.ids, rows.types, cu_seqlens))
        return PackedEncoding(ids, types, cu, rows.n_truncated, rows.n_truncated_tokens)

    def tokenize(self, text: str) -> list[str]:
        """The word pieces of a text, without special tokens, not truncated."""
        check_text("text", text)
        return self._rust.encode(text, add_special_tokens=False).tokens

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """The text of a sequence, 1-D array or 1-D tensor of ids: pieces joined, no space before punctuation.

        Raises ValueError for ids outside the vocabulary, TypeError for what is not one row of ints.
        """
        return self._cleaned(self._rust.decode(self._check_ids(ids), skip_special_tokens=skip_special_tokens))

    def decode_batch(self, batch: Iterable[Any], *, skip_special_tokens: bool = True) -> list[str]:
        """``decode`` of each row."""
        rows = [self._check_ids(ids) for ids in batch]
        return [self._cleaned(text) for text in self._rust.decode_batch(rows, skip_special_tokens=skip_special_tokens)]

    def _cleaned(self, text: str) -> str:
        return clean_up(text) if self.clean_up_tokenization_spaces else text

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an int, else the list of tokens. Ids outside the vocabulary: ValueError."""
        tokens = [self._rust.id_to_token(i) for i in self._check_ids(ids)]
        return tokens[0] if np.ndim(ids) == 0 else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a str, else the list of ids. What the vocabulary lacks has ``unk_token_id``."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        i = self._rust.token_to_id(tokens)
        return self.unk_token_id if i is None else i

    def _encode(
        self, texts: Any, pairs: Any, truncation: bool | str, max_length: int | None, special: bool, warn: bool
    ) -> _Rows:
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

        # There may be one text: counts stay lists, for each of NumPy's functions costs more than all of its tokens.
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        lengths: list[int] = []
        n_truncated = n_truncated_tokens = 0
        for start, end in windows.spans(sides[0], _CHUNK, windows.CHARACTERS, *sides[1:]):
            chunk = [text for side in sides for text in side[start:end]]
            encoded = self._encoded(chunk, limit)
            counts = list(map(len, encoded))
            n_rows = len(chunk) // len(sides)
            kept = [counts[i : i + n_rows] for i in range(0, len(chunk), n_rows)]  # of first texts, of second texts
            totals = [n_special + sum(row) for row in zip(*kept, strict=True)]
            if limit is not None and max(totals) > limit:
                n_truncated += sum(total > limit for total in totals)
                kept = _truncate(np.array(kept), limit, n_special, truncation, start).tolist()
                before, totals = sum(totals), [n_special + sum(row) for row in zip(*kept, strict=True)]
                n_truncated_tokens += before - sum(totals)
            parts.append(self._assemble(template, encoded, kept, sum(totals)))
            lengths += totals
        if n_truncated and warn and max_length is None:
            logger.warning(
                f"{n_truncated} of {len(sides[0])} texts were longer than model_max_length={limit} and truncated: "
                f"{n_truncated_tokens} tokens cut. Pass max_length= to set the limit yourself."
            )
        if len(parts) != 1:
            parts.append((np.empty(0, np.int64),) * 2)
            ids, types = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        else:
            ids, types = parts[0]
        return _Rows(ids, types, lengths, n_truncated, n_truncated_tokens, limit)

    def _encoded(self, texts: list[str], limit: int | None) -> list[Any]:
        """What Rust makes of each text, without special tokens: something with a length, and with `ids`."""
        if len(texts) <= 2 and max(map(len, texts), default=0) > windows.CHARACTERS and windows.splits(self._rust):
            return [self._in_pieces(text, limit) for text in texts]
        # The library's threads are not PyTorch's, and as many as there are cores: whoever allows one gets one.
        at_once = [[text] for text in texts] if torch.get_num_threads() == 1 else [texts]
        return [one for few in at_once for one in self._rust.encode_batch_fast(few, add_special_tokens=False)]

    def _in_pieces(self, text: str, limit: int | None) -> _Long:
        """The tokens of a long text, counted to the end; of the ids those that truncation can leave."""
        n_tokens, ids = 0, np.empty(0, np.int64)
        from_left = self.truncation_side == "left"
        for piece in windows.pieces(text, windows.CHARACTERS):
            (encoding,) = self._rust.encode_batch_fast([piece], add_special_tokens=False)
            n_tokens += len(encoding)
            if limit is None or from_left or len(ids) < limit:
                ids = np.concatenate([ids, np.array(encoding.ids, np.int64)])
            if limit is not None:
                ids = ids[max(len(ids) - limit, 0) :] if from_left else ids[:limit]
        return _Long(ids.tolist(), n_tokens)

    def _assemble(
        self, template: tuple[_Piece, ...], encoded: list[Any], kept: list[list[int]], n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and types, (tokens,); ``encoded`` holds all first texts, then all second ones."""
        n_rows = len(kept[0])
        from_left = one_of("truncation_side", self.truncation_side, "right", "left") == "left"

        def pieces() -> Iterator[list[int]]:
            for row in range(n_rows):
                for source, ids, _ in template:
                    if source >= 0:
                        ids, n = encoded[source * n_rows + row].ids, kept[source][row]
                        ids = ids[len(ids) - n :] if from_left else ids[:n]
                    yield ids

        def types() -> Iterator[Iterator[int]]:
            for row in range(n_rows):
                for source, _, type_ in template:
                    yield repeat(type_, 1 if source < 0 else kept[source][row])

        ids = np.fromiter(chain.from_iterable(pieces()), np.int64, n_tokens)
        if not any(piece.type for piece in template):
            return ids, np.zeros(n_tokens, np.int64)
        return ids, np.fromiter(chain.from_iterable(types()), np.int64, n_tokens)

    def _pad(self, rows: _Rows, padding: bool | str) -> dict[str, np.ndarray]:
        """The rows as arrays (B, S)."""
        lengths = np.array(rows.lengths, np.int64)
        width = int(lengths.max(initial=0))
        if padding == "max_length":
            if rows.limit is None:
                raise ValueError("padding: got 'max_length', but neither max_length nor model_max_length is set")
            width = rows.limit
        elif not padding and (lengths != width).any():
            raise ValueError(f"return_tensors: rows have {lengths.min()} to {width} tokens; pass padding=True")
        if padding and self.pad_token_id is None:
            raise ValueError(f"padding: got {padding!r}, but this tokenizer has no pad_token")
        side = one_of("padding_side", self.padding_side, "right", "left")
        mask = np.arange(width) < lengths[:, None]
        mask = mask if side == "right" else mask[:, ::-1]
        ids, types = np.full(mask.shape, self.pad_token_id or 0, np.int64), np.zeros(mask.shape, np.int64)
        ids[mask], types[mask] = rows.ids, rows.types
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.astype(np.int64)}

    def _check_ids(self, ids: Any) -> list[int]:
        array = np.atleast_1d(np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"ids: got {array.ndim} dimensions of {array.dtype}, expected one row of ints")
        if (outside := (array < 0) | (array >= self.vocab_size)).any():
            raise ValueError(f"ids: got {array[outside][0]}, expected 0 to {self.vocab_size - 1}")
        return array.astype(np.int64).tolist()


def _truncate(full: np.ndarray, limit: int, n_special: int, truncation: bool | str, start: int) -> np.ndarray:
    """How many tokens of each text stay, (1 or 2, rows), by the rules of ``tokenizers``."""
    budget = limit - n_special
    excess = np.maximum(full.sum(0) - budget, 0)
    if not truncation:
        row = int(excess.argmax())
        raise ValueError(
            f"texts[{start + row}] has {excess[row] + limit} tokens, expected at most {limit}, as truncation is False"
        )
    if budget == 0:
        return np.zeros_like(full)
    if truncation in ("only_first", "only_second"):
        kept = full.copy()
        side = kept[int(truncation == "only_second")]
        if (failing := (excess > 0) & (excess >= side)).any():
            row = int(failing.argmax())
            raise ValueError(
                f"truncation: {truncation!r} cannot bring texts[{start + row}] and its pair to {limit} tokens: "
                f"{excess[row]} must go, of the {side[row]} it may cut; use 'longest_first'"
            )
        side -= excess
        return kept
    if len(full) == 1:
        return full - excess
    # The longer text gets what the shorter leaves. Where that is less than the shorter has, each gets half; an odd
    # token goes to the longer text, and to the second if they are equal.
    short = full.min(0)
    half = 2 * short > budget
    short, long = np.where(half, budget // 2, short), np.where(half, budget - budget // 2, budget - short)
    kept = np.where(full[0] > full[1], [long, short], [short, long])
    return np.where(excess > 0, kept, full)


def _template(probe: Any, segments: bool) -> tuple[_Piece, ...]:
    """The template behind an encoding, whatever kind of post-processor made it; without segments, all types are 0."""
    pieces: list[_Piece] = []
    for source, token, type_ in zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True):
        if source is None:
            pieces.append(_Piece(-1, [token], type_ * segments))
        elif not pieces or pieces[-1].source != source:  # the first token of a text
            pieces.append(_Piece(source, [], type_ * segments))
    return tuple(pieces)


def _as_list(texts: Any, name: str) -> list[str]:
    if isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
        raise TypeError(f"{name}: got {type(texts).__name__}, expected a str or a sequence of str")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        check_text(f"{name}[{i}]", text)
    return texts
