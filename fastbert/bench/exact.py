"""The float64 reference determines the right vectors, for as many texts as time allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.bench.texts import spread
from fastbert.checkpoint.config import BertConfig
from fastbert.engine.block import product_shapes
from fastbert.pipelines.pipeline import POOLING_MODES
from fastbert.pipelines.sentence import SentenceEncoder

# The maximum numbers of sequences and of their tokens, and on a CPU of operations, which take seconds.
CHECKED, CHECKED_TOKENS, CHECKED_FLOPS = 64, 6000, 4e11


def choose_checked(lengths: Sequence[int], config: BertConfig, device: torch.device) -> list[int]:
    """Returns the indices of the sequences to check: of all lengths, ascending, and not too many for float64."""
    budget = float(CHECKED_TOKENS)
    if device.type == "cpu":
        linears = sum(m * k for m, k in product_shapes(config.hidden_size, config.intermediate_size).values())
        budget = min(budget, CHECKED_FLOPS / (2 * linears * config.num_hidden_layers))
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    n = min(CHECKED, len(by_length))
    while n > 1 and sum(lengths[i] for i in spread(by_length, n)) > budget:
        n -= 1
    return spread(by_length, n)


@torch.no_grad()
def reference_vectors(
    encoder: SentenceEncoder, texts: Sequence[str], device: torch.device | str = "cpu", batch_size: int = 8
) -> Tensor:
    """Returns the (n, dim) vectors of the texts in float64, on the CPU. fastbert.reference computes them on `device`.

    encoder: on the CPU; only its weights, tokenizer, pooling modes and the modules after pooling are used.
    """
    parameters = {name: p.to(device, torch.float64) for name, p in encoder.model.named_parameters()}
    tokens = encoder.tokenizer(texts, max_length=encoder.max_seq_length)
    order = sorted(range(len(texts)), key=lambda i: len(tokens.input_ids[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        batch = [texts[i] for i in order[start : start + batch_size]]
        inputs = encoder.tokenizer(batch, padding=True, max_length=encoder.max_seq_length, return_tensors="pt")
        inputs = inputs.to(device)
        encoded = reference.encode(parameters, encoder.model.config, **inputs, output_attentions=False)
        mask = inputs.attention_mask
        cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
        hidden = encoded.last_hidden_state[mask != 0]  # (T, H)
        pooled = [reference.pool(hidden, cu_seqlens, POOLING_MODES[mode]) for mode in encoder.pooling.modes]
        x = torch.cat(pooled, dim=1).cpu()
        for module in encoder.tail:
            x = module(x)
        parts.append(x[:, : encoder.truncate_dim])
    vectors = torch.cat(parts)
    return vectors[torch.tensor(order).argsort()]
