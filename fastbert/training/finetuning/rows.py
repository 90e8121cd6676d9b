"""Features of long records are rows of token ids, made with the tokenizer of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastbert.text.encoding import template_of
from fastbert.text.offsets import TokenizedText, n_special_tokens, pack, tokenize


class RowMaker:
    """A RowMaker tokenizes texts with their offsets, and makes rows from windows of their tokens.

    tokenizer: a fast tokenizer of transformers. pair: whether a row holds two texts. Special tokens in a text are
    treated as text. Raises ValueError for a tokenizer without offsets.
    """

    def __init__(self, tokenizer: Any, pair: bool) -> None:
        from tokenizers import Tokenizer as RustTokenizer

        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"model: its tokenizer, {type(tokenizer).__name__}, gives no places in the text")
        # A copy, because truncation and padding are state of the original.
        rust = RustTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        self.rust, self.names = rust, tuple(tokenizer.model_input_names)
        self.template = template_of(rust.encode("a", "a" if pair else None), "token_type_ids" in self.names)
        self.n_special = n_special_tokens(self.template)
        self.before = n_special_tokens(self.template, int(pair))  # number of special tokens before the (second) text

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        """Returns the tokens of each text, without special tokens."""
        return tokenize(self.rust, texts)

    def rows(
        self, firsts: Sequence[Sequence[int]], seconds: Sequence[Sequence[int]] | None = None
    ) -> list[dict[str, Any]]:
        """Returns the inputs of forward for each row: input_ids, attention_mask and token_type_ids, lists of ints."""
        packed = pack(self.template, firsts, seconds)
        ids, types, ends = packed.input_ids.tolist(), packed.token_type_ids.tolist(), packed.cu_seqlens.tolist()
        rows = []
        for first, last in zip(ends, ends[1:], strict=False):
            row = {"input_ids": ids[first:last], "attention_mask": [1] * (last - first)}
            if "token_type_ids" in self.names:
                row["token_type_ids"] = types[first:last]
            rows.append(row)
        return rows
