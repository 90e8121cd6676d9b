"""The corpora of a run are made from text that is tokenised once: a training corpus and held-out documents."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data.shards import Corpus
from fastbert.training.data.sources import Reading, find_files
from fastbert.training.data.tokenizing import prepare
from fastbert.training.settings import Settings


@dataclass(frozen=True)
class Corpora:
    """A `Corpora` holds the corpora of a run.

    held_out: the number of documents of the training corpus that are held out; 0 if `evaluation` is a separate corpus.
    """

    training: Corpus
    evaluation: Corpus | None
    held_out: int
    n_files: int


def open_corpora(settings: Settings, tokenizer: Tokenizer, *, show_progress: bool = True) -> Corpora:
    """Tokenises the texts of a run, or finds them in the cache.

    If several processes run on one machine, one of them tokenises and the others wait. Raises the errors of `prepare`,
    and ValueError if no document of the corpus can be held out.
    """
    cache = cache_folder(settings)
    cache.mkdir(parents=True, exist_ok=True)
    reading = Reading(layout=settings.layout, field=settings.field, errors=settings.errors)

    files = find_files(settings.text)

    def corpus(files: list[Path], rebuild: bool) -> Corpus:
        return prepare(
            files, tokenizer, cache,
            reading=reading, whole_words=settings.whole_words, rebuild=rebuild, show_progress=show_progress,
        )  # fmt: skip

    with _locked(cache / ".lock"):
        # After a wait for the lock, the corpus may exist already.
        rebuild = settings.rebuild and int(os.environ.get("LOCAL_RANK", 0)) == 0
        training = corpus(files, rebuild)
        evaluation = corpus(find_files(settings.evaluation_text), rebuild) if settings.evaluation_text else None
    held_out = 0 if evaluation is not None else n_held_out(training.n_documents, settings)
    return Corpora(training, evaluation, held_out, len(files))


def cache_folder(settings: Settings) -> Path:
    """Returns the folder of tokenised corpora: --cache, $FASTBERT_CACHE, or fastbert in the user's cache folder."""
    if settings.cache is not None:
        return Path(settings.cache).expanduser()
    if place := os.environ.get("FASTBERT_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastbert" / "corpora"


def n_held_out(n_documents: int, settings: Settings) -> int:
    """Returns the number of held-out documents: the configured share, but at least as many as an evaluation needs.

    Next-sentence prediction needs two documents in the held-out part and two in the rest. Raises ValueError if the
    corpus has too few.
    """
    if settings.evaluation_share == 0:
        return 0
    least = 2 if settings.nsp else 1
    if n_documents < 2 * least:
        raise ValueError(
            f"text: it has {n_documents} documents, and {2 * least} is the least of which some can be held out; "
            "separate documents by blank lines, name other texts for evaluation (--evaluation-text), or hold out none "
            "(--evaluation-share 0)" + ("; or train on masked tokens alone (--no-nsp)" if settings.nsp else "")
        )
    return max(least, round(settings.evaluation_share * n_documents))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admits one process of this machine at a time. If a process dies, its lock is released."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
