"""`Work` runs one job of `fastbert tune`: candidates, plain PyTorch and float64 on the same inputs.

T tokens, H hidden, D head size, K and M the sizes of a weight (M, K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from fastbert.ops import quantized
from fastbert.tune.candidates import Candidate
from fastbert.tune.jobs import Job

# Sequence lengths for timing attention, repeated up to the number of tokens.
LENGTHS = (20, 512, 60, 128, 300)
EPS = 1e-12
QUANTIZED = "quantized_gemm", "quantized_gated_gemm"

Call = Callable[[], Tensor]


class Work:
    """A Work is a job with inputs for n_tokens tokens, a call for each candidate, and the right result."""

    def __init__(self, job: Job, n_tokens: int, device: torch.device, seed: int = 0) -> None:
        self.job, self.n_tokens, self.device = job, n_tokens, device
        self.generator = torch.Generator().manual_seed(seed)
        if job.op in QUANTIZED:
            k, m = job.sizes
            m = 2 * m if job.op == "quantized_gated_gemm" else m
            precision = "int8" if job.dtype == torch.int8 else "fp8"
            self.x = self._random(n_tokens, k)
            self.weight, self.bias = self._random(m, k, scale=k**-0.5), self._random(m)
            self.q_x = quantized.quantize(self.x, precision, job.group)
            self.q_weight = quantized.quantize_weight(self.weight, precision)
            self.out_scale: Tensor | None = None
        elif job.op in ("gemm", "few_rows"):
            k, m = job.sizes
            self.x = self._random(n_tokens, k)
            self.weight, self.bias = self._random(m, k, scale=k**-0.5), self._random(m)
            if job.epilogue == "residual":
                self.residual = self._random(n_tokens, m)
                self.ln_weight, self.ln_bias = self._random(m), self._random(m)
        else:
            n_heads, d = job.sizes
            self.qkv = self._random(n_tokens, 3 * n_heads * d)
            self.cu_seqlens = _offsets(n_tokens)

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.job.out_dtype)

    def call(self, candidate: Candidate) -> Call:
        """Returns a call of the candidate on these inputs, including the separate GELU or LayerNorm it needs."""
        if self.job.op == "attention":
            return self._attention(candidate)
        if self.job.op == "quantized_gemm":
            return self._quantized(candidate)
        if self.job.op == "quantized_gated_gemm":
            return self._gated(candidate)
        if candidate.kernel == "cublas":
            return self._cublas()
        return self._with_gate(candidate) if self.job.epilogue == "gated" else self._ours(candidate)

    def _cublas(self) -> Call:
        from fastbert_kernels.gated import gated_forward
        from fastbert_kernels.gelu import bias_gelu_forward
        from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward

        x, weight, bias = self.x, self.weight, self.bias
        if self.job.epilogue == "gelu":
            return lambda: bias_gelu_forward(F.linear(x, weight), bias, "gelu")
        if self.job.epilogue == "gated":
            return lambda: gated_forward(F.linear(x, weight, bias), "gelu")
        if self.job.epilogue == "residual":
            after = self.residual, self.ln_weight, self.ln_bias, EPS
            return lambda: bias_residual_layer_norm_forward(F.linear(x, weight), bias, *after)
        return lambda: F.linear(x, weight, bias)

    def _ours(self, candidate: Candidate) -> Call:
        from fastbert_kernels.few_rows import split_of
        from fastbert_kernels.layer_norm import bias_residual_layer_norm_forward
        from fastbert_kernels.linear import linear_pointer_forward
        from fastbert_kernels.linear_persistent import linear_persistent_forward
        from fastbert_kernels.linear_specialized import linear_specialized_forward
        from fastbert_kernels.split_linear import split_linear_layer_norm_forward

        if candidate.kernel == "split_linear":
            inputs, split = (self.x, self.weight, self.bias, self.residual), split_of(candidate.sizes)
            return lambda: split_linear_layer_norm_forward(*inputs, self.ln_weight, self.ln_bias, EPS, split)
        forward: Any = {
            "linear": linear_pointer_forward,
            "linear_persistent": linear_persistent_forward,
            "linear_specialized": linear_specialized_forward,
        }[candidate.kernel]
        residual = self.residual if self.job.epilogue == "residual" else None
        activation = "gelu" if self.job.epilogue == "gelu" else "none"
        x, weight, bias, sizes = self.x, self.weight, self.bias, candidate.sizes

        def run() -> Tensor:
            out = x.new_empty(x.shape[0], weight.shape[0])
            forward(x, weight, bias, activation, residual, sizes, out)
            if residual is None:
                return out
            return bias_residual_layer_norm_forward(out, None, None, self.ln_weight, self.ln_bias, EPS)

        return run

    def _with_gate(self, candidate: Candidate) -> Call:
        from fastbert_kernels.gated_linear import gated_linear_pointer_forward
        from fastbert_kernels.gated_linear_persistent import gated_linear_persistent_forward

        persistent = candidate.kernel == "linear_persistent"
        forward: Any = gated_linear_persistent_forward if persistent else gated_linear_pointer_forward
        x, weight, bias, sizes = self.x, self.weight, self.bias, candidate.sizes
        return lambda: forward(x, weight, bias, "gelu", sizes, x.new_empty(x.shape[0], weight.shape[0] // 2))

    def _quantized(self, candidate: Candidate) -> Call:
        from fastbert_kernels import launch
        from fastbert_kernels.quantized_linear import quantized_linear_pointer_forward, sums_outside
        from fastbert_kernels.quantized_linear_persistent import quantized_linear_persistent_forward
        from fastbert_kernels.quantized_linear_specialized import quantized_linear_specialized_forward

        forward: Any = {
            "quantized_linear": quantized_linear_pointer_forward,
            "quantized_linear_persistent": quantized_linear_persistent_forward,
            "quantized_linear_specialized": quantized_linear_specialized_forward,
        }[candidate.kernel]
        x, weight, quantizes = self.q_x, self.q_weight, self.job.epilogue == "gelu"
        inputs = *x, weight.data, weight.scale.flatten(), self.bias, self.job.epilogue, candidate.sizes
        n_rows, n_cols = x.data.shape[0], weight.data.shape[0]
        outside = sums_outside(x.data.dtype, launch.arch(self.device))

        def run() -> Tensor:
            out = x.data.new_empty(n_rows, n_cols, dtype=None if quantizes else self.job.out_dtype)
            self.out_scale = x.scale.new_empty(n_rows, -(-n_cols // quantized.OUT_GROUP)) if quantizes else None
            return forward(*inputs, out, self.out_scale, outside)

        return run

    def _gated(self, candidate: Candidate) -> Call:
        from fastbert_kernels import launch
        from fastbert_kernels.quantized_gated_linear import quantized_gated_linear_pointer_forward
        from fastbert_kernels.quantized_gated_linear_persistent import quantized_gated_linear_persistent_forward
        from fastbert_kernels.quantized_linear import sums_outside

        forward: Any = {
            "quantized_gated_linear": quantized_gated_linear_pointer_forward,
            "quantized_gated_linear_persistent": quantized_gated_linear_persistent_forward,
        }[candidate.kernel]
        x, weight = self.q_x, self.q_weight
        inputs = x.data, x.scale, weight.data, weight.scale.flatten(), self.bias, "gelu", candidate.sizes
        n_rows, n_cols = x.data.shape[0], self.job.sizes[1]
        outside = sums_outside(x.data.dtype, launch.arch(self.device))

        def run() -> Tensor:
            out = x.data.new_empty(n_rows, n_cols)
            self.out_scale = x.scale.new_empty(n_rows, -(-n_cols // quantized.OUT_GROUP))
            forward(*inputs, out, self.out_scale, outside)
            return out

        return run

    def result(self, candidate: Candidate) -> Tensor:
        """Returns the result of the candidate; an 8-bit result is dequantised."""
        out = self.call(candidate)()
        if self.job.op not in QUANTIZED or self.out_scale is None:
            return out
        return quantized.dequantize(quantized.Quantized(out, self.out_scale, min(quantized.OUT_GROUP, out.shape[1])))

    def _attention(self, candidate: Candidate) -> Call:
        from fastbert_kernels import configs, launch
        from fastbert_kernels.attention import varlen_attention_forward
        from fastbert_kernels.work_list import build_work_list

        n_heads, d = self.job.sizes
        block_d = configs.attention_config(self.job.dtype, d, launch.arch(self.device)).block_sizes["BLOCK_D"]
        sizes = {**candidate.sizes, "BLOCK_D": block_d}
        work_list = build_work_list(self.cu_seqlens, sizes["BLOCK_Q"], not sizes.get("WARP_SPECIALIZE")).to(self.device)
        arguments = self.qkv, work_list, n_heads, d**-0.5
        return lambda: varlen_attention_forward(*arguments, config=sizes)

    def eager(self) -> Tensor:
        """Returns the result of plain PyTorch in the same dtype, whose error bounds that of every candidate."""
        if self.job.op in QUANTIZED:
            y = self._plain_quantized(torch.float32)
            if self.job.epilogue in ("gelu", "gated"):
                return quantized.dequantize(quantized.quantize(y, self.q_x.precision, quantized.OUT_GROUP))
            return y.to(self.job.out_dtype)
        return self._plain(self.job.dtype)

    def exact(self) -> Tensor:
        """Returns the right result in float64; for 8-bit operands, the result is not quantised."""
        return self._plain_quantized(torch.float64) if self.job.op in QUANTIZED else self._plain(torch.float64)

    def _plain_quantized(self, dtype: torch.dtype) -> Tensor:
        x, weight = (quantized.dequantize(q).to(dtype) for q in (self.q_x, self.q_weight))
        y = F.linear(x, weight, self.bias.to(dtype))
        if self.job.epilogue == "gated":
            first, second = y.chunk(2, 1)
            return F.gelu(first) * second
        return F.gelu(y) if self.job.epilogue == "gelu" else y

    def _plain(self, dtype: torch.dtype) -> Tensor:
        if self.job.op == "attention":
            return self._plain_attention(dtype)
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        y = F.linear(x, weight, bias)
        if self.job.epilogue == "gelu":
            return F.gelu(y)
        if self.job.epilogue == "gated":
            first, second = y.chunk(2, 1)
            return F.gelu(first) * second
        if self.job.epilogue == "residual":
            residual, ln_weight, ln_bias = (t.to(dtype) for t in (self.residual, self.ln_weight, self.ln_bias))
            return F.layer_norm(y + residual, (y.shape[1],), ln_weight, ln_bias, EPS)
        return y

    def _plain_attention(self, dtype: torch.dtype) -> Tensor:
        n_heads, _ = self.job.sizes
        return reference.varlen_attention(self.qkv.to(dtype), torch.tensor(self.cu_seqlens), n_heads)


def _offsets(n_tokens: int) -> list[int]:
    """Returns (B + 1,) offsets of sequences with the lengths LENGTHS, repeated up to n_tokens in total."""
    offsets = [0]
    while offsets[-1] < n_tokens:
        offsets.append(min(n_tokens, offsets[-1] + LENGTHS[(len(offsets) - 1) % len(LENGTHS)]))
    return offsets
