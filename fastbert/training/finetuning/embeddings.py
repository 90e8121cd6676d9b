"""Sentence embeddings are trained by sentence-transformers' trainer, on a model that fastbert runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert.training.finetuning import distilling, preserving
from fastbert.training.finetuning.vector_batches import SMALLEST_OF_CLASSES, sampler_arguments
from fastbert.training.finetuning.vector_data import (
    Example,
    checked_classes,
    dataset_of,
    numbers_of,
    read_examples,
    split,
)
from fastbert.training.finetuning.vector_evaluation import (
    LabelledTexts,
    PairRetrieval,
    ScoredPairs,
    Scores,
    TeacherVectors,
)
from fastbert.training.finetuning.vector_processes import join, mined
from fastbert.training.finetuning.vector_report import VectorResult
from fastbert.training.finetuning.vector_run import across_devices, arguments_of, prepare_output, run
from fastbert.training.finetuning.vector_settings import CLASS_LOSSES, EmbedSettings

DEFAULTS = {"pairs": "mnrl", "scored": "cosent", "texts": "distillation", "labelled": "batch-all"}
TAKES = {  # the kinds of examples that a loss accepts
    "mnrl": ("pairs",), "cached-mnrl": ("pairs",), "cosent": ("scored",), "cosine": ("scored",),
    "marginmse": ("pairs",), "distillation": ("texts", "pairs", "labelled"),
    **dict.fromkeys(CLASS_LOSSES, ("labelled",)),
}  # fmt: skip
TASKS: dict[str, Any] = {
    "pairs": PairRetrieval, "scored": ScoredPairs, "texts": TeacherVectors, "labelled": LabelledTexts,
}  # fmt: skip
WANTS = (
    "pairs: mnrl, cached-mnrl, marginmse, distillation; scored: cosent, cosine; texts: distillation; "
    f"labelled: {', '.join(CLASS_LOSSES)}, distillation"
)
FIRST, LABELS = ("anchor", "sentence1", "text"), ("label", "score")  # column names of a trainer
IN_BATCH = ("mnrl", "cached-mnrl")  # losses that use the other texts of a batch as negatives


def train_embeddings(model: Any, train: Any, output: Any, **settings: Any) -> VectorResult:
    """Trains sentence embeddings on pairs, triplets, scored pairs, or a teacher's vectors or scores.

    model: a folder of sentence-transformers or of a plain encoder, which gets mean pooling, or a hub id. train: a file,
    an iterable of dicts or a datasets.Dataset. Its columns are anchor and positive, optionally with negative (a text, a
    list, or negative_1 and so on) and score; or sentence1, sentence2 and score; or text and label (its class); or text,
    optionally with text_pair (its translation) and vector (of a teacher). output: the folder of the result, which
    sentence-transformers and fastbert load. settings: the other fields of `EmbedSettings`.

    The scores of the evaluation are recall@1, recall@5, recall@10, mrr and ndcg@10 for pairs, spearman and pearson for
    scored pairs, map@r, nearest and mrr for classes, negative_mse and cosine for vectors.

    With torchrun, every process calls it. The processes share the work, and the first one writes the result.

    Raises ValueError for wrong settings and data, RecordError for a wrong record, with its position, and
    FloatingPointError for a loss that is not finite.
    """
    return train_by(EmbedSettings(model=model, train=train, output=output, **settings))


def train_by(settings: EmbedSettings) -> VectorResult:
    """Does the work of `train_embeddings` for an `EmbedSettings`."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    processes = join(settings.device)
    examples, held = _examples(settings)
    loss = _loss_name(examples, settings)
    if loss in CLASS_LOSSES:
        examples = checked_classes(examples)
    task = TASKS[held[0].kind](held) if held and held[0].kind != "texts" else None
    checkpoint = prepare_output(settings, processes)
    facts: dict[str, Any] = {}
    if loss == "distillation":
        examples = distilling.with_vectors(examples, settings, processes)
    if held and held[0].kind == "texts":
        held = distilling.with_vectors(held, settings, processes)
    vector = examples[0].vector if loss == "distillation" else None
    wide = None if vector is None else len(vector)
    other = held[0].vector if held else None
    if wide is not None and other is not None and len(other) != wide:
        raise ValueError(f"eval: its vectors have {len(other)} numbers, and those of the training data {wide}")
    model = load(settings, str(processes.device), wide)
    prompts = _prompts(model, settings)
    if settings.mine_negatives:
        examples = mined(model, examples, settings, processes)
    if loss == "marginmse":
        examples = distilling.with_scores(examples, settings, processes)
    width = model.get_sentence_embedding_dimension()
    if wide is not None and wide != width:
        rule = distilling.way_of(wide, width, settings.teacher_width)
        assert rule is not None
        examples, held, kept = distilling.shortened(examples, held, width, rule, processes)
        facts["teacher"] = {"width": wide, "fitted by": rule, "share kept": round(kept, 4)}
    if held and task is None:
        task = TeacherVectors(held)
    rows = _rows(examples, loss)
    data = dataset_of(rows)
    preserved: list[dict[str, Any]] = []
    if settings.preserve is not None:
        preserved = preserving.rows_of(model, settings, len(rows), prompts[0], processes)
    batches = "no duplicates" if loss in IN_BATCH else "classes" if loss in CLASS_LOSSES else "shuffled"
    arguments = arguments_of(
        SentenceTransformerTrainingArguments, settings, None if task is None else task.headline,
        **sampler_arguments(batches, processes.n, isinstance(data, dict) or bool(preserved)),
    )  # fmt: skip
    arguments.prompts = {
        name: prompts[name not in FIRST]
        for name in dict.fromkeys(name for row in (*rows, *preserved[:1]) for name in row)
        if name not in LABELS and prompts[name not in FIRST]
    }
    losses = _loss(model, loss, settings)
    if settings.preserve is not None:
        data, losses = preserving.with_rows(data, losses, preserved, model, settings.preserve_weight)
        facts["preserved"] = len(preserved)
    return run(
        SentenceTransformerTrainer, arguments, model, losses, data, settings,
        None if task is None else _Scorer(task, settings, prompts), "" if task is None else task.headline, checkpoint,
        {"loss": loss, "training": numbers_of(examples), "evaluation": numbers_of(held), **facts}, processes,
        [[text for name, text in row.items() if name not in LABELS] for row in rows],
    )  # fmt: skip


class _Scorer:
    """A `_Scorer` scores a model, also at each width of Matryoshka."""

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


def load(settings: EmbedSettings, device: str, teacher: int | None = None) -> Any:
    """Loads the model, with the pooling and length of the settings, and lets fastbert run it.

    teacher: the width of the vectors to learn. If the model has another width, a Dense is added.
    """
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
    width = model.get_sentence_embedding_dimension()
    if teacher is not None and distilling.way_of(teacher, width, settings.teacher_width) == "dense":
        distilling.add_dense(model, teacher)
        model.to(device)
    if settings.accelerate:
        fastbert.adapters.accelerate(model)
    return model.float()


def _examples(settings: EmbedSettings) -> tuple[list[Example], list[Example]]:
    """Returns the examples for training and the held-out examples."""
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
        if first.kind == "labelled" and settings.teacher is not None:
            loss = "distillation"
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
    if settings.preserve is not None and (loss == "distillation" or loss in CLASS_LOSSES):
        raise ValueError(f"preserve: not with loss {loss!r}, expected one of pairs or of scored pairs")
    if loss in CLASS_LOSSES and (settings.batch_size < SMALLEST_OF_CLASSES or settings.batch_size % 2):
        raise ValueError(f"batch_size: expected an even number from {SMALLEST_OF_CLASSES} on for classes, of which a "
                         f"batch has two texts each, got {settings.batch_size}")  # fmt: skip
    return loss


def _prompts(model: Any, settings: EmbedSettings) -> tuple[str | None, str | None]:
    """Returns the prompts of anchors and of the other texts, which the model keeps for queries and documents."""
    for name, prompt in (("query", settings.query_prompt), ("document", settings.document_prompt)):
        if prompt is not None:
            model.prompts[name] = prompt
    return model.prompts.get("query") or None, model.prompts.get("document") or None


def _rows(examples: Sequence[Example], loss: str) -> list[dict[str, Any]]:
    """Returns the columns for a trainer, which depends on their order and has its own names for labels."""
    if loss in CLASS_LOSSES:
        numbers = {label: number for number, label in enumerate(sorted({example.label for example in examples}))}
        return [{"text": example.anchor, "label": numbers[example.label]} for example in examples]
    return [_row(example, loss) for example in examples]


def _row(example: Example, loss: str) -> dict[str, Any]:
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


def _loss(model: Any, name: str, settings: EmbedSettings) -> Any:
    from sentence_transformers import losses

    kinds = {
        "mnrl": losses.MultipleNegativesRankingLoss, "cached-mnrl": losses.CachedMultipleNegativesRankingLoss,
        "cosent": losses.CoSENTLoss, "cosine": losses.CosineSimilarityLoss, "marginmse": losses.MarginMSELoss,
        "distillation": losses.MSELoss, "batch-all": losses.BatchAllTripletLoss,
        "batch-hard": losses.BatchHardTripletLoss, "batch-semi-hard": losses.BatchSemiHardTripletLoss,
        "batch-soft": losses.BatchHardSoftMarginTripletLoss,
    }  # fmt: skip
    options = across_devices(kinds[name]) if name in IN_BATCH else {}
    if name == "cached-mnrl":
        options["mini_batch_size"] = settings.mini_batch_size
    if name in CLASS_LOSSES:
        options["distance_metric"] = losses.BatchHardTripletLossDistanceFunction.cosine_distance
        if name != "batch-soft":
            options["margin"] = settings.margin
    loss = kinds[name](model, **options)
    return losses.MatryoshkaLoss(model, loss, list(settings.matryoshka)) if settings.matryoshka else loss
