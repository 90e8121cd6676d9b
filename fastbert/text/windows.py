"""This module counts texts in characters, and splits long ones into pieces that give the same tokens.

A text is split only at a space between two plain letters or digits, "... a| b ...", and the space belongs to the next
piece. README.md describes for which tokenizers the ids of the pieces equal those of the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

# Maximum number of characters per call of Rust, except for a text that cannot be split. Rust's encodings need about 200
# bytes per token, so they stay below 100 MB even if each character is a token.
CHARACTERS = 2**19
TEXTS = 2048  # maximum number of texts per call of Rust
WINDOW_CHARACTERS = 2**23  # characters of the texts in a window, which is tokenised in several calls

# Letters and digits of scripts with spaces: Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari, Georgian; and
# of scripts with few spaces: kana, ideographs, Hangul syllables.
_PLAIN = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017f\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f\u0561-\u0586"
    "\u05d0-\u05ea\u0621-\u063a\u0641-\u064a\u0905-\u0939\u10d0-\u10f0\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_PLACE = re.compile(f"(?<=[{_PLAIN}]) (?=[{_PLAIN}])")
_NORMALIZERS = {"BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Precompiled"}
_SPLITTING = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "ByteLevel", "Metaspace"}
_NEUTRAL = {"Digits", "Punctuation"}  # they work on single characters, and may leave the space unsplit
_MODELS = {"WordPiece", "WordLevel", "BPE", "Unigram"}


def spans(texts: Sequence[str], n_texts: int, characters: int, others: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Yields (first, last) of runs with at most the given numbers of texts and characters, or with one text.

    others: the second texts of pairs.
    """
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
    """Tells whether the ids of a text equal the concatenated ids of its pieces, for this state of a tokenizer."""
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
    """Tells whether a pre-tokenizer's settings make it split at spaces."""
    return bool(step.get({"ByteLevel": "use_regex", "Metaspace": "split"}.get(step["type"], ""), True))


def _is_local(step: dict[str, Any]) -> bool:
    """Tells whether a normalizer's step reads only single characters, letters with accents or runs of spaces."""
    if step["type"] != "Replace":
        return step["type"] in _NORMALIZERS
    pattern = step["pattern"]
    return pattern == {"Regex": " {2,}"} or (
        "String" in pattern and re.fullmatch(r"[^\w\s]+| ", pattern["String"]) is not None
    )


def _ends_plain(text: str) -> bool:
    return re.search(f"[{_PLAIN}]$", text) is not None


def place_before(text: str, end: int, low: int = 0) -> int:
    """Returns the last place after ``low`` and up to ``end`` at which a text may be split; ``low`` if there is none."""
    step = 256
    while True:
        start = max(end - step, low + 1)
        matches = _PLACE.finditer(text, start, min(end + 2, len(text)))
        places = [match.start() for match in matches if match.start() <= end]
        if places or start == low + 1:
            return max(places, default=low)
        step *= 4


def place_after(text: str, start: int) -> int:
    """Returns the first place from ``start`` on at which the text may be split; its length if there is none."""
    match = _PLACE.search(text, start)
    return len(text) if match is None else match.start()


def pieces(text: str, size: int) -> Iterator[str]:
    """Yields the text in pieces of about ``size`` characters; in longer pieces if it cannot be split there."""
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
    """Returns about the first ``size`` characters of a text, or with ``from_left`` the last."""
    if len(text) <= size:
        return text
    if from_left:
        start = len(text) - size
        place = place_after(text, start)
        return text[place if place < len(text) else place_before(text, start) :]
    return text[: place_before(text, size) or place_after(text, size)]
