"""This module has seeded models and inputs, and the cases of one model. The parts in `bits_parts.py` use them."""

from __future__ import annotations

import copy
import pickle
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from bits_recording import Recording
from torch import Tensor, nn

import fastbert

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BATCH, LENGTH, VOCAB, LABELS = 4, 13, 101, 3
MASKS = ("none", "right", "left", "holes", "zero row")
HEADS = ("PreTraining", "MaskedLM", "NextSentencePrediction", "SequenceClassification", "MultipleChoice",
         "TokenClassification", "QuestionAnswering")  # fmt: skip
SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 160, "max_position_embeddings": 60, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "qa_dropout": 0.0}  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: Any, dtype: torch.dtype = FP32, device: str = "cpu") -> Any:
    """Returns the model in eval mode. Each weight is drawn by its name, so the order of the modules does not matter."""
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                scale = tensor.shape[1] ** -0.5 if tensor.dim() == 2 else 0.3
                centre = 1.0 if name.lower().endswith(("layernorm.weight", "layer_norm.weight")) else 0.0
                values = torch.randn(tensor.shape, generator=generator(zlib.crc32(name.encode())))
                tensor.copy_(centre + scale * values)
    return model.eval().to(device, dtype)


def config_of(model_type: str = "bert", num_labels: int = LABELS, **changes: Any) -> fastbert.BertConfig:
    sizes = {**SMALL, "embedding_size": 32} if model_type == "electra" else SMALL
    labels = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    return fastbert.BertConfig.from_dict({"model_type": model_type, **sizes, "id2label": labels, **changes})


def encoder_model(
    how: dict[str, Any], dtype: torch.dtype, model_type: str = "bert", device: str = "cpu", **changes: Any
) -> Any:
    return filled(fastbert.BertModel(config_of(model_type, **changes), **how), dtype, device)


def head_model(
    task: str, how: dict[str, Any], dtype: torch.dtype, model_type: str = "bert", device: str = "cpu", **changes: Any
) -> Any:
    return filled(getattr(fastbert, f"BertFor{task}")(config_of(model_type, **changes), **how), dtype, device)


def mask_of(kind: str) -> Tensor | None:
    """Returns a mask (BATCH, LENGTH), or None for "none"."""
    columns, lengths = torch.arange(LENGTH)[None], torch.tensor([LENGTH, 9, 1, 5])[:, None]
    if kind == "none":
        return None
    if kind == "left":
        return (columns >= LENGTH - lengths).long()
    if kind == "holes":
        return (torch.rand(BATCH, LENGTH, generator=generator(2)) < 0.6).long()
    return (columns < (lengths * (lengths != 9) if kind == "zero row" else lengths)).long()


def batch_of(model: Any, mask: str = "right") -> dict[str, Any]:
    """Returns (BATCH, LENGTH) ids and mask on the model's device, and token types if its family has them."""
    config, random = model.config, generator(3)
    batch = {"input_ids": torch.randint(2, min(config.vocab_size, 20000), (BATCH, LENGTH), generator=random)}
    batch["attention_mask"] = mask_of(mask)
    if config.model_type in ("bert", "electra"):
        batch["token_type_ids"] = torch.randint(config.type_vocab_size, (BATCH, LENGTH), generator=random)
    return {name: tensor if tensor is None else tensor.to(model.device) for name, tensor in batch.items()}


def packed_of(model: Any, lengths: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Returns (T,) ids of texts of these lengths, and cu_seqlens."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(model.device, torch.int32)
    ids = torch.randint(2, min(model.config.vocab_size, 20000), (int(offsets[-1]),), generator=generator(4))
    return ids.to(model.device), offsets


def labels_of(task: str, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the labels of a task for a batch. Some of them are ignored by the loss."""
    classes = torch.tensor([0, 1, 1, 0])
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator(7))
    tokens = tokens.where(torch.rand(BATCH, LENGTH, generator=generator(8)) < 0.5, -100)
    labels = {
        "PreTraining": {"labels": tokens, "next_sentence_label": classes},
        "MaskedLM": {"labels": tokens},
        "MultipleChoice": {"labels": classes[:2]},
        "TokenClassification": {"labels": tokens.where(tokens < 0, tokens % LABELS)},
        "QuestionAnswering": {"start_positions": classes, "end_positions": classes + 2},
    }.get(task, {"labels": classes})
    return {name: tensor.to(batch["input_ids"].device) for name, tensor in labels.items()}


def head_batch(model: Any, task: str, mask: str = "right") -> dict[str, Any]:
    batch = batch_of(model, mask)
    if task == "MultipleChoice":
        batch = {name: tensor if tensor is None else tensor.unflatten(0, (2, 2)) for name, tensor in batch.items()}
    return {**batch, **labels_of(task, batch)}


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return function(*args, **kwargs)


def record_encoder(recording: Recording, name: str, make: Callable[[], Any], few: bool = False) -> None:
    """Records a BertModel on every kind of input, or on some kinds with few, for a slow model."""
    model = make()
    for mask in ("right", "holes") if few else MASKS:
        recording.case(f"{name}/{mask}", call, model, **batch_of(model, mask))
    for lengths in ([1], [2, 7, 0, 5]) if few else ([1], [2, 7, 0, 5], [37, 1, 50], [0, 0], []):
        recording.case(f"{name}/packed {lengths}", call, model.forward_packed, *packed_of(model, lengths))
    batch = batch_of(model)
    recording.case(f"{name}/states", call, model, **batch, output_hidden_states=True)
    left = {**batch, "attention_mask": batch_of(model, "left")["attention_mask"]}
    positions = torch.randint(2, 40, (BATCH, LENGTH), generator=generator(6)).to(model.device)
    recording.case(f"{name}/position_ids", call, model, **left, position_ids=positions)
    width = getattr(model.config, "embedding_size", None) or model.config.hidden_size
    words = torch.randn(BATCH, LENGTH, width, generator=generator(5)).to(model.device, model.dtype)
    recording.case(f"{name}/inputs_embeds", call, model, **{**left, "input_ids": None}, inputs_embeds=words)
    if few:
        return
    recording.case(f"{name}/attentions", call, model, **batch, output_attentions=True, output_hidden_states=True)
    recording.case(f"{name}/tuple", call, model, **batch, return_dict=False)
    recording.case(f"{name}/gradients on", model, **batch)
    recording.case(f"{name}/id outside", call, model, **{**batch, "input_ids": batch["input_ids"] + 10**6})
    with torch.inference_mode():
        recording.case(f"{name}/inference mode", model, **batch)


def record_life(recording: Recording, name: str, make: Callable[[], Any]) -> None:
    """Records a BertModel's outputs after a change: derived weights must follow, and replaced parts must be called."""
    model = make()
    batch = batch_of(model)
    recording.case(f"{name}/buckets", lambda: fastbert.warmup(model).buckets)
    recording.case(f"{name}/plain", call, model, **batch)
    recording.case(f"{name}/copied", lambda: call(copy.deepcopy(model), **batch))
    recording.case(f"{name}/pickled", lambda: call(pickle.loads(pickle.dumps(model)), **batch))
    with torch.autocast(model.device.type, torch.bfloat16):
        recording.case(f"{name}/autocast", call, model, **batch)
    vmapped = torch.func.vmap(lambda ids: model(input_ids=ids[None]).last_hidden_state)
    recording.case(f"{name}/vmap", call, vmapped, batch["input_ids"])
    first, last = model.encoder.layer[0], model.encoder.layer[1]
    with torch.no_grad():
        first.attention.self.query.weight.mul_(1.5)
        last.output.dense.weight.data.mul_(0.5)  # PyTorch does not count this
    recording.case(f"{name}/rewritten", call, model, **batch)
    model.to(FP64)
    recording.case(f"{name}/float64", call, model, **batch)
    model.to(FP32)
    for part, hooked in {"embeddings": model.embeddings, "query": first.attention.self.query, "layer": last}.items():
        hook = hooked.register_forward_hook(lambda module, inputs, output: output * 2)
        recording.case(f"{name}/hook on {part}", call, model, **batch)
        recording.case(f"{name}/hook on {part}, states", call, model, **batch, output_hidden_states=True)
        hook.remove()
    recording.case(f"{name}/hook removed", call, model, **batch)
    last.output.dense = nn.Sequential(last.output.dense, nn.Tanh())
    recording.case(f"{name}/adapter", call, model, **batch)
    recording.case(f"{name}/adapter, packed", call, model.forward_packed, *packed_of(model, [2, 7, 0, 5]))
    recording.case(f"{name}/adapter, attentions", call, model, **batch, output_attentions=True)


def trained(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the loss and all gradients of one step without dropout, and the model's output after the step."""
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in sorted(model.named_parameters())}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return {"train": output, "gradient": gradients, "after": call(model.eval(), **batch)}


def record_heads(
    recording: Recording, name: str, make: Callable[..., Any], few: bool = False, train: bool = True
) -> None:
    """Records the models with heads, from make(task, **changes). few: with one mask. train: also a training step."""
    for task in HEADS:
        recording.group(f"{name}/{task}", _record_head, make, task, few, train)


def _record_head(recording: Recording, name: str, make: Callable[..., Any], task: str, few: bool, train: bool) -> None:
    model = make(task, **({"num_labels": 2} if task == "QuestionAnswering" else {}))
    for mask in ("right",) if few else MASKS:
        recording.case(f"{name}/{mask}", call, model, **head_batch(model, task, mask))
    recording.case(f"{name}/states", call, model, **head_batch(model, task), output_hidden_states=True)
    if train:
        recording.case(f"{name}/step", trained, model, head_batch(model, task))
