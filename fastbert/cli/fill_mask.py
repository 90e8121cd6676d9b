"""`fastbert fill-mask` prints the likeliest tokens for every mask of a text."""

from __future__ import annotations

import argparse
from typing import Any

from fastbert.cli.options import add_model_command, positive_int


def add(commands: Any) -> None:
    """Adds the subcommand."""
    parser = add_model_command(
        commands,
        "fill-mask",
        "the most probable tokens for every [MASK] of a text",
        """The model needs a masked-language-model head. A line of the output holds a probability and a token.

example:
  fastbert fill-mask "Paris is the [MASK] of France." --model google-bert/bert-base-uncased""",
    )
    parser.add_argument("text", help="text with one [MASK] or several")
    parser.add_argument(
        "--top-k", type=positive_int, default=5, metavar="N", help="tokens for each [MASK] (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints a line for each token, probability first, under a heading if there are several masks."""
    import torch

    from fastbert.cli import models
    from fastbert.models.tasks import BertForMaskedLM

    model, tokenizer = models.load_task(BertForMaskedLM, "masked-language-model", args)
    if tokenizer.mask_token is None:
        raise ValueError(f"{args.model}: the tokenizer has no mask token")
    encoding = tokenizer([args.text], return_tensors="pt").to(model.device)
    is_mask = encoding.input_ids[0] == tokenizer.mask_token_id
    n_masks = int(is_mask.sum())
    if n_masks == 0:
        raise ValueError(
            f"text: expected {tokenizer.mask_token} in it, within the {tokenizer.model_max_length} tokens that are read"
        )
    with torch.inference_mode():
        probabilities = model(**encoding).logits[0, is_mask].float().softmax(-1)  # (masks, V)
    best = probabilities[:, : tokenizer.vocab_size].topk(min(args.top_k, tokenizer.vocab_size))
    for i, (values, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
        if n_masks > 1:
            print(f"{tokenizer.mask_token} {i} of {n_masks}")
        for value, token in zip(values, tokenizer.convert_ids_to_tokens(ids), strict=True):
            print(f"{value:.6f}\t{token}")
