"""This module has the parts of finetune_report.py: the training of each part, its data, and the baseline that it must
beat.
"""

from __future__ import annotations

import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from finetune_job import Job, Records, Run
from public_text import text_file

from fastbert import SentenceEncoder
from fastbert.training.finetuning.metrics import spans, squad
from fastbert.training.finetuning.vector_data import Example
from fastbert.training.finetuning.vector_evaluation import PairRetrieval, ScoredPairs

SEED = 0
MARGIN_OF_CLASSES = 0.01  # accuracy above the baseline
MARGIN_OF_RECALL = 0.05  # R@1 above the model before training
SAME_LOSS = 1e-4
LEAST_CHARACTERS = 150  # of a paragraph of running text
READ_FIRST = ("subject:", "from:", "reply-to:", "content-type:", "x-mailer:")
HELD_SYNSETS = 2_000
ROUNDS = 3  # of the comparison; each round runs both variants in turn
OF_COMPARISON = 2_000  # records
COMPARED = {  # batch size, most tokens of a text, steps
    "wordnet-classes": (32, 64, 30),
    "spam": (8, 256, 12),
}


@dataclass(frozen=True)
class Part:
    """A Part has minutes for the whole part, if no other time is given."""

    minutes: float
    make: Callable[[Job], None]


# Classification


def classes(job: Job) -> None:
    """Trains on definitions of nouns, to tell 26 lexicographer files apart."""
    train, held = job.records("wordnet-classes", "train"), job.records("wordnet-classes", "eval")
    # In a quick run on few records, a class that is only in the evaluation would be an error.
    labels = {record["label"] for record in train}
    held = [record for record in held if record["label"] in labels]
    name, best = strongest(tf_idf(train, held, accuracy, job.threads))
    run = job.train("classify", train, held, batch_size=64, epochs=3,
                    options=["--max-length", "64", "--learning-rate", "2e-4"])  # fmt: skip
    scores = run.metrics["metrics"]
    job.row("classify, 26 classes", "wordnet-classes", "accuracy", scores["accuracy"], baseline=(name, best),
            bar=best + MARGIN_OF_CLASSES, strict=False, **interval_of(run, "accuracy"), **run.facts())  # fmt: skip


def spam(job: Job) -> None:
    """Trains on the first tokens of mails, and TF-IDF on all of them.

    A mail begins with headers of its delivery. Here the text that a reader sees comes first, and the other headers
    last.
    """
    train, held = job.records("spam", "train"), job.records("spam", "eval")
    name, best = strongest(tf_idf(train, held, f1_of_spam, job.threads))
    train, held = ([{**record, "text": as_read(record["text"])} for record in part] for part in (train, held))
    run = job.train("classify", train, held, batch_size=16, epochs=3,
                    options=["--max-length", "256", "--learning-rate", "2e-4"])  # fmt: skip
    of_spam = run.metrics["metrics"]["per_class"][run.metrics["labels"]["labels"].index("spam")]
    job.row("classify, spam", "spam", "F1 of spam", of_spam["f1"], baseline=(name, best), bar=best, strict=False,
            **run.facts())  # fmt: skip


def as_read(mail: str) -> str:
    """Returns the mail: subject and sender first, then its text, then its other headers. Nothing is left out."""
    head, _, body = mail.replace("\r\n", "\n").partition("\n\n")
    headers = re.split(r"\n(?![ \t])", head)
    read = [line for line in headers if line.lower().startswith(READ_FIRST)]
    others = [line for line in headers if not line.lower().startswith(READ_FIRST)]
    return "\n".join([*read, "", body, "", *others])


def tf_idf(
    train: Records, held: Records, score: Callable[[list[str], list[str]], float], threads: int
) -> dict[str, float]:
    """Returns scores of logistic regression on TF-IDF: with sublinear counts and C = 10, and with all defaults."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    texts, labels = ([record[name] for record in train] for name in ("text", "label"))
    found = {}
    with threadpool_limits(threads):
        for name, options, c in (("sublinear, C=10", {"sublinear_tf": True}, 10.0), ("defaults", {}, 1.0)):
            vectorizer = TfidfVectorizer(**options)
            model = LogisticRegression(C=c, max_iter=1000).fit(vectorizer.fit_transform(texts), labels)
            predicted = model.predict(vectorizer.transform([record["text"] for record in held]))
            found[f"TF-IDF + LR ({name})"] = score([record["label"] for record in held], predicted.tolist())
    return found


def accuracy(true: list[str], predicted: list[str]) -> float:
    return statistics.mean(float(a == b) for a, b in zip(true, predicted, strict=True))


def f1_of_spam(true: list[str], predicted: list[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, pos_label="spam"))


def strongest(baselines: dict[str, float]) -> tuple[str, float]:
    """Returns the baseline with the best score."""
    return max(baselines.items(), key=lambda item: item[1])


def interval_of(run: Run, metric: str) -> dict[str, Any]:
    interval = run.metrics.get("intervals", {}).get(metric)
    return {} if interval is None else {"interval": interval}


# Embeddings


def embed(job: Job) -> None:
    """Trains on definitions with their words, and with examples, and preserves the vectors of running text.

    News (Lee) must stay as similar as human ratings say. Paragraphs of Wikipedia are the running text.
    """
    draw = random.Random(SEED)
    train = job.records("wordnet-pairs", "train")
    examples = [{"anchor": record["question"], "positive": record["context"]}
                for record in job.records("wordnet-qa", "train")]  # fmt: skip
    train = draw.sample(train, min(len(train), 2 * len(examples))) + examples
    draw.shuffle(train)
    held = {record["anchor"]: record for record in reversed(job.records("wordnet-pairs", "eval"))}
    held = draw.sample(sorted(held.values(), key=str), min(HELD_SYNSETS, len(held)))
    news = job.records("lee", "eval")
    before = lee(job.model, news)
    paragraphs = (line.strip() for line in text_file("english").read_text(encoding="utf-8").split("\n"))
    kept = job.write("preserve", [{"text": text} for text in paragraphs if len(text) > LEAST_CHARACTERS])
    run = job.train("embed", train, held, batch_size=64, epochs=1,
                    options=["--learning-rate", "3e-5", "--preserve", str(kept)])  # fmt: skip
    after = lee(str(run.output), news)
    facts, old, new = run.facts(), run.metrics["before"], run.metrics["after"]
    for metric, margin in (("recall@1", MARGIN_OF_RECALL), ("mrr", MARGIN_OF_RECALL)):
        job.row("embed, gloss → lemma", f"wordnet-pairs ({len(held):,} synsets)", metric, new[metric],
                baseline=("before training", old[metric]), bar=old[metric] + margin, strict=False, **facts)  # fmt: skip
    job.row("embed, similarity of news", "lee", "Spearman", after["spearman"],
            interval=after["spearman_interval"], baseline=("before training", before["spearman"]),
            bar=before["spearman"], strict=False, **facts)  # fmt: skip
    job.notes.append(
        "Training had two pairs of a definition and a word for each pair of a definition and an example, and "
        "paragraphs of Wikipedia whose vectors stay. Synsets of the evaluation and news are not in it."
    )


def encode(model: str, texts: Sequence[str]) -> np.ndarray:
    """Returns the vectors of a model in float32, (N, dim)."""
    encoder = SentenceEncoder.from_pretrained(model, dtype="float32")
    return np.asarray(encoder.encode(list(texts), show_progress_bar=False), np.float32)


def lee(model: str, news: Records) -> dict[str, Any]:
    """Returns the correlation of the cosines of news with human ratings."""
    scored = ScoredPairs([Example("scored", "", r["sentence1"], r["sentence2"], score=float(r["score"])) for r in news])
    texts = sorted({*scored.firsts, *scored.seconds})
    vectors = dict(zip(texts, encode(model, texts), strict=True))
    return scored.score(lambda wanted, _: np.array([vectors[text] for text in wanted]))


def korean(job: Job) -> None:
    """Teaches the model to give Korean translations the vectors that it gives the English paragraphs."""
    train, held = job.records("ko-en", "train"), job.records("ko-en", "eval")
    turned = PairRetrieval([Example("pairs", "", r["positive"], r["anchor"]) for r in held])
    before = turned.score(lambda texts, _: encode(job.model, texts))["recall@1"]
    run = job.train("embed", train, held, batch_size=32, epochs=5,
                    options=["--teacher", job.model, "--loss", "distillation", "--max-length", "128",
                             "--learning-rate", "2e-4"])  # fmt: skip
    after = turned.score(lambda texts, _: encode(str(run.output), texts))["recall@1"]
    old, new = run.metrics["before"]["recall@1"], run.metrics["after"]["recall@1"]
    for name, first, second in (("Korean → English", before, after), ("English → Korean", old, new)):
        job.row(f"embed by distillation, {name}", f"ko-en ({len(held):,} paragraphs)", "recall@1", second,
                baseline=("before training", first), bar=first, **run.facts())  # fmt: skip


# Questions


def questions(job: Job) -> None:
    """Trains to find the word of an example that a definition defines."""
    train, held = job.records("wordnet-qa", "train"), job.records("wordnet-qa", "eval")
    answers = [record["answers"]["text"] for record in held]
    baselines = {name: squad(found, answers) for name, found in guesses(job.model, held).items()}
    name, best = strongest({name: scores["f1"] for name, scores in baselines.items()})
    run = job.train("qa", train, held, batch_size=32, epochs=3,
                    options=["--max-length", "128", "--stride", "32", "--learning-rate", "2e-4"])  # fmt: skip
    scores = run.metrics["metrics"]
    job.row("qa", "wordnet-qa", "F1", scores["f1"], baseline=(name, best), bar=best, **interval_of(run, "f1"),
            **run.facts())  # fmt: skip
    name, best = strongest({name: scores["exact_match"] for name, scores in baselines.items()})
    job.row("qa", "wordnet-qa", "exact match", scores["exact_match"], baseline=(name, best), bar=best,
            **run.facts())  # fmt: skip


def guesses(model: str, records: Records) -> dict[str, list[str]]:
    """Returns answers without training: the whole context, its longest word, and its word most like the question."""
    words = [[word.strip(".,;:!?'()") or word for word in record["context"].split()] for record in records]
    texts = sorted({word for each in words for word in each} | {record["question"] for record in records})
    vectors = encode(model, texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row = {text: i for i, text in enumerate(texts)}
    nearest = [
        each[int((vectors[[row[word] for word in each]] @ vectors[row[record["question"]]]).argmax())]
        for record, each in zip(records, words, strict=True)
    ]
    return {
        "the whole context": [record["context"] for record in records],
        "the longest word": [max(each, key=len) for each in words],
        "the word whose vector is nearest to the question's": nearest,
    }


# Names in texts


def names(job: Job) -> None:
    """Trains to find names in tweets. The baseline gives each word its most frequent label in the training."""
    train, held = job.records("names-en", "train"), job.records("names-en", "eval")
    if job.quick:  # A type that is only in the evaluation of a quick run would be an error.
        labels = {label[2:] for record in train for label in record["labels"]}
        held = [record for record in held if labels.issuperset(label[2:] for label in record["labels"])]
    true = [record["labels"] for record in held]
    baseline = spans(true, most_frequent(train, held))["f1"]
    run = job.train("tokens", train, held, batch_size=16, epochs=8,
                    options=["--max-length", "128", "--learning-rate", "3e-4"])  # fmt: skip
    job.row("tokens", f"names-en ({len(held):,} tweets)", "F1 of spans", run.metrics["metrics"]["f1"],
            baseline=("most frequent label of a word", baseline), bar=baseline, **interval_of(run, "f1"),
            **run.facts())  # fmt: skip


def most_frequent(train: Records, held: Records) -> list[list[str]]:
    """Returns for each word of `held` its most frequent label in `train`, or O for an unknown word."""
    counts: dict[str, Counter[str]] = {}
    for record in train:
        for token, label in zip(record["tokens"], record["labels"], strict=True):
            counts.setdefault(token, Counter())[label] += 1
    best = {token: max(sorted(labels), key=labels.__getitem__) for token, labels in counts.items()}
    return [[best.get(token, "O") for token in record["tokens"]] for record in held]


# With and without accelerate


def accelerated(job: Job) -> None:
    """Runs the same training with `--accelerate` and without, in turn, with dropout 0 in float32."""
    rounds = 1 if job.quick else ROUNDS
    for data, (batch_size, max_length, steps) in COMPARED.items():
        steps = 2 if job.quick else steps
        records = job.records(data, "train")
        path = job.write(data, random.Random(SEED).sample(records, min(OF_COMPARISON, len(records))))
        options = ["--train", str(path), "--eval-share", "0", "--steps", str(steps), "--batch-size", str(batch_size),
                   "--max-length", str(max_length), "--dropout", "0", "--precision", "fp32", "--log-every", "1",
                   "--warmup", "2"]  # fmt: skip
        runs: dict[bool, list[Run]] = {True: [], False: []}
        for turn in range(rounds):
            for on in (True, False) if turn % 2 == 0 else (False, True):
                switch = "--accelerate" if on else "--no-accelerate"
                runs[on].append(job.once("compared", "classify", [*options, switch]))
                job.keep(runs[on][-1], f"{job.name}/{data}-{'on' if on else 'off'}")
        compare(job, f"{data} (batch {batch_size}, {max_length} tokens)", runs)
    job.notes.append(
        f"Runs with accelerate and without were made in turn, {rounds} of each, fp32, dropout 0. Seconds of a step are "
        "forward, backward and update; the median of all but each run's first. Peak memory is that of the whole "
        "process on the host."
    )


def compare(job: Job, data: str, runs: dict[bool, list[Run]]) -> None:
    """Adds rows of the largest difference between losses, the time of a step, and peak memory."""
    losses = [np.array([loss for _, loss in run.record["losses"]]) for run in (*runs[True], *runs[False])]
    apart = float(max(np.abs(each - losses[-1]).max() for each in losses))
    seconds = {on: statistics.median(s for run in each for s in run.record["step_seconds"][1:])
               for on, each in runs.items()}  # fmt: skip
    peak = {on: statistics.median(run.record["peak_bytes"] for run in each) / 2**20 for on, each in runs.items()}
    facts = runs[True][0].facts()
    job.row("accelerate on and off", data, "largest difference of a loss", apart, baseline=None, bar=SAME_LOSS,
            lower=True, strict=False, curve=runs[True][0].record["losses"], **facts)  # fmt: skip
    for metric, values in (("seconds of a step", seconds), ("peak memory, MiB", peak)):
        job.row("accelerate on and off", data, metric, values[True], baseline=("accelerate off", values[False]),
                bar=values[False], lower=True, ratio=values[False] / values[True], **facts)  # fmt: skip


PARTS: dict[str, Part] = {
    "classes": Part(15, classes),
    "spam": Part(10, spam),
    "embed": Part(8, embed),
    "qa": Part(8, questions),
    "tokens": Part(8, names),
    "accelerate": Part(8, accelerated),
    "ko-en": Part(10, korean),
}
