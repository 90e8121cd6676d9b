"""This module has the attributes and methods that transformers' tools use besides a call: embeddings, counts, names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastbert.checkpoint.config import BertConfig


class ModelAccess(nn.Module):
    """ModelAccess has names and methods of transformers' PreTrainedModel that Trainer, PEFT and pipelines use."""

    base_model_prefix = "bert"
    main_input_name = "input_ids"
    config_class = BertConfig
    framework = "pt"
    input_modalities = "text"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    is_parallelizable = False
    model_parallel = False
    _no_split_modules = ("BertLayer", "BertEmbeddings")
    _keys_to_ignore_on_save: Any = None
    _keys_to_ignore_on_load_missing: Any = None
    _keys_to_ignore_on_load_unexpected: Any = None
    _auto_class: Any = None
    name_or_path = ""

    if TYPE_CHECKING:
        config: BertConfig

        def tie_weights(self) -> None: ...

        def tied_pairs(self) -> dict[str, str]: ...

    @property
    def base_model(self) -> nn.Module:
        """The encoder; for BertModel this is the model itself."""
        return self._modules.get(self.base_model_prefix) or self

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Maps the further state-dict names of tied tensors to the tensors' own names."""
        return self.tied_pairs()

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        return self.tied_pairs() or None

    def can_generate(self) -> bool:
        """Is False, because encoders do not generate."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """Returns the module that maps token ids to vectors."""
        encoder: Any = self.base_model
        return encoder.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the module that maps token ids to vectors."""
        encoder: Any = self.base_model
        encoder.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the module that computes the logits of all tokens, or None without one."""
        return None

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the module that computes the logits of all tokens. Raises ValueError without one."""
        raise ValueError(f"{type(self).__name__} has no output embeddings")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of elements in the parameters; a tied parameter counts once."""
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if id(p) not in tables and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # Gradient checkpointing: activations inside a layer are computed again in the backward pass, and not kept.

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Tells whether the layers of the encoder keep no activations."""
        encoder: Any = self.base_model
        return encoder.encoder.gradient_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Lets each layer in training mode keep only its input, for less memory and about a third more time.

        activation_checkpointing_kwargs: for torch.utils.checkpoint.checkpoint; use_reentrant is False by default.
        every_n_layers: 2 selects every second layer, from the first one on. offload=True is a ValueError.
        """
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"every_n_layers: got {every_n_layers!r}, expected a positive int")
        if offload:
            raise ValueError("offload: got True, expected False: run the step under torch.autograd.graph.save_on_cpu()")
        encoder: Any = self.base_model
        encoder.encoder.gradient_checkpointing = True
        encoder.encoder.checkpointing = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        encoder.encoder.checkpointed_every = every_n_layers

    def activation_checkpointing_disable(self) -> None:
        """Lets the layers keep the tensors that the backward pass needs."""
        encoder: Any = self.base_model
        encoder.encoder.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Does the same as `activation_checkpointing_enable`, under its name in transformers 4."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Does the same as `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Makes the output of the word embeddings require gradients, by a hook."""
        self.disable_input_require_grads()
        hook = self.get_input_embeddings().register_forward_hook(_require_grads)
        self.__dict__["_require_grads_hook"] = hook

    def disable_input_require_grads(self) -> None:
        """Removes the hook of `enable_input_require_grads`."""
        hook = self.__dict__.pop("_require_grads_hook", None)
        if hook is not None:
            hook.remove()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Changes the vocabulary size of the model, its decoder and `config.vocab_size`.

        The remaining rows keep their numbers. New rows are the mean of the old ones (mean_resizing) or normal with
        standard deviation initializer_range; new biases are 0. Returns the input embeddings. Raises TypeError if they
        are no nn.Embedding, for example an adapter.
        """
        table = self.get_input_embeddings()
        if type(table) is not nn.Embedding:
            raise TypeError(f"resize_token_embeddings: expected nn.Embedding, got a {type(table).__name__}")
        n_words = table.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            n_words = -(-n_words // pad_to_multiple_of) * pad_to_multiple_of
        if new_num_tokens is None and pad_to_multiple_of is None or n_words == table.num_embeddings:
            return table
        padding_idx = table.padding_idx if table.padding_idx is None or table.padding_idx < n_words else None
        weight = nn.Parameter(self._more_rows(table.weight, n_words, mean_resizing), table.weight.requires_grad)
        resized = nn.Embedding(n_words, table.embedding_dim, padding_idx, device="meta")
        resized.weight = weight
        self.set_input_embeddings(resized.train(table.training))
        self._resize_decoder(n_words, mean_resizing)
        self.config.vocab_size = n_words
        self.tie_weights()
        return self.get_input_embeddings()

    def _resize_decoder(self, n_words: int, mean_resizing: bool) -> None:
        """Does nothing in a model without a decoder."""

    def _more_rows(self, old: Tensor, n_rows: int, mean_resizing: bool) -> Tensor:
        new = old.new_empty(n_rows, *old.shape[1:])
        kept = min(n_rows, len(old))
        with torch.no_grad():
            new[:kept] = old[:kept]
            if old.dim() == 1:
                new[kept:] = 0
            elif mean_resizing:
                new[kept:] = old.float().mean(0).to(old.dtype)
            else:
                new[kept:].normal_(0.0, self.config.initializer_range)
        return new


def _require_grads(module: nn.Module, inputs: Any, output: Any) -> None:
    output.requires_grad_(True)
