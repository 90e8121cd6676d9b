"""The losses of a packed batch are those of transformers, summed, and what is predicted right is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from fastbert.ops import IGNORED
from fastbert.training.objective import MLM_LOSS, MLM_RIGHT, NSP_LOSS, NSP_RIGHT, PretrainingObjective, arguments_of

CPU = torch.device("cpu")
LENGTHS = [9, 3, 14, 6]


def config(**fields: Any) -> BertConfig:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "intermediate_size": 64, "max_position_embeddings": 16, **fields})


def batch(seed: int = 0, pairs: bool = True) -> Any:
    generator = np.random.default_rng(seed)
    n_tokens = sum(LENGTHS)
    rows = np.sort(generator.choice(n_tokens, 7, replace=False))
    return SimpleNamespace(
        input_ids=generator.integers(0, 97, n_tokens),
        token_type_ids=generator.integers(0, 2, n_tokens),
        cu_seqlens=np.cumsum([0, *LENGTHS]).astype(np.int32),
        rows=rows,
        labels=generator.integers(0, 97, len(rows)),
        next_sentence_label=np.array([0, 1, IGNORED, 1] if pairs else [IGNORED] * 4),
        n_pairs=3 if pairs else 0,
    )


def padded(batch: Any) -> dict[str, torch.Tensor]:
    """The same batch as transformers takes it."""
    names = ("input_ids", "token_type_ids", "attention_mask", "labels")
    arrays = {name: np.zeros((len(LENGTHS), max(LENGTHS)), np.int64) for name in names}
    flat = np.full(sum(LENGTHS), IGNORED)
    flat[batch.rows] = batch.labels
    arrays["labels"][:] = IGNORED
    for i, (start, n) in enumerate(zip(batch.cu_seqlens, LENGTHS, strict=False)):
        arrays["attention_mask"][i, :n] = 1
        arrays["labels"][i, :n] = flat[start : start + n]
        for name in names[:2]:
            arrays[name][i, :n] = getattr(batch, name)[start : start + n]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_loss_is_that_of_transformers() -> None:
    """Catches a loss of pre-training that is not BertForPreTraining's, to 1e-6, and a gradient that is not its."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = BertForPreTraining(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**vars_of(ours.config))).train()
    theirs.load_state_dict(ours.state_dict())
    data = batch()
    labels = torch.from_numpy(data.next_sentence_label)
    expected = theirs(**padded(data), next_sentence_label=labels).loss
    scales = 1 / len(data.rows), 1 / data.n_pairs
    loss, sums = PretrainingObjective(ours)(*arguments_of(data, CPU), scales)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    means = sums[MLM_LOSS] * scales[0] + sums[NSP_LOSS] * scales[1]
    torch.testing.assert_close(means, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def vars_of(config: BertConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("architectures", "model_type")}


@pytest.mark.parametrize("task", [BertForPreTraining, BertForMaskedLM])
def test_what_is_right_is_counted(task: Any) -> None:
    """Catches accuracies that are not those of the model's own logits."""
    torch.manual_seed(1)
    model = task(config()).eval()
    data = batch()
    arguments = padded(data)
    labels = arguments.pop("labels")
    with torch.no_grad():
        output = model(**arguments)
        logits = output.prediction_logits if task is BertForPreTraining else output.logits
        best = logits.argmax(-1)[labels != IGNORED]
        data.labels[::2] = best[::2]  # so that some are right
        _, sums = PretrainingObjective(model)(*arguments_of(data, CPU), count_right=True)
    assert sums[MLM_RIGHT] == (best == torch.from_numpy(data.labels)).sum() >= 4
    if task is BertForPreTraining:
        wanted = torch.from_numpy(data.next_sentence_label)
        assert sums[NSP_RIGHT] == (output.seq_relationship_logits.argmax(-1) == wanted).sum()
    else:
        assert sums[NSP_LOSS] == sums[NSP_RIGHT] == 0


def test_parts_of_a_step_add_up() -> None:
    """Catches sums that depend on how the sequences of a step are cut into batches."""
    torch.manual_seed(2)
    objective = PretrainingObjective(BertForPreTraining(config()).eval())
    data = batch()
    whole = objective(*arguments_of(data, CPU), count_right=True)[1]
    parts = []
    for i, (start, n) in enumerate(zip(data.cu_seqlens, LENGTHS, strict=False)):
        inside = (data.rows >= start) & (data.rows < start + n)
        part = SimpleNamespace(
            input_ids=data.input_ids[start : start + n],
            token_type_ids=data.token_type_ids[start : start + n],
            cu_seqlens=np.array([0, n], np.int32),
            rows=data.rows[inside] - start,
            labels=data.labels[inside],
            next_sentence_label=data.next_sentence_label[i : i + 1],
        )
        parts.append(objective(*arguments_of(part, CPU), count_right=True)[1])
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-5)


def test_batch_without_labels_or_pairs_has_no_loss() -> None:
    """Catches NaN where a batch has no masked token, or no pair."""
    objective = PretrainingObjective(BertForPreTraining(config()).train())
    data = batch(pairs=False)
    data.rows, data.labels = data.rows[:0], data.labels[:0]
    loss, sums = objective(*arguments_of(data, CPU), count_right=True)
    loss.backward()
    assert loss == 0 and not sums.any()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_other_models_are_refused() -> None:
    """Catches a model without the head, which would fail in the middle of a step."""
    with pytest.raises(TypeError, match="BertForPreTraining"):
        PretrainingObjective(BertModel(config()))  # type: ignore[arg-type]
