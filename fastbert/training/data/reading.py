"""Reading describes the layout of documents in files, Counts the text read, and Documents assembles sentences."""

from __future__ import annotations

from dataclasses import dataclass

from fastbert.checks import expect, one_of
from fastbert.training.data.sentences import BREAK, LONGEST, cut, split_off

LAYOUTS = ("auto", "sentences", "documents", "files")
LONG_DOCUMENT = 1_000_000  # characters: a longer document is cut into several documents
PARAGRAPH = 2**16  # number of characters to split into sentences at once


@dataclass(frozen=True)
class Reading:
    """Reading describes the layout of documents in files.

    ``layout``: the layout of plain text. "sentences" (and "auto"): one sentence per line, with a blank line between
    documents. "documents": one document of running text per line. "files": one document of running text per file.
    Running text is split as described in ``sentences``. ``field``: the name of the text field in a JSON object or a
    Parquet row. It is running text, or a list of sentences; with the layout "sentences", each of its lines is a
    sentence. ``errors``: "strict" or "replace", for bytes that are not UTF-8. The end of a file ends a document.
    """

    layout: str = "auto"
    field: str = "text"
    errors: str = "strict"

    def __post_init__(self) -> None:
        one_of("layout", self.layout, *LAYOUTS)
        one_of("errors", self.errors, "strict", "replace")
        expect(isinstance(self.field, str) and self.field != "", "field", self.field, "the name of a field")


@dataclass
class Counts:
    """Counts holds the numbers of a reading. ``replaced_bytes`` were not UTF-8, ``empty_documents`` had no sentence.

    ``cut_sentences`` and ``cut_documents`` were longer than ``LONGEST`` and ``LONG_DOCUMENT`` characters.
    ``characters`` counts those of sentences. ``read_bytes`` counts the bytes of files on disk.
    """

    documents: int = 0
    sentences: int = 0
    characters: int = 0
    replaced_bytes: int = 0
    empty_documents: int = 0
    cut_sentences: int = 0
    cut_documents: int = 0
    read_bytes: int = 0


class Documents:
    """Documents takes sentences and running text, and returns the documents that are complete."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self._ready: list[list[str]] = []
        self._document: list[str] = []
        self._size = 0
        self._is_cut = False  # whether the current document was cut
        self._rest = ""  # the rest of running text or of a long line
        self._is_long = False  # whether `_rest` belongs to a sentence that was cut

    def pop(self) -> list[list[str]]:
        """Returns the documents that are complete, each one once."""
        ready, self._ready = self._ready, []
        return ready

    def add(self, sentence: str) -> None:
        """Adds a sentence, unless it is only white space."""
        if len(sentence) > LONGEST:
            self.add_part(sentence)
            self.end_sentence()
        elif sentence := sentence.strip():
            if self._document and self._size + len(sentence) > LONG_DOCUMENT:
                self.counts.cut_documents += not self._is_cut
                self._finish()
                self._is_cut = True
            self._document.append(sentence)
            self._size += len(sentence)

    def add_part(self, part: str) -> None:
        """Adds a part of a sentence of any length. The next part continues it."""
        pieces, self._rest = cut(self._rest + part)
        if pieces:
            self.counts.cut_sentences += not self._is_long
            self._is_long = True
        for piece in pieces:
            self.add(BREAK.sub(" ", piece))

    def add_running(self, text: str) -> None:
        """Adds running text. The text after its last end of a sentence is kept until more text is added."""
        for start in range(0, len(text), PARAGRAPH):
            sentences, rest = split_off(self._rest + text[start : start + PARAGRAPH])
            self._rest = ""
            for sentence in sentences:
                self.add(sentence)
                self._is_long = False
            self.add_part(rest)

    def end_sentence(self) -> None:
        """Ends the sentence of ``add_part``, or the running text."""
        if self._rest:
            rest, self._rest = self._rest, ""
            self.add(BREAK.sub(" ", rest))
        self._is_long = False

    def end(self) -> None:
        """Ends the document, if there is one."""
        self.end_sentence()
        if self._document:
            self._finish()
        self._is_cut = False

    def end_record(self) -> None:
        """Ends a document that is counted even if it is empty."""
        self.end_sentence()
        self.counts.empty_documents += not self._document
        self.end()

    def _finish(self) -> None:
        self.counts.documents += 1
        self.counts.sentences += len(self._document)
        self.counts.characters += self._size
        self._ready.append(self._document)
        self._document, self._size = [], 0
