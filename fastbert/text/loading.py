"""This module makes the Rust tokenizer of a checkpoint from its files, with the ids of transformers 5.

transformers 5 builds the tokenizers of some classes from the vocabulary and the settings of tokenizer_config.json, and
ignores the other content of tokenizer.json. This module does the same. For any other class it uses tokenizer.json
unchanged. transformers 4 used more of tokenizer.json. A warning names a folder for which this makes a difference.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from fastbert.checkpoint.families import FAMILIES
from fastbert.checkpoint.family import Family
from fastbert.checkpoint.files import read_json
from fastbert.checkpoint.folder import resolve
from fastbert.checks import one_of
from fastbert.text import kinds
from fastbert.text.kinds import BERT_KINDS, CAMEMBERT_EXTRA, KINDS, WORDPIECE_KINDS
from fastbert.text.sentencepiece import CONTROL, USER_DEFINED, PieceModel, read_pieces
from fastbert.text.settings import (
    CASING,
    FLAGS,
    IN_PYTHON,
    NAMED,
    NAMES,
    PREFIX,
    SETTINGS,
    flags_of,
    is_named_token,
    limit_of,
    log_unfollowed,
    merged,
    names_extra_tokens,
)
from fastbert.text.transformers4 import parts_that_differ, prefix_that_differs
from fastbert.text.vocabulary import TOKEN_FIELDS, Source, bert_pipeline, set_bert_template

logger = logging.getLogger("fastbert")

_GENERIC = ("PreTrained", "TokenizersBackend")  # classes that use a tokenizer.json unchanged


def load(src: str | os.PathLike[str], revision: str | None, overrides: dict[str, Any]) -> Source:
    """Reads the parts of a ``Tokenizer``. Arguments and errors are those of ``Tokenizer.from_pretrained``."""
    known = (*NAMES, *CASING, *SETTINGS, *FLAGS, PREFIX)
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(f"from_pretrained: got {', '.join(unknown)}, expected only {', '.join(known)}")
    file = Path(os.path.expanduser(src)) if src else None
    if file is None or not file.is_file():
        file = resolve(src, revision=revision, weights=False) / "tokenizer.json"
    return _Folder(file, overrides).source()


class _Folder:
    """A _Folder reads the files beside a tokenizer.json or a vocab.txt, and combines their content."""

    def __init__(self, file: Path, overrides: dict[str, Any]) -> None:
        self.folder, self.overrides = file.parent, overrides
        config, special_map, self.older_added_tokens, model = (
            _read_json(file.with_name(name))
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
        )
        if file.suffix == ".json" and (versioned := _versioned(config.get("fast_tokenizer_files"))):
            file = file.with_name(versioned)
        self.file, self.vocab_file = file, file if file.suffix == ".txt" else file.with_name("vocab.txt")
        self.tokenizer_json = _read_json(file) if file.suffix == ".json" else {}
        if config:
            log_unfollowed(config, file.with_name("tokenizer_config.json"))
        self.added_tokens = config.get("added_tokens_decoder")
        self.options = {**merged(config, special_map), **overrides}
        self.names_extra_tokens = names_extra_tokens(config, special_map)
        self.unknown_id = 0  # of a Unigram model

        family = _family_of(model.get("model_type"))
        named = config.get("tokenizer_class") or model.get("tokenizer_class")
        own = kinds.OTHER_FAMILIES.get(str(model.get("model_type")), family.tokenizer)
        self.class_name = named or f"{own}Tokenizer"
        self.kind = self.class_name.removesuffix("Fast").removesuffix("Tokenizer")
        self._find_pieces(bool(named))
        named_by_class = (known for known in FAMILIES.values() if known.tokenizer == self.kind)
        self.family = family if self.kind in _GENERIC else next(named_by_class, family)
        if self.kind in IN_PYTHON or self.class_name == "BertTokenizerLegacy":
            raise ValueError(f"{self.folder}: tokenizer_class {self.class_name!r} runs in Python and is not supported")
        self.model_type = _model_type(self.tokenizer_json.get("model", {}))
        self.is_made_anew = self.kind in KINDS and (
            not self.tokenizer_json or self.model_type == KINDS[self.kind].model
        )
        if not self.is_made_anew and self.kind not in _GENERIC:
            logger.warning(
                "%s: no rules are known for tokenizer_class %r: tokenizer.json, with a %s, is taken as it stands",
                self.folder, self.class_name, self.model_type,
            )  # fmt: skip

    def _find_pieces(self, class_is_named: bool) -> None:
        """Reads the SentencePiece file if the kind has one and there is no tokenizer.json, and detects KoBERT's."""
        self.pieces: PieceModel | None = None
        if self.tokenizer_json or self.file.suffix == ".txt":
            return
        file = kinds.piece_file(self.folder, self.kind) if self.file.suffix == ".json" else self.file
        if kinds.is_kobert(self.folder, self.kind, class_is_named, file):
            self.kind = self.kind if self.kind == "KoBert" else "KoBERT"
        if file is None or self.kind not in KINDS or KINDS[self.kind].model != "Unigram":
            return
        self.file, self.pieces = file, read_pieces(file)
        if obstacle := kinds.pieces_obstacle(self.kind, self.pieces):
            raise ValueError(f"{file}: {obstacle}")

    def source(self) -> Source:
        """Returns the content of the files. Errors are those of ``Tokenizer.from_pretrained``."""
        padding, truncation = self.tokenizer_json.get("padding") or {}, self.tokenizer_json.get("truncation") or {}
        sides = {"padding_side": padding.get("direction"), "truncation_side": truncation.get("direction")}
        defaults = {name: side.lower() for name, side in sides.items() if isinstance(side, str)}
        names = self._names(padding.get("pad_token"))
        contents = {name: _content(names.get(name)) for name in NAMED}
        rust = self._rust(contents)
        self._check_names(rust, names)
        rust.add_tokens(self._tokens(names))
        self._set_template(rust, contents)
        self._log_older_versions(rust)
        settings = {"model_max_length": limit_of(self.options), **flags_of(self.options)}
        if isinstance(rust.model, BPE) and not self.options.get(
            f"{FLAGS[1]}_for_bpe_even_though_it_will_corrupt_output"
        ):
            settings[FLAGS[1]] = False
        for name in SETTINGS[1:]:
            settings[name] = one_of(name, self.options.get(name, defaults.get(name, "right")), "right", "left")
        public = {name: contents[name] for name in NAMES}
        # Tokens that no file names are only readable as attributes: they never become special tokens in a text.
        for name in NAMES:
            fallback = self.family.special_tokens.get(name, NAMES[name])
            if public[name] is None and name not in self.options and rust.token_to_id(fallback) is not None:
                public[name] = fallback
        for name in ("unk_token", "cls_token", "sep_token"):
            if public[name] is None:
                raise ValueError(f"{name}: got None, which the vocabulary in {self.folder} lacks")
        as_bert = self.is_made_anew and self.kind in BERT_KINDS
        prefix = None if as_bert else _prefix_of(rust)
        return Source(rust, public, settings, as_bert, self._has_token_types(rust), prefix)

    # Names and tokens

    def _names(self, stored_pad: str | None) -> dict[str, Any]:
        """Returns the named special tokens, each a str or a dict, in the order of transformers."""
        defaults = KINDS[self.kind].names if self.is_made_anew else {"pad_token": stored_pad}
        names = {name: self.options.get(name, defaults.get(name)) for name in NAMED}
        if self.is_made_anew and KINDS[self.kind].mask_after_space and isinstance(names["mask_token"], str):
            names["mask_token"] = {"content": names["mask_token"], "lstrip": True}
        own = {key: value for key, value in self.options.items() if is_named_token(key, value)}
        return names | own | self.options["model_specific_special_tokens"]

    def _tokens(self, names: Mapping[str, Any]) -> list[AddedToken]:
        """Returns the tokens that Rust does not split: the stored ones by id, the named ones, and the extra ones."""
        extra = self.options["extra_special_tokens"]
        # The whole tokens of SentencePiece, unless the config names tokens; only its control pieces are special.
        if self.pieces is not None and not self.names_extra_tokens:
            extra = [
                AddedToken(piece.text, special=piece.type == CONTROL, normalized=False)
                for piece in self.pieces.pieces
                if piece.type in (CONTROL, USER_DEFINED)
            ]
        elif extra is None:
            extra = CAMEMBERT_EXTRA if self.is_made_anew and self.kind == "Camembert" else []
        added = self.added_tokens
        if added is None:
            explicit = {_content(self.options.get(name)) for name in NAMED} | {_content(token) for token in extra}
            added = {
                i: {"content": token, "special": token in explicit, "normalized": token not in explicit}
                for token, i in self.older_added_tokens.items()
            }
            added |= {token["id"]: token for token in self.tokenizer_json.get("added_tokens", [])}
        tokens = {token.content: token for token in (_added_token(added[i]) for i in sorted(added, key=int))}
        for value in names.values():
            if value is not None:
                token = _added_token(value, special=True)
                tokens.setdefault(token.content, token).special = True
        for value in extra:
            token = value if isinstance(value, AddedToken) else _added_token(value, special=True)
            tokens.setdefault(token.content, token)
        return list(tokens.values())

    def _check_names(self, rust: RustTokenizer, names: Mapping[str, Any]) -> None:
        """Raises ValueError for a token that the vocabulary lacks. transformers gives it an id beyond the model's."""
        stored = [*(self.added_tokens or {}).values(), *self.tokenizer_json.get("added_tokens", [])]
        known = {_content(token) for token in stored} | set(self.older_added_tokens)
        for name in NAMES:
            value = names.get(name)
            optional = name in ("pad_token", "mask_token") or not self.is_made_anew
            if value is None and optional or self._adds(name):
                continue
            content = _content(value)
            if content is None or (rust.token_to_id(content) is None and content not in known):
                raise ValueError(f"{name}: got {value!r}, which the vocabulary in {self.folder} lacks")

    def _adds(self, name: str) -> bool:
        """Tells whether a token may be missing in the vocabulary, because the model has a row for it at the end."""
        return name == "mask_token" and self.is_made_anew and KINDS[self.kind].adds_mask

    def _has_token_types(self, rust: RustTokenizer) -> bool:
        """Tells whether the second text of a pair has token type 1, if the post-processor gives it."""
        inputs = self.options.get("model_input_names")
        if inputs is not None:
            return "token_type_ids" in inputs
        if self.kind in KINDS:
            return KINDS[self.kind].token_types and self.family.segments
        if self.family.segments and any(rust.encode("a", "a").type_ids):
            logger.warning(
                "%s: a pair has no segment ids, as in transformers 5: tokenizer_class %r has none unless "
                "model_input_names names token_type_ids; transformers 4 gives them",
                self.folder, self.class_name,
            )  # fmt: skip
        return False

    def _log_older_versions(self, rust: RustTokenizer) -> None:
        """Logs the parts of tokenizer.json that only one of transformers 4 and 5 uses."""
        if self.is_made_anew and self.pieces is not None:
            self._log_parts(kinds.parts_of_transformers_4(self.kind, self.pieces))
        elif not self.tokenizer_json:
            return
        elif self.is_made_anew:
            try:
                parts = parts_that_differ(self.tokenizer_json, rust, self.options, self.unknown_id)
            except ValueError as error:
                raise ValueError(f"{self.file} is {error}") from error
            self._log_parts(parts)
        elif prefix_that_differs(rust, self.options):
            logger.warning(
                "%s: its pre_tokenizer: as tokenizer.json has it, like transformers 5; transformers 4 takes "
                "add_prefix_space=%s from the config", self.folder, bool(self.options.get(PREFIX, False)),
            )  # fmt: skip

    def _log_parts(self, parts: list[str]) -> None:
        if parts:
            logger.warning(
                "%s: its %s: as %s of transformers 5 has it; transformers 4 takes that from %s, which has another, and "
                "ids may differ", self.folder, " and ".join(parts), self.class_name, self.file.name,
            )  # fmt: skip

    # The Rust object

    def _rust(self, contents: Mapping[str, str | None]) -> RustTokenizer:
        options, model = self.options, self.tokenizer_json.get("model", {})
        casing: dict[str, Any] = {name: options.get(name, default) for name, default in CASING.items()}
        if self.is_made_anew and self.kind in WORDPIECE_KINDS:
            if self.tokenizer_json and not isinstance(model.get("vocab"), dict):
                raise ValueError(f"{self.file} holds no vocabulary")
            vocab = model["vocab"] if self.tokenizer_json else _read_vocab(self.vocab_file, contents)
            rust = bert_pipeline(vocab, contents["unk_token"] or "", **casing)
        elif casing_overrides := sorted(set(self.overrides) & set(CASING) - self._casing()):
            name = casing_overrides[0]
            raise ValueError(f"{name}: cannot be changed, as {self.file} is not BERT's and is used as it stands")
        elif self.is_made_anew and KINDS[self.kind].model == "BPE":
            rust = self._byte_level(model)
        elif self.is_made_anew and (self.tokenizer_json or self.pieces):
            rust = self._unigram(model, contents)
        elif not self.tokenizer_json:
            other = f" or a {KINDS[self.kind].pieces}" if self.kind in KINDS and KINDS[self.kind].pieces else ""
            raise FileNotFoundError(
                f"{self.folder}: tokenizer_class {self.class_name!r} needs a tokenizer.json{other}, not a vocab.txt"
            )
        else:
            try:
                rust = RustTokenizer.from_file(str(self.file))
            except Exception as error:  # tokenizers raises no more precise class
                raise ValueError(f"{self.file} is no tokenizer: {error}") from error
            rust.no_truncation()
            rust.no_padding()
        if PREFIX in self.overrides and (not self.is_made_anew or self.kind in WORDPIECE_KINDS):
            raise ValueError(f"{PREFIX}: cannot be changed for tokenizer_class {self.class_name!r}")
        return rust

    def _casing(self) -> set[str]:
        """Returns the casing options that a tokenizer other than BERT's has too."""
        return {"do_lower_case"} if self.is_made_anew and KINDS[self.kind].lowercases else set()

    def _byte_level(self, model: Mapping[str, Any]) -> RustTokenizer:
        """Makes RoBERTa's tokenizer from tokenizer.json, or from vocab.json and merges.txt."""
        if self.tokenizer_json:
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            vocab, merges = model["vocab"], [(first, second) for first, second in pairs]
        else:
            paths = [self.file.with_name(name) for name in ("vocab.json", "merges.txt")]
            if not all(path.is_file() for path in paths):
                raise FileNotFoundError(
                    f"{self.folder}: tokenizer_class {self.class_name!r} needs a tokenizer.json, or vocab.json and "
                    "merges.txt, not a vocab.txt"
                )
            vocab, merges = BPE.read_file(*map(str, paths))
        return kinds.byte_level(vocab, merges, bool(self.options.get(PREFIX, False)))

    def _unigram(self, model: Mapping[str, Any], contents: Mapping[str, str | None]) -> RustTokenizer:
        """Makes a tokenizer of pieces from tokenizer.json or from a SentencePiece file.

        From the normalizer in tokenizer.json it uses only SentencePiece's table.
        """
        if self.pieces is None:
            vocab = [(token, score) for token, score in model["vocab"]]
            charsmap = kinds.charsmap_of(self.tokenizer_json.get("normalizer"))
        else:
            ids = _read_vocab(self.vocab_file, contents) if self.vocab_file.is_file() else {}
            vocab = kinds.vocabulary_of(self.kind, self.pieces, contents, ids)
            charsmap = self.pieces.charsmap
        unknown = contents["unk_token"]
        self.unknown_id = kinds.unknown_id_of(self.kind, vocab, unknown, self.options, self.pieces)
        return kinds.unigram(self.kind, vocab, self.unknown_id, charsmap, self.options, self.pieces)

    def _set_template(self, rust: RustTokenizer, contents: Mapping[str, Any]) -> None:
        """Sets the special tokens of the class around a text and a pair."""
        if not self.is_made_anew:
            return
        if self.kind in BERT_KINDS:
            set_bert_template(rust, contents["cls_token"], contents["sep_token"])
            return
        if not KINDS[self.kind].template:
            return
        ends: list[tuple[str, int]] = []
        for name in KINDS[self.kind].ends:
            token = contents[name]
            token_id = None if token is None else rust.token_to_id(token)
            if token is None or token_id is None:
                raise ValueError(f"{name}: got {token!r}, which the vocabulary in {self.folder} lacks")
            ends.append((token, token_id))
        first, last = ends
        kinds.set_template(rust, self.kind, first, last, bool(self.options.get(PREFIX, False)))


def _family_of(model_type: Any) -> Family:
    """Returns the family of a model type; BERT's for a missing or unsupported type."""
    return FAMILIES.get(model_type, FAMILIES["bert"]) if isinstance(model_type, str) else FAMILIES["bert"]


def _versioned(files: Any) -> str | None:
    """Returns the newest of the tokenizer files for several versions of transformers."""
    numbered = [name for name in files or [] if re.fullmatch(r"tokenizer\.\d[\d.]*\.json", name)]
    return max(numbered, key=lambda name: [int(part) for part in re.findall(r"\d+", name)], default=None)


def _model_type(model: Mapping[str, Any]) -> str | None:
    """Returns the type of a model in tokenizer.json. Old files do not name it."""
    if model.get("type"):
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    vocab = model.get("vocab")
    return "Unigram" if isinstance(vocab, list) else "WordPiece" if isinstance(vocab, dict) else None


def _prefix_of(rust: RustTokenizer) -> bool | None:
    """Returns add_prefix_space of the pre-tokenizer, or None if it has none."""
    return getattr(rust.pre_tokenizer, PREFIX, None)


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else getattr(token, "content", token)


def _added_token(token: str | dict[str, Any], **flags: bool) -> AddedToken:
    fields = {"content": token} if isinstance(token, str) else {k: v for k, v in token.items() if k in TOKEN_FIELDS}
    return AddedToken(**(fields | flags))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_vocab(path: Path, names: Mapping[str, str | None]) -> dict[str, int]:
    """Returns the line number of each token. The last of equal lines counts; a special token must not be repeated."""
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {path.parent}: looked for tokenizer.json and vocab.txt")
    try:
        lines = path.read_bytes().decode().split("\n")  # read_text would treat a stray \r as a line end
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
