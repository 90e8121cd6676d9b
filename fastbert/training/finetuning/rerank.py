"""The trainer of sentence-transformers trains cross-encoders on a model that fastbert runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbert.training.finetuning.distilling import with_scores
from fastbert.training.finetuning.vector_batches import sampler_arguments
from fastbert.training.finetuning.vector_data import Example, dataset_of, numbers_of, read_examples, split
from fastbert.training.finetuning.vector_evaluation import PredictedScores, RankedLists, Scores, lists_of
from fastbert.training.finetuning.vector_processes import by_first, join, mined
from fastbert.training.finetuning.vector_report import VectorResult
from fastbert.training.finetuning.vector_run import arguments_of, prepare_output, run
from fastbert.training.finetuning.vector_settings import RerankSettings

WANTS = "scored: bce; pairs: bce, marginmse, lambda; lists: lambda, bce"
TAKES = {"bce": ("scored", "pairs", "lists"), "marginmse": ("pairs",), "lambda": ("pairs", "lists", "scored")}


def train_cross_encoder(model: Any, train: Any, output: Any, **settings: Any) -> VectorResult:
    """Trains a cross-encoder with one score for a pair of texts.

    model: a folder of a cross-encoder, or of a plain encoder, which gets a new head; or a hub id. train: a file, an
    iterable of dicts or a datasets.Dataset. Its columns are text, text_pair and label (0, 1 or a score between them);
    or anchor and positive, optionally with negative (a text, a list, or negative_1 and so on) and score (a teacher's
    margin, or its score of each text); or query, documents (a list) and labels (a number for each). Pairs without
    negatives need `mine_negatives`, and `miner`, the bi-encoder that finds them. output: the folder of the result,
    which sentence-transformers and fastbert load. settings: the other fields of `RerankSettings`.

    The evaluation ranks the texts of a query: mrr, ndcg@10 and recalls. If no query of scored pairs has both right and
    wrong texts, it compares the scores: spearman and pearson.

    Raises ValueError for invalid settings and data, RecordError for an invalid record, with its position, and
    FloatingPointError for a loss that is not finite.
    """
    return train_by(RerankSettings(model=model, train=train, output=output, **settings))


def train_by(settings: RerankSettings) -> VectorResult:
    """Does the work of `train_cross_encoder` for a `RerankSettings`."""
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    processes = join(settings.device)
    options = (settings.kind, settings.columns, settings.score_scale)
    examples = read_examples(settings.train, *options)
    if settings.eval is None:
        examples, held = split(examples, settings.eval_share, settings.seed)
    else:
        held = read_examples(settings.eval, *options)
    loss = _loss_name(examples, settings)
    checkpoint = prepare_output(settings, processes)
    miner = None
    if settings.miner is not None:
        import fastbert.pipelines.sentence

        device = None if processes.n == 1 else str(processes.device)
        miner = fastbert.pipelines.sentence.SentenceEncoder.from_pretrained(
            settings.miner, dtype="float32", device=device
        )
    if settings.mine_negatives:
        examples = mined(miner, examples, settings, processes)
    if loss == "marginmse":
        examples = with_scores(examples, settings, processes)
    task = by_first(processes, lambda: _task(held, settings, miner))
    headline = None if task is None else task.headline
    rows = _rows(examples, loss)
    data = dataset_of(rows)
    batches = sampler_arguments("shuffled", processes.n, isinstance(data, dict))
    # DDP's search for unused parameters does not find these scores, and would treat all parameters as unused.
    arguments = arguments_of(
        CrossEncoderTrainingArguments, settings, headline, **batches, ddp_find_unused_parameters=False
    )
    model = load(settings, str(processes.device), loss)
    score = None if task is None else _Scorer(task)
    return run(
        CrossEncoderTrainer, arguments, model, _loss(model, loss, settings), data, settings, score, headline or "",
        checkpoint, {"loss": loss, "training": numbers_of(examples), "evaluation": numbers_of(held)}, processes,
        [_pairs(row) for row in rows],
    )  # fmt: skip


class _Scorer:
    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, model: Any) -> Scores:
        def predict(pairs: list[tuple[str, str]]) -> np.ndarray:
            return np.asarray(model.predict(pairs, show_progress_bar=False), np.float64)

        scores: Scores = self.task.score(predict)
        return scores


def load(settings: RerankSettings, device: str, loss: str) -> Any:
    """Loads the model with one label, and makes fastbert run it."""
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    import fastbert.adapters

    transformers.set_seed(settings.seed)
    model = CrossEncoder(settings.model, num_labels=1, max_length=settings.max_length, device=device)
    if loss == "marginmse":  # its scores are a teacher's logits
        model.activation_fn = torch.nn.Identity()
    if settings.accelerate:
        fastbert.adapters.accelerate(model)
    return model.float()


def _loss_name(examples: Sequence[Example], settings: RerankSettings) -> str:
    first = examples[0]
    loss = settings.loss
    if loss == "auto":
        loss = "lambda" if first.kind == "lists" else "bce"
        if first.kind == "pairs" and (first.score is not None or settings.teacher is not None):
            loss = "marginmse"
    if first.kind not in TAKES[loss]:
        raise ValueError(f"loss: {settings.loss} does not take records of the kind {first.kind}; {WANTS}")
    if settings.mine_negatives and (first.kind != "pairs" or first.score is not None):
        raise ValueError("mine_negatives: expected pairs of anchor and positive without scores")
    if first.kind == "pairs" and not settings.mine_negatives and not any(e.negatives for e in examples):
        raise ValueError("train: the pairs have no wrong texts; mine_negatives and miner find some")
    if loss == "bce":
        for example in examples:
            scores = example.score if isinstance(example.score, tuple) else (example.score or 0.0,)
            if example.kind != "pairs" and not all(0.0 <= score <= 1.0 for score in scores):
                raise ValueError(f"{example.place}: label {example.score}, expected 0 to 1; score_scale divides them")
    return loss


def _task(held: Sequence[Example], settings: RerankSettings, miner: Any) -> Any:
    """Returns the task that evaluates the held-out examples, or None without examples."""
    if not held:
        return None
    ranked = RankedLists(lists_of(held, settings.eval_candidates, miner))
    if ranked.lists:
        return ranked
    if held[0].kind == "scored":
        return PredictedScores(held)
    raise ValueError("eval: no query has a right and a wrong text; nothing could be ranked")


def _rows(examples: Sequence[Example], loss: str) -> list[dict[str, Any]]:
    """Returns the columns for a trainer, which depends on their order and has its own names for labels."""
    if loss == "marginmse":
        return [
            {
                "anchor": e.anchor, "positive": e.positive,
                **{f"negative_{i}": text for i, text in enumerate(e.negatives, 1)},
                "score": list(e.score) if isinstance(e.score, tuple) else [e.score],
            }
            for e in examples
        ]  # fmt: skip
    lists = lists_of(examples, 0)
    if loss == "lambda":
        return [{"query": anchor, "documents": texts, "labels": scores} for anchor, texts, scores in lists]
    return [
        {"text": anchor, "text_pair": text, "label": score}
        for anchor, texts, scores in lists
        for text, score in zip(texts, scores, strict=True)
    ]


def _pairs(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the pairs of texts of a row that the model reads."""
    if "documents" in row:
        return [(row["query"], text) for text in row["documents"]]
    first, *others = (text for name, text in row.items() if name not in ("label", "score"))
    return [(first, text) for text in others]


def _loss(model: Any, name: str, settings: RerankSettings) -> Any:
    from sentence_transformers.cross_encoder import losses

    if name == "lambda":
        return losses.LambdaLoss(model, mini_batch_size=settings.mini_batch_size)
    return {"bce": losses.BinaryCrossEntropyLoss, "marginmse": losses.MarginMSELoss}[name](model)
