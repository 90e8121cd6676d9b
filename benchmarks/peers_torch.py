"""PyTorch's own fast ways to run BERT are engines here: one SDPA backend each, varlen_attn, nested tensors."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.bench.engines import SDPA, Engine, Packed, Padded, flash_implementation, flash_obstacle

NO_GPU = "needs an NVIDIA GPU"
HALF = (torch.bfloat16, torch.float16)


class ForcedSDPA(SDPA):
    """This is transformers with only one backend of scaled_dot_product_attention."""

    backend: SDPBackend

    def obstacle(self) -> str | None:
        if self.source.device.type != "cuda":
            return NO_GPU
        return super().obstacle() or self._rejected()

    def _rejected(self) -> str | None:
        """Returns the reason why the backend refuses such queries, with a mask if batches have padding, or None."""
        config, device = self.source.config, self.source.device
        shape = (2, config.num_attention_heads, 64, config.head_size)
        q = torch.zeros(shape, dtype=self.source.dtype, device=device)
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool, device=device) if self.varied else None
        with warnings.catch_warnings(record=True) as told, sdpa_kernel(self.backend):
            warnings.simplefilter("always")
            try:
                F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
                return None
            except RuntimeError as error:
                reasons = [re.sub(r"\(Triggered internally.*", "", str(w.message), flags=re.DOTALL) for w in told]
                # The reasons contain headings, and the message that the other backends are switched off.
                noise = "kernel not used because", "runtime disabled"
                told_reasons = dict.fromkeys(r.strip() for r in reasons if not any(part in r for part in noise))
                return f"rejected: {' '.join(told_reasons) or str(error).strip()}"[:300]

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(self.backend):
            return super().hidden(ids, mask)


class FlashSDPA(ForcedSDPA):
    name = "transformers flash SDPA"
    backend = SDPBackend.FLASH_ATTENTION


class CudnnSDPA(ForcedSDPA):
    name = "transformers cuDNN SDPA"
    backend = SDPBackend.CUDNN_ATTENTION


class FlashAttention(SDPA):
    """This is transformers with FlashAttention-2, from flash-attn or PyPI's kernels, without padding in attention."""

    name = "transformers FlashAttention-2"
    always_masked = True  # without a mask it needs the information that nothing is padding

    def obstacle(self) -> str | None:
        if self.source.device.type != "cuda":
            return NO_GPU
        if self.source.dtype not in HALF:
            return f"FlashAttention takes bfloat16 and float16, not {self.dtype}"
        return super().obstacle() or flash_obstacle()

    def load(self) -> None:
        self.attention = flash_implementation()
        super().load()


class VarlenAttention(Packed):
    """This is BERT without padding in plain PyTorch: transformers' modules on (T, H), and varlen_attn between them."""

    name = "PyTorch varlen_attn"

    def obstacle(self) -> str | None:
        if self.source.device.type != "cuda":
            return NO_GPU
        if self.source.dtype not in HALF:
            return f"varlen_attn takes bfloat16 and float16, not {self.dtype}"
        try:
            from torch.nn.attention import varlen  # noqa: F401
        except ImportError:
            return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
        return super().obstacle()

    def load(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self.attend = varlen_attn
        self.model = self.source.transformers()
        self.fused = []  # query, key and value of each layer in one product
        for layer in self.model.encoder.layer:
            three = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
            self.fused.append((torch.cat([x.weight for x in three]), torch.cat([x.bias for x in three])))

    def hidden(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = self.model.embeddings(input_ids=ids[None], position_ids=positions[None])[0]  # (T, H)
        heads = self.source.config.num_attention_heads
        for layer, (weight, bias) in zip(self.model.encoder.layer, self.fused, strict=True):
            q, k, v = F.linear(x, weight, bias).unflatten(1, (3, heads, -1)).unbind(1)  # (T, N, D) each
            context = self.attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest).flatten(1)
            x = layer.attention.output(context, x)
            x = layer.output(layer.intermediate(x), x)
        return x


class NestedTransformer(Padded):
    """This is nn.TransformerEncoder with BERT's weights. With a padding mask its fast path runs on nested tensors."""

    name = "PyTorch nn.TransformerEncoder"

    def obstacle(self) -> str | None:
        config = self.source.config
        if config.hidden_act not in ("gelu", "relu"):
            return f"the fast path has gelu and relu, not {config.hidden_act}"
        if config.num_attention_heads % 2:
            return f"the fast path needs an even number of heads, not {config.num_attention_heads}"
        return super().obstacle()

    def load(self) -> None:
        model, config = self.source.transformers(), self.source.config
        self.embeddings = model.embeddings
        layer = nn.TransformerEncoderLayer(
            config.hidden_size, config.num_attention_heads, config.intermediate_size, 0.0, config.hidden_act,
            config.layer_norm_eps, batch_first=True, device="meta",
        )  # fmt: skip
        encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, mask_check=False)  # these masks have its form
        state: dict[str, Any] = {}
        for i, layer_of_bert in enumerate(model.encoder.layer):
            attention = layer_of_bert.attention
            three = [getattr(attention.self, name) for name in ("query", "key", "value")]
            state[f"layers.{i}.self_attn.in_proj_weight"] = torch.cat([x.weight for x in three])
            state[f"layers.{i}.self_attn.in_proj_bias"] = torch.cat([x.bias for x in three])
            for name, module in (
                ("self_attn.out_proj", attention.output.dense), ("norm1", attention.output.LayerNorm),
                ("linear1", layer_of_bert.intermediate.dense), ("linear2", layer_of_bert.output.dense),
                ("norm2", layer_of_bert.output.LayerNorm),
            ):  # fmt: skip
                state[f"layers.{i}.{name}.weight"], state[f"layers.{i}.{name}.bias"] = module.weight, module.bias
        encoder.load_state_dict(state, assign=True)
        self.encoder = encoder.eval().requires_grad_(False)  # the fast path needs both
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage")

    def hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        padding = None if mask is None else mask == 0
        return self.encoder(self.embeddings(input_ids=ids), src_key_padding_mask=padding)


GPU_ENGINES: tuple[type[Engine], ...] = (FlashSDPA, CudnnSDPA, FlashAttention, VarlenAttention, NestedTransformer)
CPU_ENGINES: tuple[type[Engine], ...] = (NestedTransformer,)


def engines(device: torch.device) -> tuple[type[Engine], ...]:
    """Returns the engines for a device."""
    return GPU_ENGINES if device.type == "cuda" else CPU_ENGINES
