"""This tool measures the path from text to shards at scale: tokens/s, peak memory and bytes a token on disk.

    python benchmarks/corpus_at_scale.py                    5 GB of text: about ten minutes, and 8 GB of disk
    python benchmarks/corpus_at_scale.py --bytes 500000000  less

The text is synthetic: sentences of 5 to 30 words, documents of 5 to 60 sentences, words of 2 to 12 letters, drawn from
``--words`` by Zipf's law. With fewer different words, more of the text is looked up, and the library splits less. The
result is JSON. Everything is deleted at the end.

Peak memory is that of this process with all its imports. The tool fails if it is above 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data.encoding import Encoder
from fastbert.training.data.shards import INDEX
from fastbert.training.data.sources import Counts, Reading, find_files, read_documents
from fastbert.training.data.tokenizing import prepare

MOST_MEMORY = 10**9  # bytes
FILE_BYTES = 10**9
LETTERS = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))


def make_words(n: int, rng: np.random.Generator) -> list[str]:
    """Returns n different words. Short words come first: they are the frequent ones, as in a language."""
    words: dict[str, None] = {}
    weights = 1 / (np.arange(26) + 3.0)
    while len(words) < n:
        letters = rng.choice(LETTERS, (2000, int(rng.integers(2, 13))), p=weights / weights.sum())
        words.update(dict.fromkeys(map("".join, letters)))
    return sorted(list(words)[:n], key=len)


def write_text(folder: Path, n_bytes: int, words: list[str], rng: np.random.Generator) -> None:
    """Writes files of text, with one sentence a line and a blank line between documents."""
    cumulative = np.cumsum(1 / np.arange(1, len(words) + 1))
    cumulative /= cumulative[-1]
    written = number = 0
    file = None
    while written < n_bytes:
        if file is None or file.tell() >= FILE_BYTES:
            if file is not None:
                file.close()
            file = (folder / f"{number:03}.txt").open("w", encoding="ascii")
            number += 1
        lengths = rng.integers(5, 31, 3000)
        drawn = np.searchsorted(cumulative, rng.random(int(lengths.sum()))).tolist()
        ends = np.cumsum(lengths).tolist()
        left = 0
        lines = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            if left == 0:
                lines.append("")
                left = int(rng.integers(5, 61))
            left -= 1
            lines.append(" ".join([words[i] for i in drawn[start:end]]).capitalize() + ".")
        written += file.write("\n".join(lines) + "\n")
    if file is not None:
        file.close()


def memory(name: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Makes text, tokenises it, reads random documents, and prints the time and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=5 * 10**9, metavar="N", help="of text (default: %(default)s)")
    parser.add_argument("--words", type=int, default=200_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--vocab-size", type=int, default=30_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", help="where the text and the cache go (default: the system's temporary folder)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="corpus-at-scale-", dir=args.folder) as folder:
        text, cache = Path(folder, "text"), Path(folder, "cache")
        text.mkdir()
        words = make_words(args.words, rng)
        start = time.perf_counter()
        write_text(text, args.bytes, words, rng)
        files = find_files(text)
        n_bytes = sum(path.stat().st_size for path in files)
        print(f"{n_bytes:,} bytes of text written in {time.perf_counter() - start:.0f} s", file=sys.stderr)

        sample: list[str] = []
        for document in read_documents(files[:1], Reading(), Counts()):
            sample += document
            if len(sample) > 100_000:
                break
        tokenizer = Tokenizer.train(sample, vocab_size=args.vocab_size)
        part = sample[:5_000]
        start = time.perf_counter()
        encodings = tokenizer.for_raw_text().encode_batch_fast(part, add_special_tokens=False)
        library = sum(map(len, encodings)) / (time.perf_counter() - start)
        unseen = Encoder(tokenizer).encode(part)
        assert unseen.ids.tolist() == [i for row in encodings for i in row.ids]
        del sample, part, encodings, unseen

        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        corpus = prepare(files, tokenizer, cache)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        peak = after.ru_maxrss * 1024
        assert corpus.folder is not None
        index = json.loads((corpus.folder / INDEX).read_text())
        on_disk = sum(path.stat().st_size for path in corpus.folder.iterdir())

        documents = rng.integers(0, corpus.n_documents, 20_000)
        offsets = corpus.document_offsets
        n_read = 0
        start = time.perf_counter()
        for places in np.split(documents, 200):  # a block of examples
            n_read += len(corpus.take(offsets[places], offsets[places + 1] - offsets[places]))
        reading = time.perf_counter() - start
        start = time.perf_counter()
        opened = prepare(files, tokenizer, cache)
        again = time.perf_counter() - start
        assert opened.fingerprint == corpus.fingerprint
        result = {
            "text_bytes": n_bytes,
            "words": args.words,
            "vocab_size": corpus.vocab_size,
            "cores": len(os.sched_getaffinity(0)),
            "documents": corpus.n_documents,
            "tokens": corpus.n_tokens,
            "shards": len(index["shards"]),
            "unknown_tokens": corpus.made_of["unknown_tokens"],
            "prepare_seconds": round(seconds, 1),
            "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "tokens_per_second": round(corpus.n_tokens / seconds),
            "tokens_per_second_without_hashing": round(corpus.n_tokens / corpus.made_of["seconds"]),
            "tokens_per_second_of_the_library_alone": round(library),
            "peak_memory_bytes": peak,
            "peak_memory_after_reading_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "memory_at_the_end_bytes": memory("VmRSS"),
            "bytes_a_token_on_disk": round(on_disk / corpus.n_tokens, 4),
            "random_documents_per_second": round(len(documents) / reading),
            "random_tokens_per_second": round(n_read / reading),
            "seconds_to_open_again": round(again, 3),
        }
        print(json.dumps(result, indent=1))
    return 0 if result["peak_memory_after_reading_bytes"] < MOST_MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
