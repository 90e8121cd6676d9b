"""transformers 5 builds tokenizers of some classes from a vocabulary and a few settings. KINDS describes these classes.

For these classes, all other content of tokenizer.json is ignored.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram

from fastbert.text.sentencepiece import BPE as BPE_MODEL
from fastbert.text.sentencepiece import MODEL_TYPES, UNIGRAM, PieceModel, merges_of
from fastbert.text.settings import NAMES, PREFIX

_SPACE = "\u2581"
_BERT_NAMES = {**NAMES, "bos_token": "[CLS]", "eos_token": "[SEP]"}
_ROBERTA_NAMES = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>",
    "cls_token": "<s>", "mask_token": "<mask>",
}  # fmt: skip
_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


@dataclass(frozen=True)
class Kind:
    """A Kind describes the common properties of the tokenizers of some transformers classes.

    model: the type of the model in tokenizer.json. names: the special tokens if no file names them. token_types:
    whether the second text of a pair has token type 1. template: the special tokens around texts, "bert" for [CLS] A
    [SEP] B [SEP], "roberta" for <s> A </s> </s> B </s>, "" for none. ends: the names of the tokens at both ends.
    pieces: the name of the SentencePiece file. mask_after_space: whether the mask includes the space before it.
    adds_mask: whether the mask may be missing in a vocabulary; it then gets the id after the last one. lowercases:
    whether do_lower_case has an effect.
    """

    model: str
    names: Mapping[str, str]
    token_types: bool = False
    template: str = "roberta"
    ends: tuple[str, str] = ("cls_token", "sep_token")
    pieces: str = ""
    mask_after_space: bool = False
    adds_mask: bool = False
    lowercases: bool = False


_BERT = Kind("WordPiece", NAMES, token_types=True, template="bert")
_ROBERTA = Kind("BPE", _ROBERTA_NAMES)
_BOS, _XLM_FILE = ("bos_token", "eos_token"), "sentencepiece.bpe.model"

BERT_KINDS = ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert",
              "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader")  # fmt: skip
ROBERTA_KINDS = ("Roberta", "Longformer", "LED", "Bart")
WORDPIECE_KINDS = (*BERT_KINDS, "MPNet")  # MPNet has BERT's words and RoBERTa's special tokens.
# Classes of transformers, without "Tokenizer" and "Fast". KoBERT's class is in its folders, as code that is not run.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(BERT_KINDS, _BERT),
    **dict.fromkeys(("DistilBert", "DPRReader"), Kind("WordPiece", NAMES, template="bert")),
    **dict.fromkeys(ROBERTA_KINDS, _ROBERTA),
    "MPNet": Kind("WordPiece", {**_ROBERTA_NAMES, "unk_token": "[UNK]"}, mask_after_space=True),
    "Deberta": Kind("BPE", _BERT_NAMES),
    "GPT2": Kind("BPE", _GPT2_NAMES, template=""),
    "XLMRoberta": Kind("Unigram", _ROBERTA_NAMES, ends=_BOS, pieces=_XLM_FILE),
    "Camembert": Kind("Unigram", _ROBERTA_NAMES, ends=_BOS, pieces=_XLM_FILE, mask_after_space=True),
    "Albert": Kind("Unigram", {**_BERT_NAMES, "unk_token": "<unk>", "pad_token": "<pad>"}, template="bert",
                   pieces="spiece.model", lowercases=True),
    "DebertaV2": Kind("Unigram", _BERT_NAMES, True, "bert", pieces="spm.model", adds_mask=True,
                      lowercases=True),
    "KoBert": Kind("Unigram", _BERT_NAMES, True, "bert", pieces="tokenizer_78b3253a26.model", lowercases=True),
    "KoBERT": Kind("Unigram", _BERT_NAMES, True, "bert", pieces="spiece.model", mask_after_space=True,
                   lowercases=True),
}  # fmt: skip
CAMEMBERT_EXTRA = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]
# Model types without a table in checkpoint/families.py, and their tokenizers.
OTHER_FAMILIES = {"albert": "Albert", "deberta": "Deberta", "gpt2": "GPT2"}

Vocabulary = list[tuple[str, float]]


def piece_file(folder: Path, kind: str) -> Path | None:
    """Returns the SentencePiece file of a folder: the file with the kind's name, or else the only one in the folder."""
    own = KINDS[kind].pieces if kind in KINDS else ""
    if own and (folder / own).is_file():
        return folder / own
    others = sorted(path for pattern in ("*.model", "*.spiece") for path in folder.glob(pattern))
    return others[0] if len(others) == 1 else None


def is_kobert(folder: Path, kind: str, class_is_named: bool, pieces: Path | None) -> bool:
    """Tells whether a folder holds KoBERT's SentencePiece file, even if the config does not name KoBERT's class.

    skt/kobert-base-v1 names XLNet's class, whose subclass is KoBERT's; monologg/kobert also has a vocab.txt.
    """
    if kind in ("KoBert", "KoBERT") or pieces is None:
        return pieces is not None and kind in ("KoBert", "KoBERT")
    named = pieces.name == KINDS["KoBert"].pieces or "kobert" in pieces.name
    return named or kind == "XLNet" or (kind == "Bert" and not class_is_named and not (folder / "vocab.txt").is_file())


def vocabulary_of(kind: str, model: PieceModel, names: Mapping[str, str | None], ids: dict[str, int]) -> Vocabulary:
    """Returns the tokens with their scores, in the order of the model's ids.

    XLM-RoBERTa and CamemBERT have fairseq's four tokens first and the mask last. KoBERT's vocab.txt, if it exists,
    determines the order. names: the special tokens. ids: those of vocab.txt.
    """
    pieces: Vocabulary = [(piece.text, piece.score) for piece in model.pieces]
    bos, pad, eos, unk, mask = (
        names.get(name) or _ROBERTA_NAMES[name]
        for name in ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    )
    if kind == "XLMRoberta":
        return [(bos, 0.0), (pad, 0.0), (eos, 0.0), (unk, 0.0), *pieces[3:], (mask, 0.0)]
    if kind == "Camembert":
        front = [("<s>NOTUSED", 0.0), (pad, 0.0), ("</s>NOTUSED", 0.0), (unk, 0.0), ("<unk>NOTUSED", -100.0)]
        return [*front, *pieces[1:], (mask, 0.0)]
    if kind in ("KoBert", "KoBERT"):
        # KoBERT does not use pieces of a number with a comma: it splits them without the comma. So they score lowest.
        pieces = [(text, score - 100 * ends_in_number(text)) for text, score in pieces]
        if ids:
            scores = dict(pieces)
            worst = min(scores.values()) - 100
            pieces = [(f"[no token {i}]", worst) for i in range(max(ids.values()) + 1)]
            for text, i in ids.items():
                pieces[i] = text, scores.get(text, worst)
    return pieces


def parts_of_transformers_4(kind: str, model: PieceModel) -> list[str]:
    """Names the parts of a SentencePiece file that transformers 4 uses or changes, and transformers 5 does not."""
    parts = ["normalizer"] if kind == "DebertaV2" and model.charsmap else []
    numbers = kind == "Albert" and any(ends_in_number(piece.text) for piece in model.pieces)
    return [*parts, "scores of numbers with a comma"] if numbers else parts


def ends_in_number(text: str) -> bool:
    """Tells whether a piece is a number with a comma after it, which ALBERT, XLNet and KoBERT split."""
    return len(text) > 1 and text[-1] == "," and text[-2].isdigit()


def unigram(
    kind: str,
    vocab: Vocabulary,
    unknown_id: int,
    charsmap: bytes,
    options: Mapping[str, Any],
    model: PieceModel | None,
) -> RustTokenizer:
    """Makes the tokenizer of a kind with a Unigram model, without special tokens around a text.

    charsmap: SentencePiece's table of the normalizer. model: the model of the file, if there is one. KoBERT's may be
    BPE.
    """
    if model is not None and model.model_type == BPE_MODEL:
        ids = {text: i for i, (text, _) in enumerate(vocab)}
        merges = merges_of([piece for piece in model.pieces if piece.text in ids])
        rust = RustTokenizer(BPE(ids, merges, unk_token=vocab[unknown_id][0], fuse_unk=True))
    else:
        rust = RustTokenizer(Unigram(vocab, unk_id=unknown_id, byte_fallback=False))
    steps: list[Any]
    table = [normalizers.Precompiled(charsmap)] if charsmap else []
    if kind in ("XLMRoberta", "Camembert"):
        steps = table
    elif kind == "DebertaV2":
        lower = [normalizers.Lowercase()] if options.get("do_lower_case", False) else []
        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        steps = [*lower, spaces, normalizers.NFC(), normalizers.Strip(left=False, right=True)]
    else:
        steps = [*_quotes_and_accents(kind, options), *table]
    if steps:
        rust.normalizer = steps[0] if kind in ("XLMRoberta", "Camembert") else normalizers.Sequence(steps)
    never = "first" if kind == "DebertaV2" else "never"
    scheme = "always" if options.get(PREFIX, True) else never
    space = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    if kind == "DebertaV2":
        punctuation = [pre_tokenizers.Punctuation(behavior="isolated")] if options.get("split_by_punct") else []
        rust.pre_tokenizer = pre_tokenizers.Sequence([*punctuation, space])
    else:
        rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    rust.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
    return rust


def unknown_id_of(
    kind: str, vocab: Vocabulary, unknown: str | None, options: Mapping[str, Any], model: PieceModel | None
) -> int:
    """Returns the id of the unknown token in a Unigram model. For some kinds it is fixed, whatever token has it."""
    if kind in ("XLMRoberta", "Albert"):
        return 3 if kind == "XLMRoberta" else 1
    places = [i for i, (token, score) in enumerate(vocab) if token == unknown and (kind != "DebertaV2" or score == 0)]
    if places or kind != "DebertaV2":
        return places[0] if places else 0
    return model.unknown_id if model is not None else int(options.get("unk_id", 1))


def _quotes_and_accents(kind: str, options: Mapping[str, Any]) -> list[Any]:
    """Returns the first steps of ALBERT's normalizer, or of KoBERT's, which composes Hangul again."""
    is_albert = kind == "Albert"
    steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not options.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if options.get("do_lower_case", is_albert):
        steps.append(normalizers.Lowercase())
    return steps if is_albert else [*steps, normalizers.NFC()]


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], prefix: bool) -> RustTokenizer:
    """Makes the tokenizer of a kind with a byte-level BPE model, without special tokens around a text."""
    rust = RustTokenizer(
        BPE(vocab, merges, dropout=None, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    rust.decoder = decoders.ByteLevel()
    return rust


def charsmap_of(normalizer: Any) -> bytes:
    """Returns SentencePiece's table in the normalizer of a tokenizer.json; empty if it has none."""
    if not isinstance(normalizer, dict):
        return b""
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    tables = (step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled")
    return base64.b64decode(next(tables, ""))


def set_template(rust: RustTokenizer, kind: str, first: tuple[str, int], last: tuple[str, int], prefix: bool) -> None:
    """Puts the special tokens of a kind around a text and a pair. first, last: the tokens at both ends, with ids."""
    form = KINDS[kind]
    if form.template == "bert":
        rust.post_processor = processors.BertProcessing(last, first)
    elif kind in (*ROBERTA_KINDS, "MPNet"):
        rust.post_processor = processors.RobertaProcessing(last, first, True, prefix)
    else:
        rust.post_processor = processors.TemplateProcessing(
            single=[first[0], "$A", last[0]],
            pair=[first[0], "$A", last[0], last[0], "$B", last[0]],
            special_tokens=[first, last],
        )


def pieces_obstacle(kind: str, model: PieceModel) -> str | None:
    """Returns the reason why a SentencePiece model cannot be used, or None."""
    fits = (UNIGRAM, BPE_MODEL) if kind in ("KoBert", "KoBERT") else (UNIGRAM,)
    if model.model_type in fits:
        return None
    name = MODEL_TYPES.get(model.model_type, str(model.model_type))
    return f"its model is of type {name!r}, expected {' or '.join(repr(MODEL_TYPES[fit]) for fit in fits)}"
