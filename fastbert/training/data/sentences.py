"""Running text is split into sentences by a fixed rule.

A sentence ends after one or more of . ! ? … and the closing quotes and brackets after them, if white space or the end
of the text follows. After the full-width 。 ！ ？ ｡ no white space is needed. It does not end after an abbreviation
before a word ("Dr.", "e.g."), after initials ("J. R. R.", "U.S."), or after a number or a single letter at the
start of the sentence, as in a list ("1. First", "가. 항목"). Before a lower-case letter, it does not end after "...",
after a closing quote or bracket, or after an abbreviation that may be the last word ("etc.", "Inc."). It does not end
between such an abbreviation and a digit ("No. 5").

A blank line also ends a sentence; any other line break is white space. Numbers such as 3.5 contain no white space.
White space around a sentence is dropped, and nothing else is changed: no normalisation.
"""

from __future__ import annotations

import re

LONGEST = 20_000  # characters: a longer sentence is cut

CLOSERS = "\"'”’»)\\]}」』】》〉）］｝＂＇›"
END = re.compile(rf"(?<![.!?…])[.!?…]+[{CLOSERS}]*(?=\s)|[。！？｡]+[{CLOSERS}.!?…]*|\n[^\S\n]*\n\s*")
OPENERS = "\"'“‘«([{「『【《〈（［｛‹"
BREAK = re.compile(r"[^\S\n]*\n\s*")
SPACES = re.compile(r"\s+")
LAST_WORD = re.compile(r"\S{1,24}\Z")
INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
NUMBERED = re.compile(rf"[{re.escape(OPENERS)}]*(?:\d{{1,4}}(?:\.\d{{1,4}})*|[^\W\d_])\.")

_BEFORE_A_WORD = """
adj adm approx apr art assn aug ave bldg bros brig capt cf ch chap cmdr col cpl dec dept dr ed eds eq eqs esp est ex feb
fig figs fr gen gov hon jan jul jun lt maj mar mr mrs ms mt mx nov oct op pp prof pres rep rev sec sen sep sept sgt st
supt vol vols vs viz
"""
ABBREVIATIONS = frozenset(_BEFORE_A_WORD.split())
PERHAPS_LAST = frozenset(("al", "co", "corp", "cos", "etc", "inc", "jr", "llc", "ltd", "no", "nos", "ph.d", "pt", "sr"))


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a complete text, none of them empty or longer than ``LONGEST`` characters."""
    sentences, rest = split_off(text)
    pieces = []
    for sentence in [*sentences, BREAK.sub(" ", rest)]:
        heads, tail = cut(sentence.strip())
        pieces += [*heads, tail]
    return [piece for piece in pieces if piece]


def split_off(text: str) -> tuple[list[str], str]:
    """Returns the sentences that are complete, whatever text follows, and the rest of the text.

    Sentences are stripped, without line breaks and not empty; they may be longer than ``LONGEST``. The following text
    must be appended to the rest.
    """
    sentences: list[str] = []
    start, last = 0, len(text.rstrip())
    for match in END.finditer(text):
        end = match.end()
        if end >= last:  # the following text decides
            break
        if not _ends(text, start, match):
            continue
        if sentence := text[start:end].strip():
            sentences.append(BREAK.sub(" ", sentence) if "\n" in sentence else sentence)
        start = end
    return sentences, text[start:].lstrip()


def cut(sentence: str) -> tuple[list[str], str]:
    """Returns pieces of at most ``LONGEST`` characters, and the rest, which is also at most so long.

    Pieces are cut at the last white space, or at ``LONGEST`` if there is none.
    """
    pieces = []
    start, n = 0, len(sentence)
    while n - start > LONGEST:
        if space := SPACES.match(sentence, start):
            start = space.end()
            continue
        end = max(sentence.rfind(white, start, start + LONGEST + 1) for white in " \t\n")
        end = end if end > start else start + LONGEST
        pieces.append(sentence[start:end].rstrip())
        start = end
    return pieces, sentence[start:]


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Tells whether a sentence that began at ``start`` ends with the match, after which there is more text."""
    mark = match.group()
    if mark != ".":
        if mark[0] not in ".!?…" or (mark[-1] in "!?"):
            return True
        closed = mark[-1] not in ".…"
        if (closed or len(mark) > 1 or mark == "…") and _next(text, match.end()).islower():
            return False
        if mark[0] != "." or mark[1] not in CLOSERS:
            return True
    end = match.start()
    if end - start < 24 and NUMBERED.fullmatch(text[start : end + 1].lstrip()):
        return False
    word = LAST_WORD.search(text, max(start, end - 24), end)
    if word is None:
        return True
    last = word.group().lstrip(OPENERS)
    if len(last) > 8:
        return True
    if INITIALS.fullmatch(last) and last != "I" and not "\uac00" <= last <= "\ud7a3":
        return False
    last = last.lower()
    if last in PERHAPS_LAST:
        following = _next(text, match.end())
        return not (following.islower() or following.isdigit())
    return last not in ABBREVIATIONS


def _next(text: str, end: int) -> str:
    """Returns the first character after white space, or an empty string."""
    return text[end : end + 8].lstrip()[:1]
