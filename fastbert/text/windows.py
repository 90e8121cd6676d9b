"""Texts counted in characters, not in texts: spans of them, and long ones in pieces that give the same tokens.

A text is taken apart only at a space between two plain letters or digits, "... a| b ...", the space with what follows.
The ids of the pieces, one after the other, are those of the whole, if all of this holds (else `splits` is False):

- No token of the added ones stretches over such a place, or ends there and takes the space with it: none holds a space
  between letters or digits, and none that ends in one strips to the right.
- The normalizer looks at single characters, at a letter with its accents, or at runs of spaces. A plain letter begins
  with a base character under each of Unicode's normal forms, and nothing joins over a space.
- The pre-tokenizer splits at such a space, whatever stands on both sides, and adds a space of its own only in front of
  a text that has none. So do BERT's, splits at white space, byte-level BPE's regular expression, and a Metaspace that
  splits.
- The model looks at one word at a time, and without chance: WordPiece, WordLevel, BPE without dropout, Unigram.

CHARACTERS at once keep Rust's encodings, some 200 bytes a token, below 100 MB, also where each character is a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

CHARACTERS = 2**19  # handed to Rust at once, at most, but for a text that cannot be taken apart
TEXTS = 2048  # the same in texts
WINDOW_CHARACTERS = 2**23  # of the texts of a window, which are tokenised one span after the other

# Letters and digits of the scripts that write spaces: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari,
# Georgian, and of those that seldom do: kana, ideographs, Hangul syllables.
_PLAIN = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u0561-\u0586"
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u10d0-\u10f0\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_PLACE = re.compile(f"(?<=[{_PLAIN}]) (?=[{_PLAIN}])")
_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled"}
_SPLITTING = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace"}
_NEUTRAL = {"Digits", "Punctuation"}  # they look at single characters, and may leave the place whole
_MODELS = {"WordPiece", "WordLevel", "BPE", "Unigram"}


def spans(texts: Sequence[str], n_texts: int, characters: int, others: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """(first, last) of runs of at most that many texts and characters, or of one text. others: texts beside them."""
    if len(texts) <= 1:
        if texts:
            yield 0, 1
        return
    first = size = 0
    for i, text in enumerate(texts):
        more = len(text) + len(others[i]) if others else len(text)
        if i > first and (size + more > characters or i - first == n_texts):
            yield first, i
            first, size = i, 0
        size += more
    yield first, len(texts)


def splits(rust: Any) -> bool:
    """Whether the ids of a text are those of its pieces, one after the other, for this Rust tokenizer as it is now."""
    steps = _steps(rust.pre_tokenizer, "pretokenizers")
    first = next((i for i, step in enumerate(steps) if step["type"] in _SPLITTING and _is_forced(step)), None)
    if first is None or not {step["type"] for step in steps[:first]} <= _NEUTRAL:
        return False
    if not {step["type"] for step in steps} <= _SPLITTING | _NEUTRAL:
        return False
    if not all(_is_local(step) for step in _steps(rust.normalizer, "normalizers")):
        return False
    if type(rust.model).__name__ not in _MODELS or getattr(rust.model, "dropout", None):
        return False
    normalize = rust.normalizer.normalize_str if rust.normalizer is not None else str
    for token in rust.get_added_tokens_decoder().values():
        forms = (token.content, normalize(token.content))
        if any(_PLACE.search(form) for form in forms) or (token.rstrip and any(_ends_plain(form) for form in forms)):
            return False
    return True


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    if state["type"] == "Sequence":
        return [
            part for step in state[key] for part in ([step] if step["type"] != "Sequence" else [{"type": "nested"}])
        ]
    return [state]


def _is_forced(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer that splits at spaces does so with its settings."""
    return bool(step.get({"ByteLevel": "use_regex", "Metaspace": "split"}.get(step["type"], ""), True))


def _is_local(step: dict[str, Any]) -> bool:
    """Whether a normalizer's step is one of the known, or replaces a string without letters, or runs of spaces."""
    if step["type"] != "Replace":
        return step["type"] in _NORMALIZERS
    pattern = step["pattern"]
    return pattern == {"Regex": " {2,}"} or (
        "String" in pattern and re.fullmatch(r"[^\w\s]+| ", pattern["String"]) is not None
    )


def _ends_plain(text: str) -> bool:
    return re.search(f"[{_PLAIN}]$", text) is not None


def place_before(text: str, end: int, low: int = 0) -> int:
    """The last place after ``low`` and up to ``end`` at which a text may be taken apart; ``low`` if there is none."""
    step = 256
    while True:
        start = max(end - step, low + 1)
        found = [match.start() for match in _PLACE.finditer(text, start, min(end + 2, len(text)))]
        places = [place for place in found if place <= end]
        if places or start == low + 1:
            return max(places, default=low)
        step *= 4


def place_after(text: str, start: int) -> int:
    """The first place at or after ``start`` at which the text may be taken apart; its length where there is none."""
    match = _PLACE.search(text, start)
    return len(text) if match is None else match.start()


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of about ``size`` characters, and longer ones where it has no place."""
    start = 0
    while len(text) - start > size:
        end = place_before(text, start + size, start)
        if end == start:
            end = place_after(text, start + size)
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def cut(text: str, size: int, from_left: bool) -> str:
    """The beginning of a text, of about ``size`` characters, or with ``from_left`` its end; or the text as it is."""
    if len(text) <= size:
        return text
    if from_left:
        start = len(text) - size
        place = place_after(text, start)
        return text[place if place < len(text) else place_before(text, start) :]
    return text[: place_before(text, size) or place_after(text, size)]
