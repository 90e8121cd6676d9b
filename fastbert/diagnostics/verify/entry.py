"""`verify` compares a model on the user's texts with the float64 reference and with plain PyTorch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import adapters
from fastbert.adapters.live_pipeline import pipeline_in
from fastbert.adapters.live_tokenizer import LiveTokenizer
from fastbert.checkpoint.folder import resolve
from fastbert.diagnostics.explain.entry import backbone, find_model, float32_precision, prefix_of
from fastbert.diagnostics.verify.bounds import BOUND_WITHOUT_EAGER
from fastbert.diagnostics.verify.ends import ends_of
from fastbert.diagnostics.verify.findings import (
    ErrorReport,
    QuantizedReport,
    StateReport,
    VectorReport,
    WeightReport,
)
from fastbert.diagnostics.verify.gradient_findings import GradientReport, GradientsReport
from fastbert.diagnostics.verify.gradients import called, compare_gradients, own
from fastbert.diagnostics.verify.report import Report
from fastbert.diagnostics.verify.rows import Row
from fastbert.diagnostics.verify.run import Comparison, compare
from fastbert.models.bert import BertModel
from fastbert.models.encoder import EncoderModel
from fastbert.pipelines.names import SENTENCE_TRANSFORMERS, full_name
from fastbert.pipelines.pipeline import PackingTokenizer, Pipeline
from fastbert.pipelines.sentence import SentenceEncoder
from fastbert.text.tokenizer import Tokenizer

__all__ = [
    "DEFAULT_TEXTS",
    "ErrorReport",
    "GradientReport",
    "GradientsReport",
    "QuantizedReport",
    "Report",
    "StateReport",
    "VectorReport",
    "WeightReport",
    "verify",
]

DEFAULT_TEXTS = (
    "",
    "Yes.",
    "The cat sat on the mat.",
    "Where does the night train to Lisbon stop?",
    "In 1969 two people walked on the Moon, 384,400 km from home, while a third waited in orbit.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "한국어 문장도 똑같이 정확해야 합니다.",
    "Ein Übermaß an Regen; ça suffit! ¿Mañana otra vez? — Да, конечно.",
    "Return the item at the given index, or the default if the index is out of range. Negative indices count from the "
    "end, as they do for lists; an index that is not an integer raises TypeError.",
    "antidisestablishmentarianism " * 3 + "\N{GRINNING FACE} \N{SNOWMAN}",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer The slings and arrows of "
    "outrageous fortune, Or to take arms against a sea of troubles And by opposing end them.",
    "The river rose through the night, and by morning the lower fields lay under water from the mill to the bridge. "
    * 12,
)
# The lengths of random texts in tokens, if there is no tokenizer.
_LENGTHS = (1, 2, 3, 5, 16, 17, 31, 33, 64, 65, 120, 250)


def verify(
    model_or_path: Any,
    texts: Iterable[str] | Iterable[Sequence[int]] | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    strict: bool | None = None,
    gradients: bool = False,
) -> Report:
    """Checks on your texts that the weights are finite and that every layer is as accurate as plain PyTorch.

    model_or_path: a BertModel, a model with a head, a SentenceEncoder or a CrossEncoder; an accelerated model of
    another library (its encoder is checked, and the vectors of a SentenceTransformer); or a folder or hub id of a
    BertModel, with the last four arguments as for `BertModel.from_pretrained`.
    texts: strings, or lists of token ids; by default a dozen example texts, or random ids without a tokenizer. Texts
    longer than the model's positions are truncated, and the report says so. tokenizer: fastbert's or transformers', by
    default that of the folder or of the encoder.

    Every hidden state, the pooled output, and a head's logits or a SentenceEncoder's vectors have an error: the RMS of
    (fastbert - float64 reference) over the RMS of the reference. The bound is 1.25 times the error of plain PyTorch in
    the model's dtype plus half an ulp; for logits of tokens and for vectors it is twice that error. The bound of a
    single text is 4 times that.

    Each part is also checked alone, on its own input. Its bound is then 1.5 times plain PyTorch's error in 16 bits and
    twice that error in 32 bits, or 3 times for a part with one row for each text. So the report names the faulty part,
    and rounding errors of earlier layers do not hide the fault. A few logits for each text are checked only alone, with
    a wider bound, because they vary by chance. `vectors` compares the vectors of the texts with the reference's, and
    counts changes in the order of their neighbours.

    gradients: whether to check the gradients of the encoder's parameters that require one, in a forward and a backward
    pass. The loss is a fixed scalar: the sum of the last hidden states and the pooled output, times random normal
    numbers. The model runs in training mode without dropout, an accelerated one by its own forward. Errors are measured
    against float64 autograd of the reference. The bound for each part of the model is 1.25 times plain PyTorch's error
    plus one or two ulp. For one parameter it is a small multiple of that, because its error varies more. The report
    names the first wrong gradient of the backward pass, and the worst one.

    The model does not change, also not its `.grad` and random generators. It runs in eval mode. For a model that runs
    in 8 bits (precision="fp8" or "int8"), plain PyTorch is the emulation of the same quantisation, and `quantized` has
    the error from the quantisation. With 1,000 texts or more, a cosine below 0.998 or a Spearman below 0.999 is a
    problem.

    Raises TypeError or ValueError for wrong arguments, IndexError for token ids outside the vocabulary, the errors of
    `from_pretrained` for a path, and BackendError with strict=True. A wrong result raises no error: the report has it.
    """
    notes: list[str] = []
    model, name, tokenizer = _model_of(model_or_path, tokenizer, dtype, device, backend, strict)
    bert = backbone(find_model(model))
    pipeline: Pipeline | None = None
    weighted, live = model, model
    if isinstance(model, SentenceEncoder) or bert in adapters.modules(model):
        tokenizer = _usable(tokenizer)
    else:  # an accelerated model of another library
        pipeline, tokenizer = _live(model, tokenizer, notes)
        weighted = model if isinstance(model, nn.Module) else bert
        model = bert
    if (sharing := bert.encoder.sharing) is not None:
        notes.append(sharing)
    if bert.device.type == "meta":
        raise ValueError("model: its parameters are on 'meta', where they have no values")
    rows = _rows(texts, tokenizer, bert, notes)
    weights = tuple(_bad_weights(weighted))
    comparison = Comparison(())
    gradients_report: GradientsReport | None = None
    if not weights:
        inner = find_model(model)
        ends = ends_of(pipeline or (model if isinstance(model, SentenceEncoder) else inner), bert, "")
        outer = prefix_of(inner, model)
        named = [replace(end, name=end.name if end.is_vectors else outer + end.name) for end in ends]
        comparison = compare(bert, rows, prefix_of(bert, model), named, model)
        if gradients:
            gradients_report = _gradients(live, bert, rows, prefix_of(bert, model), weighted, notes)
        if any(math.isnan(state.eager_error) for state in comparison.states):
            notes.append(f"plain PyTorch is not finite in {bert.dtype}; so the bound is {BOUND_WITHOUT_EAGER}")
    if bert.dtype == torch.float32 and bert.device.type == "cuda":
        notes.append(f"float32 multiplies in {float32_precision()}, the model and plain PyTorch: PyTorch's own switch")
    return Report(
        name, str(bert.device), str(bert.dtype).removeprefix("torch."), bert.policy.backend, len(rows),
        sum(len(ids) for ids, _ in rows), weights, comparison.states, tuple(notes), comparison.quantized,
        comparison.vectors, comparison.last, gradients_report,
    )  # fmt: skip


def _gradients(
    model: Any, bert: EncoderModel, rows: list[Row], prefix: str, outer: Any, notes: list[str]
) -> GradientsReport | None:
    """Returns the report on gradients, or None if there are none to check; the notes then have the reason.

    model: the user's object. bert: fastbert's encoder in it. outer: the module for the names of parameters.
    """
    if bert.precision is not None:
        notes.append("gradients were not checked: the model runs in 8 bits")
        return None
    with adapters.uncounted(model) as reasons:
        live = None if bert in adapters.modules(model) else adapters.first_encoder(model)
        report = compare_gradients(own(bert) if live is None else called(live, bert), rows, prefix, outer)
    if report is None:
        notes.append("gradients were not checked: no parameter of the encoder requires one")
    elif reasons:
        notes.append(f"gradients were those of the original forward: {', '.join(reasons)}")
    return report


def _model_of(
    model_or_path: Any, tokenizer: Any, dtype: Any, device: Any, backend: Any, strict: Any
) -> tuple[nn.Module, str, Any]:
    """Returns the model, its name for the report, and its tokenizer."""
    overrides = {"dtype": dtype, "device": device, "backend": backend, "strict": strict}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if not isinstance(model_or_path, (str, os.PathLike)):
        kind = type(model_or_path).__name__
        if overrides:
            raise ValueError(f"{', '.join(overrides)}: expected only with a path, got a loaded {kind}")
        return model_or_path, kind, getattr(model_or_path, "tokenizer", None) if tokenizer is None else tokenizer
    folder = _transformer_folder(resolve(full_name(model_or_path, SENTENCE_TRANSFORMERS)))
    model: EncoderModel = BertModel.from_pretrained(folder, **overrides)
    if tokenizer is None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        tokenizer = Tokenizer.from_pretrained(folder)
    return model, os.fspath(model_or_path), tokenizer


def _transformer_folder(folder: Path) -> Path:
    """Returns the folder of the weights: this one, or the first module's folder in a sentence-transformers folder."""
    file = folder / "modules.json"
    if not file.is_file():
        return folder
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        return folder / min(modules, key=lambda module: module["idx"])["path"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: expected a list of modules with idx and path: {error!r}") from error


def _live(model: Any, tokenizer: Any, notes: list[str]) -> tuple[Pipeline | None, PackingTokenizer | None]:
    """Returns the tokenizer of an accelerated model and, for a SentenceTransformer, its pipeline."""
    pipeline = None
    try:
        pipeline = pipeline_in(model)
    except adapters.Unsupported as error:
        notes.append(f"vectors were not checked: encode runs by the original code: {error}")
    if pipeline is not None and tokenizer is getattr(model, "tokenizer", None):
        return pipeline, pipeline.tokenizer
    return pipeline, _usable(tokenizer)


def _usable(tokenizer: Any) -> Tokenizer | LiveTokenizer | None:
    """Returns the tokenizer in a form that packs texts. Raises TypeError for one of another library."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if not (callable(tokenizer) and hasattr(tokenizer, "model_input_names")):
        expected = "a fastbert.Tokenizer or one of transformers"
        raise TypeError(f"tokenizer: expected {expected}, got {type(tokenizer).__name__}")
    return LiveTokenizer(tokenizer, tokenizer.model_max_length)


def _rows(texts: Any, tokenizer: PackingTokenizer | None, bert: EncoderModel, notes: list[str]) -> list[Row]:
    n_positions = bert.longest_text
    if texts is None and tokenizer is None:
        notes.append("no tokenizer: random token ids instead of texts")
        return _random_rows(bert, n_positions)
    items = list(DEFAULT_TEXTS if texts is None else [texts] if isinstance(texts, str) else texts)
    if not items:
        raise ValueError("texts: expected at least one")
    if not all(isinstance(item, str) for item in items):
        return [(ids, torch.zeros_like(ids)) for ids in map(_ids_of, items)]
    if tokenizer is None:
        raise ValueError("tokenizer: needed for texts; pass tokenizer=, or texts as lists of token ids")
    limit = min(n_positions, tokenizer.model_max_length or n_positions)
    packed = tokenizer.encode_packed(items, max_length=limit, warn=False)
    if packed.n_truncated:
        texts_cut = "1 text was" if packed.n_truncated == 1 else f"{packed.n_truncated} texts were"
        notes.append(f"{texts_cut} cut to {limit} tokens, by {packed.n_truncated_tokens} in all")
    sizes = packed.cu_seqlens.diff().tolist()
    if isinstance(tokenizer, LiveTokenizer) and limit in sizes:
        notes.append(f"texts of {limit} tokens, the most there are: {sizes.count(limit)}; what was longer was cut")
    return list(zip(packed.input_ids.split(sizes), packed.token_type_ids.split(sizes), strict=True))


def _ids_of(item: Any) -> Tensor:
    if isinstance(item, str):
        raise TypeError("texts: got strings and lists of token ids, expected one of the two")
    ids = torch.as_tensor(item, device="cpu")
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise TypeError(f"texts: expected strings or lists of token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _random_rows(bert: EncoderModel, n_positions: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    n_ids, n_types = bert.config.vocab_size, bert.embeddings.n_token_types
    rows = []
    for n in (min(length, n_positions) for length in _LENGTHS):
        ids = torch.randint(n_ids, (n,), generator=generator, device="cpu")
        rows.append((ids, (torch.arange(n, device="cpu") >= n / 2).long().clamp(max=n_types - 1)))
    return rows


def _bad_weights(model: nn.Module) -> Iterator[WeightReport]:
    for name, parameter in model.named_parameters():
        n_nan, n_inf = int(parameter.isnan().sum()), int(parameter.isinf().sum())
        if n_nan or n_inf:
            yield WeightReport(name, n_nan, n_inf, parameter.numel())
