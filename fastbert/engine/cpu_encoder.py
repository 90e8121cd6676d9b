"""A model's encoder in one call of a C++ kernel, on CPUs, for inference.

A short text on a CPU waits for Python more than for the processor: a hundred operations, each checked, dispatched and
given memory. Where nothing of that is needed, since no gradient is wanted, no module is an adapter, and nobody listens
or wants the states in between, `CpuEncoder` runs it all at once. Elsewhere the model runs operation by operation.

With precision="int8" its linears multiply 8-bit operands, on processors with AVX-512 VNNI: weights with a scale for
each output channel, rows with a scale and an offset each. That path gives the states in between as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import attention, dispatch, packed_linear
from fastbert.ops.packing import PackedBatch
from fastbert_kernels import cpu

# A processor with matrix units runs more bfloat16 rows than these faster in oneDNN.
ROWS_WITHOUT_AMX = 64
# In float32 F.linear is the more exact one on up to three rows (packed_linear.LEAST_ROWS), below this hidden size by
# more than the numerical policy allows.
EXACT_FROM = 320
# Workspaces kept for the next batch: memory that is new to the process costs a page fault every 4 KiB.
MOST_KEPT, LARGEST_KEPT = 2, 64 * 2**20  # how many, bytes


def obstacle(config: Any, dtype: torch.dtype, policy: ops.Policy, device: torch.device) -> str | None:
    """Why models of this configuration run operation by operation on this device, whatever their state; or None."""
    if device.type != "cpu":
        return f"the model is on {device}"
    backend = dispatch.decide("linear", policy, device, None).backend
    if backend != "cpu":
        return f"the backend is {backend!r}"
    if not cpu.multiplies(dtype):
        return cpu.unavailable() or f"the C++ kernels do not multiply {dtype} on this processor"
    if config.hidden_size > cpu.MAX_HIDDEN:
        return f"hidden size {config.hidden_size} is above {cpu.MAX_HIDDEN}"
    if dtype == torch.bfloat16 and config.intermediate_size % 2:  # which is multiplied in pairs
        return f"intermediate size {config.intermediate_size} is odd"
    if ops.ACTIVATIONS.get(config.hidden_act) not in cpu.ACTIVATIONS:
        return f"there is no C++ kernel for {config.hidden_act!r}"
    return attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 in hardware, and something here that makes use of it."""
    return cpu.multiplies(torch.bfloat16) or (cpu.has_amx() and packed_linear.unavailable(torch.bfloat16) is None)


def invariant_obstacle(config: Any, dtype: torch.dtype) -> str | None:
    """Why models of this configuration are not batch-invariant on this CPU, by one call or by operations; or None."""
    for size in {config.embedding_width, config.hidden_size, config.intermediate_size}:
        why_not = packed_linear.no_invariant_product(dtype, size)
        if why_not is not None:
            return why_not
    return attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))


def narrow(model: Any, asked: Any) -> None:
    """For inference on a CPU that has bfloat16 in hardware: a float32 model becomes bfloat16 if dtype="auto" was asked.

    A model that is to be trained, or saved, stays as it is stored: only encoders of text call this.
    """
    policy = model.policy
    if asked != "auto" or model.dtype != torch.float32 or model.device.type != "cpu":
        return
    if policy.backend not in ("auto", "cpu") or model.precision is not None:
        return
    if policy.batch_invariant and invariant_obstacle(model.config, torch.bfloat16) is not None:
        return
    if multiplies_bfloat16():
        model.to(torch.bfloat16)
        why = "dtype='auto' took bfloat16, which this processor has in hardware"
        model.dtype_choice = f"{why}; dtype='float32' is exact"


def int8_obstacle(config: Any, dtype: torch.dtype) -> str | None:
    """Why models of this configuration have no 8-bit kernels on this CPU, whatever their state; or None.

    Beside what fastbert.ops.quantized.obstacle says of the sizes.
    """
    why_not = cpu.no_int8()
    if why_not is None and dtype not in (torch.float32, torch.bfloat16):
        why_not = f"the C++ kernels do not multiply 8-bit operands for models in {dtype}"
    return why_not or attention.cpu_obstacle(config.head_size, torch.empty(0, dtype=dtype, device="cpu"))


class CpuEncoder:
    """Keeps the weights as the kernel reads them, until `key` says that they changed."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Any] = (None, None)
        self._workspaces: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": (None, None), "_workspaces": []}

    def clear(self) -> None:
        """Takes the weights anew when it next runs."""
        self._kept = (None, None)
        self._workspaces = []

    def takes_rows(self, n_rows: int, dtype: torch.dtype, hidden_size: int) -> bool:
        """Whether so many rows are best here."""
        if n_rows == 0:
            return False
        if dtype == torch.float32 and n_rows < packed_linear.LEAST_ROWS and hidden_size < EXACT_FROM:
            return False
        return not (dtype == torch.bfloat16 and n_rows > ROWS_WITHOUT_AMX and cpu.has_amx())

    def weights(self, key: Any, renewed: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """What `make` made, the last time that the key changed. renewed: gives the key under which that is kept."""
        kept = self._kept
        if kept[0] != key:
            kept = self._kept = renewed(), make()
        return kept[1]

    def run(
        self,
        weights: cpu.Encoder,
        batch: PackedBatch,
        ids: tuple[Tensor, Tensor | None, Tensor] | None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Words, token types and positions, (T,) int64 within their tables -> the last hidden state, (T, H).

        Where ids is None, embedded, (T, H), takes their place, and is written to.
        """
        dtype = weights.dtype
        if embedded is None:
            embedded = torch.empty(batch.n_tokens, weights.hidden_size, dtype=dtype, device="cpu")
        x = embedded.contiguous()
        workspace = self._take(weights.workspace_size(batch.n_tokens), dtype)
        cpu.encoder_forward(weights, _contiguous(ids), x, batch.cu_seqlens_cpu, workspace)
        self._keep(workspace)
        return x

    def run_int8(
        self,
        weights: cpu.Int8Encoder,
        batch: PackedBatch,
        given: tuple[Tensor, Tensor | None, Tensor] | Tensor,
        dtype: torch.dtype,
        keep_states: bool,
    ) -> list[Tensor]:
        """Words, token types and positions as for `run`, or the embeddings (T, H) -> the last hidden state (T, H) as a
        list, or all L + 1 of them."""
        n_states = len(weights.layers) + 1 if keep_states else 1
        states = torch.empty(n_states, batch.n_tokens, weights.hidden_size, dtype=dtype, device="cpu")
        ids = None
        if isinstance(given, Tensor):
            states[0] = given
        else:
            ids = _contiguous(given)
        workspace = self._take(weights.workspace_size(batch.n_tokens, dtype), torch.uint8)
        cpu.encoder_int8_forward(weights, ids, states, batch.cu_seqlens_cpu, workspace)
        self._keep(workspace)
        return list(states)

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        try:
            workspace = self._workspaces.pop()  # another thread may have taken it
        except IndexError:
            workspace = torch.empty(0, dtype=dtype, device="cpu")
        if workspace.numel() < size or workspace.dtype != dtype:
            workspace = torch.empty(size, dtype=dtype, device="cpu")
        return workspace

    def _keep(self, workspace: Tensor) -> None:
        if len(self._workspaces) < MOST_KEPT and workspace.nbytes <= LARGEST_KEPT:
            self._workspaces.append(workspace)


def _contiguous(ids: tuple[Tensor, Tensor | None, Tensor] | None) -> tuple[Tensor, Tensor | None, Tensor] | None:
    if ids is None:
        return None
    words, types, positions = ids
    return words.contiguous(), None if types is None else types.contiguous(), positions.contiguous()


def gather(embeddings: Any, layers: Any, config: Any, fused_qkv: Callable[[Any], Any], int8: bool = False) -> Any:
    """The weights of plain modules, packed; None where they are not of one dtype, in order and on the CPU.

    embeddings: None where they are made elsewhere. int8: as a cpu.Int8Encoder, not a cpu.Encoder.
    """
    norms: list[Any] = []
    read: list[Any] = []
    if embeddings is not None:
        types, norm = embeddings.token_type_embeddings, embeddings.LayerNorm
        read = [embeddings.word_embeddings.weight, None if types is None else types.weight]
        read += [embeddings.position_embeddings.weight, norm.weight, norm.bias]
        norms = [norm]
    gathered = []
    for layer in layers:
        parts = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
        weight, bias = fused_qkv(layer.attention.self)
        out, up, down = ((part.weight, part.bias) for part in parts)
        norm, last = ((n.weight, n.bias) for n in norms[-2:])
        gathered.append((weight, bias, *out, *norm, *up, *down, *last))
    if not gathered:
        return None
    everything = [t for i, t in enumerate(read) if i != 1 or t is not None] + [t for layer in gathered for t in layer]
    dtype = everything[0].dtype
    if any(t is None or t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous() for t in everything):
        return None
    if any(t.is_inference() for t in everything) or len({norm.eps for norm in norms}) > 1:
        return None
    activations = {layer.intermediate.activation for layer in layers}
    return (cpu.Int8Encoder if int8 else cpu.Encoder)(
        embeddings=tuple(None if t is None else t.detach() for t in read),
        layers=tuple(_in_8_bits(layer) if int8 else _packed(layer) for layer in gathered),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        activation=activations.pop(),
        eps=norms[0].eps,
    )


def _packed(layer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(packed_linear.packed_by_kernel(t) if i in (0, 2, 6, 8) else t.detach() for i, t in enumerate(layer))


def _in_8_bits(layer: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Each of the four weights and the bias after it as one."""
    with torch.inference_mode(False), torch.no_grad():
        made: list[Any] = [t.detach() for t in layer]
        for i, rotated in ((8, False), (6, True), (2, True), (0, True)):  # GELU's rows are not rotated
            q = ops.quantized.quantize_weight(made[i], "int8", rotated=rotated)
            made[i : i + 2] = [cpu.pack_int8(q.data, q.scale[:, 0], made[i + 1].float())]
    return tuple(made)
