"""The tests of whole models share random models of transformers, our twins of them, and batches."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor

import fastbert
from helpers import rms_error

BATCH, LENGTH = 4, 13
VOCAB, POSITIONS, TYPES, LABELS = 101, 40, 3, 3
FLOAT64_BOUND, GRADIENT_BOUND = 1e-10, 1e-9

# Real shapes with few layers, and shapes that no kernel's block size divides.
SHAPES: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 1},
    "minilm": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2},
    "96x3": {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 131, "num_hidden_layers": 2},
    "320x5": {"hidden_size": 320, "num_attention_heads": 5, "intermediate_size": 131, "num_hidden_layers": 2},
    "tiny": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 37, "num_hidden_layers": 2},
}
HEADS = (
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
MODELS = ("BertModel", *HEADS)
MASKS = ("none", "right", "left", "holes", "zero_row")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def config_of_transformers(name: str = "BertModel", shape: str = "tiny", **options: Any) -> transformers.BertConfig:
    settings = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": TYPES,
        "num_labels": 2 if name == "BertForQuestionAnswering" else LABELS,
        "attn_implementation": "eager",
        **SHAPES[shape],
        **options,
    }
    return transformers.BertConfig(**settings)


def theirs(name: str = "BertModel", shape: str = "tiny", **options: Any) -> transformers.PreTrainedModel:
    """A model of transformers in float64, in eval mode, with eager attention and every parameter random.

    Each call returns a copy of its own: a model that has run keeps hooks, which pickle does not read.
    """
    return copy.deepcopy(_theirs(name, shape, **options))


@functools.cache
def _theirs(name: str, shape: str, **options: Any) -> transformers.PreTrainedModel:
    model = getattr(transformers, name)(config_of_transformers(name, shape, **options)).double().eval()
    randomise(model)
    return model


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Fills every parameter, LayerNorms (around 1) and biases too.

    The scales keep tokens apart through the layers: where they become alike, the gradients of queries and keys are a
    small difference of large numbers, and their error is chance.
    """
    random = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.3
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=random, dtype=torch.float64) * scale)


def in_dtype(model: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A copy of a model with its weights rounded to dtype."""
    return copy.deepcopy(model).to(device, dtype)


def twin(
    model: transformers.PreTrainedModel,
    dtype: torch.dtype = torch.float64,
    backend: str = "cpu",
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> Any:
    """Our model with the weights of a model of transformers, rounded to dtype."""
    config = fastbert.BertConfig.from_dict(model.config.to_dict())
    ours = getattr(fastbert, type(model).__name__)(config, backend=backend, strict=strict).to(device, dtype)
    ours.load_state_dict(model.state_dict())
    return ours.train(model.training)


def mask(kind: str) -> Tensor | None:
    """(BATCH, LENGTH) int64, None for "none". "zero_row" is "right" with an empty row in the middle."""
    lengths = torch.tensor([13, 9, 1, 5])[:, None]
    columns = torch.arange(LENGTH)[None]
    if kind == "none":
        return None
    if kind == "right":
        return (columns < lengths).long()
    if kind == "left":
        return (columns >= LENGTH - lengths).long()
    if kind == "zero_row":
        return (columns < torch.tensor([13, 0, 1, 5])[:, None]).long()
    holes = torch.rand(BATCH, LENGTH, generator=generator(2)) < 0.6
    holes[:2, 0] = True
    holes[2:, 0] = False
    return holes.long()


def valid_of(attention_mask: Tensor | None) -> Tensor:
    """(BATCH, LENGTH) bool."""
    return torch.ones(BATCH, LENGTH, dtype=torch.bool) if attention_mask is None else attention_mask != 0


def make_batch(kind: str = "right", name: str = "BertModel") -> dict[str, Any]:
    """Ids, mask, types and positions; (2, 2, S) in place of (4, S) for multiple choice.

    Neither 0, the padding id, nor the order of positions is special: positions are shuffled.
    """
    random = generator(3)
    batch = {
        "input_ids": torch.randint(1, VOCAB, (BATCH, LENGTH), generator=random),
        "attention_mask": mask(kind),
        "token_type_ids": torch.randint(TYPES, (BATCH, LENGTH), generator=random),
        "position_ids": torch.stack([torch.randperm(POSITIONS, generator=random)[:LENGTH] for _ in range(BATCH)]),
    }
    if name == "BertForMultipleChoice":
        return {n: None if t is None else t.unflatten(0, (2, BATCH // 2)) for n, t in batch.items()}
    return batch


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}


def run(model: Any, batch: dict[str, Any], **options: Any) -> Any:
    """The model's output, without gradients, with the batch on the model's device."""
    with torch.no_grad():
        return model(**to_device(batch, model.device), **options)


def first_tokens(hidden: Tensor, valid: Tensor) -> Tensor:
    """(B, S, H) -> (B, H): the first valid token of each row, zeros where there is none."""
    is_first = valid & (valid.cumsum(1) == 1)
    return hidden.masked_fill(~is_first[:, :, None], 0).sum(1)


def pooled(model: Any, hidden: Tensor, valid: Tensor) -> Tensor:
    """What transformers' pooler makes of the first valid token of each row."""
    first = first_tokens(hidden, valid)
    with torch.no_grad():
        if isinstance(model.pooler, torch.nn.Linear):  # ALBERT's
            return torch.tanh(model.pooler(first))
        return model.pooler(first[:, None])


def assert_close(name: str, ours: Tensor, expected: Tensor, bound: float = FLOAT64_BOUND) -> None:
    assert ours.dtype == expected.dtype, f"{name}: {ours.dtype}, expected {expected.dtype}"
    error = rms_error(ours, expected)
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def weighted_sum(tensors: dict[str, Tensor]) -> Tensor:
    """A scalar in which every element counts, each with its own random weight."""
    total = torch.zeros((), dtype=torch.float64, device=next(iter(tensors.values())).device)
    for i, tensor in enumerate(tensors.values()):
        total = total + (tensor.double() * randn(*tensor.shape, seed=100 + i).to(tensor.device)).sum()
    return total


def assert_gradients(ours: Any, expected: Any, bound: float) -> None:
    """Every parameter's gradient agrees, None with None. In float64."""
    mine, other = dict(ours.named_parameters()), dict(expected.named_parameters())
    assert mine.keys() == other.keys()
    for name, parameter in other.items():
        if parameter.grad is None:
            assert mine[name].grad is None, f"{name}: a gradient where transformers has none"
        else:
            assert mine[name].grad is not None, f"{name}: no gradient"
            if is_zero(parameter.grad):
                assert is_zero(mine[name].grad), name
            else:
                assert_close(name, mine[name].grad, parameter.grad, bound)


def is_zero(gradient: Tensor) -> bool:
    """Whether a float64 gradient is rounding alone, as a key bias's: it shifts all scores of a softmax alike."""
    return bool(gradient.abs().max() < 1e-13)


def assert_gradients_as_accurate(ours: Any, eager: Any, reference: Any) -> None:
    """The numerical policy on all gradients together, each parameter's in units of its RMS in the float64 reference."""
    scales = {
        name: p.grad.square().mean().sqrt()
        for name, p in reference.named_parameters()
        if p.grad is not None and not is_zero(p.grad)
    }

    def scaled(model: Any) -> Tensor:
        parameters = dict(model.named_parameters())
        return torch.cat([parameters[name].grad.double().cpu().flatten() / scale for name, scale in scales.items()])

    expected = scaled(reference)
    our_error, eager_error = rms_error(scaled(ours), expected), rms_error(scaled(eager), expected)
    bound = 1.25 * eager_error + 0.5 * torch.finfo(ours.dtype).eps
    assert our_error <= bound, f"gradients: error {our_error:.3g}, eager has {eager_error:.3g}, bound {bound:.3g}"


def place(backend: str, device: torch.device) -> torch.device:
    """The "cpu" backend is for the CPU; the others run where the kernels run."""
    return torch.device("cpu") if backend == "cpu" else device


def both_with_gradients(ours: Any, models: list[Any], batch: dict[str, Any], **options: Any) -> None:
    """Backpropagates one scalar, in which every valid element counts, through each model."""
    valid = valid_of(batch["attention_mask"])
    for model in (ours, *models):
        output = model(**to_device(batch, model.device), **options)
        hidden = output.last_hidden_state
        first = valid[:, :1].to(hidden.device)
        weighted_sum({"hidden": hidden[valid.to(hidden.device)], "pooled": output.pooler_output * first}).backward()


def trainable(shape: str, **options: Any) -> Any:
    """transformers' model in training mode, without dropout."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return copy.deepcopy(theirs("BertModel", shape, **none, **options)).train()


def attention_of(model: Any, i: int = 0) -> Any:
    """The attention of layer i, with its query, key and value."""
    return model.encoder.layer[i].attention.self


def output_of(model: Any, i: int = 0) -> Any:
    """The end of layer i: dense, dropout and LayerNorm."""
    return model.encoder.layer[i].output
