"""Text becomes shards once, the same whatever is interrupted or runs beside it, with the ids of the library."""

from __future__ import annotations

import ast
import errno
import gzip
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data import cache, encoding, tokenizing, writing
from fastbert.training.data.encoding import Encoder, special_ids, word_begins
from fastbert.training.data.shards import Corpus
from fastbert.training.data.sources import Reading, find_files
from fastbert.training.data.tokenizing import describe, prepare
from helpers import docstrings, source_env
from tokenizer_cases import KOREAN, NASTY

TEXTS = [" ".join(text.split()) for text in docstrings(150)]
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    """A WordPiece tokenizer of English and Korean."""
    return Tokenizer.train([*TEXTS, *KOREAN], vocab_size=900)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE as RoBERTa's, and a Unigram as XLM-RoBERTa's."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = [*TEXTS, *KOREAN] * 2
    if request.param == "bpe":
        rust = RustTokenizer(models.BPE(unk_token="<unk>"))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        rust.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=900, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
            ),
        )
    else:
        rust = RustTokenizer(models.Unigram())
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.train_from_iterator(
            texts,
            trainers.UnigramTrainer(
                vocab_size=700, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
            ),
        )
    rust.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    rust.save(str(folder / "tokenizer.json"))
    names = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)


def text_file(folder: Path, documents: list[list[str]], name: str = "a.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join("\n".join(document) for document in documents), encoding="utf-8")
    return path


def some_documents(n: int = 40) -> list[list[str]]:
    rng = random.Random(0)
    return [rng.choices([*TEXTS, *KOREAN], k=rng.randint(1, 6)) for _ in range(n)]


def make(path: Path | list[Path], tokenizer: Tokenizer, folder: Path, **options: Any) -> Corpus:
    reading = Reading(**{name: options.pop(name) for name in ("layout", "field", "errors") if name in options})
    return prepare(find_files(path), tokenizer, folder, reading=reading, show_progress=False, **options)


def sentences_of(corpus: Corpus) -> list[list[list[int]]]:
    """Documents, sentences, ids."""
    starts = set(corpus.sentence_starts(0, corpus.n_tokens).tolist())
    documents: list[list[list[int]]] = []
    for start, end in zip(corpus.document_offsets[:-1].tolist(), corpus.document_offsets[1:].tolist(), strict=True):
        ids = corpus.take([start], [end - start]).tolist()
        borders = [*(i for i in range(start, end) if i in starts), end]
        documents.append([ids[a - start : b - start] for a, b in zip(borders[:-1], borders[1:], strict=True)])
    return documents


@pytest.mark.parametrize("batch", [2**20, 500])
def test_ids_are_those_of_the_library(
    bert: Tokenizer, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches sentences and documents that are shifted, lost or torn, where batches end or anywhere."""
    monkeypatch.setattr(tokenizing, "BATCH", batch)
    documents = some_documents()
    corpus = make(text_file(tmp_path, documents), bert, tmp_path / "cache")
    rust = bert.for_raw_text()
    expected = [[rust.encode(text, add_special_tokens=False).ids for text in document] for document in documents]
    assert sentences_of(corpus) == expected
    assert corpus.vocab_size == bert.vocab_size and corpus.has_words
    assert corpus.made_of["sentences"] == sum(map(len, documents))
    corpus.check()


def test_other_tokenizers(other: Tokenizer, tmp_path: Path) -> None:
    """Catches ids that are not those of running text, as of BPE's words without the space before them, and words."""
    documents = some_documents()
    path = text_file(tmp_path, documents)
    assert not make(path, other, tmp_path / "cache").has_words
    corpus = make(path, other, tmp_path / "cache", whole_words=True)
    rust = other.for_raw_text()
    encodings = [rust.encode(" ".join(document), add_special_tokens=False) for document in documents]
    assert [list(chain(*document)) for document in sentences_of(corpus)] == [row.ids for row in encodings]
    words = corpus.word_starts([0], [corpus.n_tokens]).tolist()
    expected = [i == 0 or row.word_ids[i] != row.word_ids[i - 1] for row in encodings for i in range(len(row.ids))]
    assert words == expected
    assert sum(words) < 0.7 * len(words) and sum(words) > 0.1 * len(words)


def test_words_of_word_pieces_are_the_tokenizers_own(bert: Tokenizer, tmp_path: Path) -> None:
    """Catches a table of the vocabulary that differs from the word ids of the library."""
    documents = [[*TEXTS[:40], *KOREAN, *(text for text in NASTY if text.strip())]]
    encoder = Encoder(bert, with_words=True)
    encoded = encoder.encode(documents[0])
    begins = word_begins(bert)
    assert begins is not None and encoded.words is not None
    assert begins[encoded.ids].tolist() == encoded.words.tolist()


def test_parts_that_are_kept_give_the_ids_of_the_library(bert: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches text whose ids depend on what stands behind a space, and a cache of parts that forgets what it needs."""
    monkeypatch.setattr(encoding, "KEPT_PARTS", 50)
    encoder = Encoder(bert)
    assert encoder._known is not None, "the fast way is not taken"
    rust = bert.for_raw_text()
    rng = random.Random(0)
    pool = [
        *"aébΣσİ\u0301\u0308\u200b\ufeff\x00\x1c\x85\u2028\t漢字한국  .,![]'-",
        "[MASK]",
        "##ing",
        "\u1112\u1161\u11ab",
    ]
    texts = [*NASTY, *KOREAN, *TEXTS[:50], *("".join(rng.choices(pool, k=rng.randint(0, 30))) for _ in range(2000))]
    for start in range(0, len(texts), 50):
        ids, lengths, _ = encoder.encode(texts[start : start + 50])
        expected = [rust.encode(text, add_special_tokens=False).ids for text in texts[start : start + 50]]
        assert ids.tolist() == [i for row in expected for i in row]
        assert lengths.tolist() == list(map(len, expected))
        assert len(encoder._known) < 1000 and max(map(len, encoder._known)) <= encoding.LONG_PART


def test_special_tokens_in_a_text_are_text(bert: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    """Catches a [MASK] or [SEP] in the text that becomes the special id, for three kinds of tokenizers."""
    for i, tokenizer in enumerate((bert, other)):
        text = "A [MASK] b [SEP] [CLS]. [PAD] <s> </s> <mask><pad> x"
        corpus = make(text_file(tmp_path, [[text]], f"{i}.txt"), tokenizer, tmp_path / "cache")
        ids = set(corpus.take([0], [corpus.n_tokens]).tolist())
        assert ids & set(special_ids(tokenizer).all) <= {tokenizer.unk_token_id}
        assert corpus.n_tokens > 15


def test_special_pieces_of_a_model_become_unknown(tmp_path: Path) -> None:
    """Catches a model that makes a special id of plain text, since its vocabulary holds the token."""
    tokenizer = Tokenizer.train(TEXTS, vocab_size=500)
    tokenizer._rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer._rust.normalizer = None
    encoded = Encoder(tokenizer).encode(["[MASK] [SEP] a"])
    assert encoded.ids.tolist()[:2] == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize("name", ["mask_token", "sep_token", "cls_token"])
def test_a_vocabulary_without_special_tokens_is_refused(name: str, tmp_path: Path) -> None:
    """Catches a run that finds out after hours of tokenising that there is no [MASK]."""
    tokenizer = Tokenizer.train(TEXTS[:20], vocab_size=300)
    setattr(tokenizer, f"{name}_id", None)
    with pytest.raises(ValueError, match=rf"\[{name[:-6].upper()}\].*{name}"):
        make(text_file(tmp_path, [["a"]]), tokenizer, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_special_ids(bert: Tokenizer) -> None:
    """Catches ids under the wrong names, or one that masking would predict."""
    ids = special_ids(bert)
    assert (ids.cls, ids.sep, ids.mask) == (bert.cls_token_id, bert.sep_token_id, bert.mask_token_id)
    assert ids.all == (0, 1, 2, 3, 4)


def test_text_without_tokens_is_dropped_and_counted(bert: Tokenizer, tmp_path: Path) -> None:
    """Catches an empty sentence that marks the next one's start, and an empty document in the offsets."""
    documents = [["\u200b"], ["\x01", "the", "\u200b", "file", "\x02"], ["\u200d", "\x03"], ["value"]]
    corpus = make(text_file(tmp_path, documents), bert, tmp_path / "cache")
    rust = bert.for_raw_text()
    the, file, value = (rust.encode(text, add_special_tokens=False).ids for text in ("the", "file", "value"))
    assert sentences_of(corpus) == [[the, file], [value]]
    assert corpus.made_of["dropped_documents"] == 2
    assert "dropped: 2" in describe(corpus)
    with pytest.raises(ValueError, match="1 files of 3 bytes hold no document with tokens"):
        make(text_file(tmp_path, [["\u200b"]], "b.txt"), bert, tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_a_corpus_is_made_once(bert: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches text that is tokenised at every start, a name of paths or times, and files that are read again."""
    path = text_file(tmp_path, some_documents())
    os.utime(path, (10**9, 10**9))
    first = make(path, bert, tmp_path / "cache")

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenizing, "_write", refuse)
    assert make(path, bert, tmp_path / "cache").fingerprint == first.fingerprint
    moved = tmp_path / "elsewhere" / "b.txt"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert make(moved, bert, tmp_path / "cache").folder == first.folder
    # What the cache remembers about a file is believed.
    memo = tmp_path / "cache" / cache.HASHES
    hashes = json.loads(memo.read_text())
    assert len(hashes) == 1 and moved.name not in memo.read_text(), "a file that has just changed is not remembered"
    memo.write_text(json.dumps(dict.fromkeys(hashes, "0" * 32)))
    with pytest.raises(AssertionError, match="tokenised again"):
        make(path, bert, tmp_path / "cache")
    memo.write_text("damaged")
    assert make(path, bert, tmp_path / "cache").folder == first.folder


def test_what_changes_tokens_changes_the_name(bert: Tokenizer, other: Tokenizer, tmp_path: Path) -> None:
    """Catches a stale corpus for other text, another tokenizer, another reading, or another kind of file."""
    path = text_file(tmp_path, some_documents())
    more = text_file(tmp_path, [["more"]], "b.txt")
    cased = Tokenizer.train([*TEXTS, *KOREAN], vocab_size=900, lowercase=False)
    records = tmp_path / "c.jsonl"
    records.write_text('{"text": "a", "body": "b"}\n')
    as_text = tmp_path / "c.txt"
    as_text.write_bytes(records.read_bytes())
    made = [
        make(path, bert, tmp_path / "cache"),
        make([path, more], bert, tmp_path / "cache"),
        make([more, path], bert, tmp_path / "cache"),
        make(path, cased, tmp_path / "cache"),
        make(path, bert, tmp_path / "cache", layout="documents"),
        make(records, bert, tmp_path / "cache"),
        make(records, bert, tmp_path / "cache", field="body"),
        make(as_text, bert, tmp_path / "cache"),
        make(path, other, tmp_path / "cache"),
        make(path, other, tmp_path / "cache", whole_words=True),
    ]
    assert len({corpus.fingerprint for corpus in made}) == len(made)
    assert make(path, bert, tmp_path / "cache", whole_words=True).fingerprint == made[0].fingerprint
    path.write_text("changed")
    assert make(path, bert, tmp_path / "cache").fingerprint not in {corpus.fingerprint for corpus in made}


def test_rebuild_replaces_a_damaged_corpus(bert: Tokenizer, tmp_path: Path) -> None:
    """Catches a damaged shard that nobody can get rid of, or that is repaired without a word."""
    path = text_file(tmp_path, some_documents())
    corpus = make(path, bert, tmp_path / "cache")
    assert corpus.folder is not None
    (corpus.folder / "ids-00000.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="--rebuild"):
        make(path, bert, tmp_path / "cache")
    again = make(path, bert, tmp_path / "cache", rebuild=True)
    again.check()
    assert (again.folder, again.n_tokens) == (corpus.folder, corpus.n_tokens)
    (corpus.folder / "index.json").unlink()
    make(path, bert, tmp_path / "cache").check()
    assert left_in(tmp_path / "cache") == {again.fingerprint}


def left_in(folder: Path) -> set[str]:
    """The names in a cache beside the remembered hashes."""
    return {path.name for path in folder.iterdir()} - {cache.HASHES}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_nothing(
    code: int, bert: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a corpus that stays on a full disk, or passes for a whole one, and an error without advice."""
    write = writing.Output.write

    def fill(output: writing.Output, values: np.ndarray) -> None:
        write(output, values)
        if output.n_bytes > 1000:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.Output, "write", fill)
    with pytest.raises(OSError) as caught:
        make(text_file(tmp_path, some_documents()), bert, tmp_path / "cache")
    assert caught.value.errno == code
    assert ("free some or choose another" in str(caught.value)) == (code != errno.EIO)
    assert left_in(tmp_path / "cache") == set()


def test_text_that_changes_meanwhile_is_refused(
    bert: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a corpus under the name of text that it does not hold."""
    path = text_file(tmp_path, some_documents())
    write = tokenizing._write

    def change(*arguments: Any) -> Any:
        path.write_text("other text")
        return write(*arguments)

    monkeypatch.setattr(tokenizing, "_write", change)
    with pytest.raises(ValueError, match="changed while"):
        make(path, bert, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == set()


BUILD = """
import sys, time
from pathlib import Path
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.data import tokenizing
from fastbert.training.data.sources import find_files
folder = Path(sys.argv[1])
write = tokenizing._write
def slow(*arguments):
    (folder / f"started-{sys.argv[2]}").touch()
    done = write(*arguments)
    while not (folder / "go").exists():
        time.sleep(0.01)
    return done
tokenizing._write = slow
corpus = tokenizing.prepare(find_files(folder / "a.txt"), Tokenizer.from_pretrained(folder), folder / "cache")
corpus.check()
print(corpus.fingerprint, corpus.n_tokens)
"""


def build(folder: Path, name: str) -> subprocess.Popen[str]:
    """A process that builds a corpus, and waits before its end for the file `go`."""
    command = [sys.executable, "-c", BUILD, str(folder), name]
    return subprocess.Popen(command, env=source_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_builders_side_by_side_and_dead_ones(bert: Tokenizer, tmp_path: Path) -> None:
    """Catches two builders that spoil one another's work, and a killed one whose temporary folder stays for ever."""
    text_file(tmp_path, some_documents())
    bert.save_pretrained(tmp_path)
    dead = build(tmp_path, "dead")
    wait_for(tmp_path / "started-dead")
    dead.kill()
    dead.communicate()
    assert any(name.startswith(cache.BUILDING) for name in left_in(tmp_path / "cache")), "the killed one left nothing"
    pair = [build(tmp_path, name) for name in ("a", "b")]
    wait_for(tmp_path / "started-a")
    wait_for(tmp_path / "started-b")
    (tmp_path / "go").touch()
    results = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert left_in(tmp_path / "cache") == {results[0][0].split()[0]}
    assert "TOKENIZERS_PARALLELISM" not in results[0][1] + results[1][1]


def test_counts_and_warnings(bert: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches counts that nobody sees, and bad text that goes by without a warning, also from the cache."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a file \xff\n" + b"word " * 9000 + b"\n\n" + "ሴ ቶ".encode() * 3000)
    caplog.set_level(logging.INFO, "fastbert")
    for _ in range(2):
        caplog.clear()
        corpus = make(path, bert, tmp_path / "cache", errors="replace")
        messages = [record.getMessage() for record in caplog.records]
        assert any(f"2 documents, {corpus.n_tokens:,} tokens" in message for message in messages)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [warning.split()[0] for warning in warnings] == ["1", "1", warnings[2].split()[0]]
        assert "not UTF-8" in warnings[0] and "sentences" in warnings[1] and "unknown" in warnings[2]


def test_compressed_text_gives_the_same_tokens(bert: Tokenizer, tmp_path: Path) -> None:
    """Catches a stream that loses text behind its first part, and two bytes a token that become more."""
    documents = some_documents(400)
    path = text_file(tmp_path, documents)
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, other = (make(each, bert, tmp_path / "cache") for each in (path, packed))
    assert plain.fingerprint != other.fingerprint
    assert plain.counts.tolist() == other.counts.tolist()
    assert plain.document_offsets.tolist() == other.document_offsets.tolist()
    assert plain.folder is not None
    sizes = {path.name: path.stat().st_size for path in plain.folder.iterdir()}
    assert sizes["ids-00000.bin"] + sizes["documents.bin"] <= 2 * plain.n_tokens + 8 * (plain.n_documents + 1)
    assert sum(sizes.values()) - sizes["counts.bin"] - sizes["index.json"] <= 2.1 * plain.n_tokens


def test_imports_are_light() -> None:
    """Catches PyTorch, pyarrow or tqdm on the way from text to shards before they are needed."""
    folder = Path(encoding.__file__).parent
    names = (
        "cache",
        "encoding",
        "reading",
        "records",
        "sentences",
        "shards",
        "sources",
        "streams",
        "tokenizing",
        "writing",
    )
    for name in names:
        tops = ast.parse((folder / f"{name}.py").read_text()).body
        imports = " ".join(ast.unparse(node) for node in tops if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert not re.search(r"\b(torch|tqdm|pyarrow|tokenizers)\b", imports), name
    code = "import sys, fastbert; print([name for name in sys.modules if name.startswith('fastbert.training')])"
    done = subprocess.run([sys.executable, "-c", code], env=source_env(), capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
