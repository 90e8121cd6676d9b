"""Sentence embeddings are trained by sentence-transformers' trainer, on a model that fastbert runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert.training.finetuning.mining import distinct, mine_negatives
from fastbert.training.finetuning.vector_data import (
    Example,
    dataset_of,
    numbers_of,
    read_examples,
    split,
    with_negatives,
)
from fastbert.training.finetuning.vector_evaluation import PairRetrieval, ScoredPairs, Scores, TeacherVectors
from fastbert.training.finetuning.vector_report import VectorResult
from fastbert.training.finetuning.vector_run import (
    across_devices,
    arguments_of,
    no_duplicates,
    prepare_output,
    run,
)
from fastbert.training.finetuning.vector_settings import EmbedSettings

logger = logging.getLogger("fastbert")

DEFAULTS = {"pairs": "mnrl", "scored": "cosent", "texts": "distillation"}
TAKES = {  # the kinds of examples that a loss takes
    "mnrl": ("pairs",), "cached-mnrl": ("pairs",), "cosent": ("scored",), "cosine": ("scored",),
    "marginmse": ("pairs",), "distillation": ("texts", "pairs"),
}  # fmt: skip
TASKS: dict[str, Any] = {"pairs": PairRetrieval, "scored": ScoredPairs, "texts": TeacherVectors}
WANTS = "pairs: mnrl, cached-mnrl, marginmse, distillation; scored: cosent, cosine; texts: distillation"
FIRST, LABELS = ("anchor", "sentence1", "text"), ("label", "score")  # columns of a trainer
IN_BATCH = ("mnrl", "cached-mnrl")  # losses that take the other texts of a batch for wrong ones


def train_embeddings(model: Any, train: Any, output: Any, **settings: Any) -> VectorResult:
    """Trains sentence embeddings on pairs, triplets, scored pairs, or a teacher's vectors or scores.

    model: a folder of sentence-transformers or of a plain encoder, which gets mean pooling, or a hub id. train: a file,
    an iterable of dicts or a datasets.Dataset, with the columns anchor and positive, perhaps negative (a text, a list,
    or negative_1 and so on) and score; or sentence1, sentence2 and score; or text, perhaps text_pair, its translation,
    and vector, the teacher's. output: the folder of the result, which sentence-transformers and fastbert load.
    settings: the other fields of `EmbedSettings`.

    The scores of the evaluation are recall@1, recall@5, recall@10, mrr and ndcg@10 for pairs, spearman and pearson for
    scored pairs, negative_mse and cosine for vectors.

    Raises ValueError for settings and data that do not fit, RecordError for a record, with its place, and
    FloatingPointError for a loss that is not finite.
    """
    return train_by(EmbedSettings(model=model, train=train, output=output, **settings))


def train_by(settings: EmbedSettings) -> VectorResult:
    """Does what `train_embeddings` does, by settings."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    examples, held = _examples(settings)
    loss = _loss_name(examples, settings)
    checkpoint = prepare_output(settings)
    headline = TASKS[held[0].kind].headline if held else None
    sampler = {"batch_sampler": no_duplicates} if loss in IN_BATCH else {}
    arguments = arguments_of(SentenceTransformerTrainingArguments, settings, headline, **sampler)
    model = load(settings, str(arguments.device))
    prompts = _prompts(model, settings)
    if settings.mine_negatives:
        examples = _mined(model, examples, settings)
    if loss in ("marginmse", "distillation"):
        examples = _taught(examples, settings, loss)
        held = _taught(held, settings, loss) if held and held[0].kind == "texts" else held
    rows = [_row(example, loss) for example in examples]
    arguments.prompts = {
        name: prompts[name not in FIRST]
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in LABELS and prompts[name not in FIRST]
    }
    score = _Scorer(TASKS[held[0].kind](held), settings, prompts) if held else None
    return run(
        SentenceTransformerTrainer, arguments, model, _loss(model, loss, settings, examples), dataset_of(rows),
        settings, score, headline or "", checkpoint,
        {"loss": loss, "training": numbers_of(examples), "evaluation": numbers_of(held)},
    )  # fmt: skip


class _Scorer:
    """Scores a model, at each width of Matryoshka too."""

    def __init__(self, task: Any, settings: EmbedSettings, prompts: tuple[str | None, str | None]) -> None:
        self.task, self.settings, self.prompts = task, settings, prompts

    def __call__(self, model: Any) -> Scores:
        kept: dict[tuple[bool, int], np.ndarray] = {}

        def vectors(texts: Sequence[str], documents: bool) -> np.ndarray:
            key = (documents, hash(tuple(texts)))
            if key not in kept:
                kept[key] = np.asarray(
                    model.encode(list(texts), prompt=self.prompts[documents], show_progress_bar=False), np.float32
                )
            return kept[key]

        scores: Scores = self.task.score(vectors)
        for width in self.settings.matryoshka:
            scores[f"width {width}"] = self.task.score(lambda *texts, n=width: vectors(*texts)[:, :n])
        return scores


def load(settings: EmbedSettings, device: str) -> Any:
    """Loads the model, with its pooling and length as the settings have them, and lets fastbert run it."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling

    import fastbert.adapters

    transformers.set_seed(settings.seed)
    model = SentenceTransformer(settings.model, device=device)
    if settings.max_length is not None:
        model.max_seq_length = settings.max_length
    if settings.pooling is not None:
        places = [i for i, module in enumerate(model) if isinstance(module, Pooling)]
        if len(places) != 1:
            raise ValueError(f"pooling: {settings.model} has {len(places)} modules for it, expected one")
        width = model[places[0]].get_config_dict()
        width = width.get("embedding_dimension", width.get("word_embedding_dimension"))
        model[places[0]] = Pooling(width, settings.pooling)
    if settings.accelerate:
        fastbert.adapters.accelerate(model)
    return model.float()


def _examples(settings: EmbedSettings) -> tuple[list[Example], list[Example]]:
    """The examples for training and those that are held out."""
    options = (settings.kind, settings.columns, settings.score_scale)
    examples = read_examples(settings.train, *options)
    if settings.eval is None:
        return split(examples, settings.eval_share, settings.seed)
    return examples, read_examples(settings.eval, *options)


def _loss_name(examples: Sequence[Example], settings: EmbedSettings) -> str:
    first = examples[0]
    loss = settings.loss
    if loss == "auto":
        loss = DEFAULTS.get(first.kind, "")
        if first.kind == "pairs" and (settings.teacher is not None or first.score is not None):
            loss = "marginmse" if first.negatives or settings.mine_negatives else "distillation"
    if first.kind not in TAKES.get(loss, ()):
        raise ValueError(f"loss: {settings.loss} does not take records of the kind {first.kind}; {WANTS}")
    if loss == "cosine":
        for example in examples:
            if not -1.0 <= example.score <= 1.0:  # type: ignore[operator]
                raise ValueError(f"{example.place}: score {example.score} is no cosine; score_scale divides scores")
    if settings.mine_negatives and (first.kind != "pairs" or first.score is not None or loss == "distillation"):
        raise ValueError("mine_negatives: expected pairs of anchor and positive without scores")
    return loss


def _prompts(model: Any, settings: EmbedSettings) -> tuple[str | None, str | None]:
    """The prompts of anchors and of the other texts, which the model keeps for `encode_query` and `encode_document`."""
    for name, prompt in (("query", settings.query_prompt), ("document", settings.document_prompt)):
        if prompt is not None:
            model.prompts[name] = prompt
    return model.prompts.get("query") or None, model.prompts.get("document") or None


def _mined(model: Any, examples: list[Example], settings: EmbedSettings) -> list[Example]:
    anchors, positives = [example.anchor for example in examples], [example.positive for example in examples]
    mined = mine_negatives(
        model, anchors, positives, n=settings.mine_negatives, skip=settings.mine_skip, depth=settings.mine_depth,
        margin=settings.mine_margin, max_score=settings.mine_max_score,
    )  # fmt: skip
    return with_negatives(examples, mined.texts)


def _taught(examples: list[Example], settings: EmbedSettings, loss: str) -> list[Example]:
    """Adds a teacher's vectors of the anchors, or its scores of the pairs, where the records have none."""
    import torch

    import fastbert.pipelines.cross
    import fastbert.pipelines.sentence

    if loss == "distillation":
        if examples[0].vector is not None:
            return examples
        if settings.teacher is None:
            raise ValueError("teacher: expected a bi-encoder, or a column vector in the records")
        encoder = fastbert.pipelines.sentence.SentenceEncoder.from_pretrained(settings.teacher, dtype="float32")
        texts = distinct([example.anchor for example in examples])
        vectors = dict(zip(texts, encoder.encode(texts, show_progress_bar=False), strict=True))
        return [dataclasses.replace(example, vector=vectors[example.anchor]) for example in examples]
    if examples[0].score is not None:
        return examples
    examples = [example for example in examples if example.negatives]
    if settings.teacher is None or not examples:
        raise ValueError("teacher: expected a cross-encoder and negatives, or a column score in the records")
    cross = fastbert.pipelines.cross.CrossEncoder.from_pretrained(settings.teacher, dtype="float32")
    pairs = [(e.anchor, text) for e in examples for text in (e.positive, *e.negatives)]
    scores = iter(cross.predict(pairs, show_progress_bar=False, activation_fn=torch.nn.Identity()).tolist())
    return [dataclasses.replace(e, score=tuple(next(scores) for _ in (e.positive, *e.negatives))) for e in examples]


def _row(example: Example, loss: str) -> dict[str, Any]:
    """The columns of a trainer; their order counts, and the names of labels are its own."""
    if loss == "distillation":
        texts = {"text": example.anchor, **({"text_pair": example.positive} if example.positive else {})}
        assert example.vector is not None
        return {**texts, "label": [float(each) for each in example.vector]}
    if example.kind == "scored":
        return {"sentence1": example.anchor, "sentence2": example.positive, "score": example.score}
    negatives = {f"negative_{i}": text for i, text in enumerate(example.negatives, 1)}
    row: dict[str, Any] = {"anchor": example.anchor, "positive": example.positive, **negatives}
    if loss != "marginmse":
        return row
    score = example.score
    return {**row, "score": list(score) if isinstance(score, tuple) else [score]}


def _loss(model: Any, name: str, settings: EmbedSettings, examples: Sequence[Example]) -> Any:
    from sentence_transformers import losses

    if name == "distillation":
        vector = examples[0].vector
        assert vector is not None
        width, wide = model.get_sentence_embedding_dimension(), len(vector)
        if width != wide:
            raise ValueError(f"teacher: its vectors have {wide} numbers, and those of the model {width}")
    kinds = {
        "mnrl": losses.MultipleNegativesRankingLoss, "cached-mnrl": losses.CachedMultipleNegativesRankingLoss,
        "cosent": losses.CoSENTLoss, "cosine": losses.CosineSimilarityLoss, "marginmse": losses.MarginMSELoss,
        "distillation": losses.MSELoss,
    }  # fmt: skip
    options = across_devices(kinds[name]) if name in IN_BATCH else {}
    if name == "cached-mnrl":
        options["mini_batch_size"] = settings.mini_batch_size
    loss = kinds[name](model, **options)
    return losses.MatryoshkaLoss(model, loss, list(settings.matryoshka)) if settings.matryoshka else loss
