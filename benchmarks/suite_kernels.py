"""The kernel suite compares each fused operation with eager PyTorch, torch.compile and the best library kernel.

On a GPU it runs T tokens in the shapes of three models, with device events, L2 overwritten before each sample, and
inputs that rotate. On a CPU it is short: the cpu backend on packed tokens against PyTorch on the padded batch. It runs
forward only; the train suite has attention's backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import workloads
from kernel_ops import OPS, Attention, LinearGelu, Op, Shape
from suites import Built, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.bench.devices import fast_at_bfloat16
from fastbert.bench.peers import OURS, Peer
from fastbert.ops import packing

SUITE = "kernels"
EAGER = "PyTorch eager"
MODELS = {"BERT-base": (768, 3072, 12), "BERT-large": (1024, 4096, 16), "MiniLM": (384, 1536, 12)}  # H, I, N
WEIGHT = 0.4  # weight of a case; those of models have about 1
INPUT_SETS = 2
CHECKED = 4  # sequences at either end whose output is checked; the operations' own tests check everything
CPU_TOKENS = 2048

# (model, tokens, dtype), the most informative first, because a run may end before the last one.
CUDA_ROUNDS = (
    ("BERT-base", 16384, "bfloat16"),
    ("BERT-large", 16384, "bfloat16"),
    ("BERT-base", 65536, "bfloat16"),
    ("MiniLM", 16384, "bfloat16"),
    ("BERT-large", 65536, "bfloat16"),
    ("MiniLM", 65536, "bfloat16"),
    ("BERT-base", 16384, "float16"),
    ("BERT-base", 16384, "float32"),
)
CUDA_LENGTHS = {Attention.name: ("S512", "S128", "squad", "queries")}
CPU_LENGTHS = {Attention.name: ("squad", "S128")}


class Contender(Peer):
    """A Contender is a function on rotating inputs. pick: the checked part of its output. compiled: torch.compile."""

    def __init__(
        self,
        name: str,
        run: Callable[..., Tensor],
        sets: Sequence[tuple[Tensor, ...]],
        pick: Callable[[Tensor], Tensor],
        *,
        missing: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.name = name
        self._run, self._sets, self._pick, self._missing, self._compiled = run, sets, pick, missing, compiled

    def obstacle(self) -> str | None:
        return self._missing

    def prepare(self) -> None:
        if self._compiled:
            self._run = torch.compile(self._run, dynamic=False)
        self.run(0)

    @torch.inference_mode()
    def run(self, i: int) -> Tensor:
        return self._run(*self._sets[i % len(self._sets)])

    def output(self) -> Tensor:
        return self._pick(self.run(0))


def cases(device_type: str) -> list[Case]:
    """Returns the cases for "cuda" or "cpu", the most important first."""
    if device_type == "cuda":
        return [
            _case(device_type, op, model, tokens, dtype, lengths)
            for model, tokens, dtype in CUDA_ROUNDS
            for op, lengths in _variants(CUDA_LENGTHS, "S512")
        ]
    return [
        _case(device_type, op, model, CPU_TOKENS, dtype, lengths)
        for model, dtype in (("BERT-base", "float32"), ("BERT-base", "bfloat16"))
        if dtype == "float32" or fast_at_bfloat16(torch.device("cpu"))
        for op, lengths in _variants(CPU_LENGTHS, "squad")
    ]


def lengths_of(kind: str, tokens: int) -> tuple[int, ...]:
    """Returns sequences of `tokens` in all: "S512" (all of one length), "squad" or "queries" (see workloads)."""
    if kind.startswith("S"):
        return (int(kind[1:]),) * (tokens // int(kind[1:]))
    drawn = workloads.squad if kind == "squad" else workloads.queries
    taken: list[int] = []
    for length in drawn(tokens).lengths:
        taken.append(min(length, tokens - sum(taken)))
        if sum(taken) == tokens:
            break
    return tuple(taken)


def build(
    op_type: type[Op], sizes: tuple[int, int, int], lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Built:
    """Builds the contest of one operation on sequences of these lengths."""
    torch.manual_seed(0)
    shape = Shape(*sizes, lengths, dtype, device)
    op = op_type(shape)
    weights = op.weights()
    packed = [op.activations() for _ in range(INPUT_SETS)]
    padded = [tuple(packing.pad(x, shape.batch) for x in tensors) for tensors in packed]
    whole = [(*tensors, *weights) for tensors in packed]
    whole_padded = [(*tensors, *weights) for tensors in padded]

    checked = list(range(len(lengths)))
    if len(lengths) > 2 * CHECKED:
        checked = checked[:CHECKED] + checked[-CHECKED:]
    cu_seqlens = shape.batch.cu_seqlens_cpu
    rows = torch.cat([torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) for i in checked]).to(device)
    offsets = torch.tensor([0, *(lengths[i] for i in checked)]).cumsum(0)
    exact = op.exact(offsets, *(_double(x[rows]) for x in packed[0]), *(_double(x) for x in weights))

    def pick(out: Tensor) -> Tensor:  # from (T, ...), (B, S, ...) or, per sequence, (B, ...)
        if op.per_sequence:
            return out[checked]
        return out[rows] if out.shape[0] == shape.n_tokens else packing.pack(out, shape.batch)[rows]

    peers: list[Peer] = [
        Contender(OURS, op.ours, whole, pick),
        Contender(EAGER, op.eager, whole_padded, pick),
    ]
    if device.type == "cuda":
        peers.append(Contender("torch.compile", op.eager, whole_padded, pick, compiled=True))
    peers += library_peers(op, whole, whole_padded, pick)
    waste = 1.0 - shape.n_tokens / shape.mask.numel()
    work = op.work(*whole[0])
    extra = {
        "batch": len(lengths),
        "length": max(lengths),
        "kernel_tokens": shape.n_tokens,
        "padding_waste": waste,
        "flops": work.flops,
        "bytes": work.n_bytes,
    }
    timing = {"flush_l2": True} if device.type == "cuda" else {"min_sample_seconds": 0.01}
    return Built(peers, EAGER, exact, work=work, extra=extra, timing=timing)


def library_peers(
    op: Op,
    packed: Sequence[tuple[Tensor, ...]],
    padded: Sequence[tuple[Tensor, ...]],
    pick: Callable[[Tensor], Tensor],
) -> Iterator[Peer]:
    """Returns the best library kernels for an operation, beyond those that eager PyTorch calls."""
    shape = op.shape
    on_cpu = "needs an NVIDIA GPU" if shape.device.type == "cpu" else None
    if isinstance(op, LinearGelu) and on_cpu is None:
        # The GELU in cuBLASLt's epilogue is the tanh form. It is not BERT's function, but near enough for a peer.
        yield Contender("cuBLASLt tanh GELU", _addmm_gelu, packed, pick)
    if not isinstance(op, Attention):
        return
    yield Contender("SDPA", op.sdpa, padded, pick)
    if on_cpu is not None:
        return
    unequal = None if shape.equal else "takes no mask: needs sequences of equal length"
    half = None if shape.dtype in (torch.bfloat16, torch.float16) else f"takes no {shape.dtype}"
    for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
        run = functools.partial(_forced, op.sdpa, backend)
        yield Contender(name, run, padded, pick, missing=half or (unequal if name == "SDPA flash" else None))
    yield Contender("varlen_attn", op.varlen_attn, packed, pick, missing=half or _no_varlen_attn())


def warm(device: torch.device, model: str, dtype: str) -> None:
    """Runs each kernel of a model once on a few tokens, to compile it."""
    for op in OPS.values():
        shape = Shape(*MODELS[model], (40, 24), getattr(torch, dtype), device)
        instance = op(shape)
        with torch.inference_mode():
            instance.ours(*instance.activations(), *instance.weights())
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _variants(by_op: dict[str, tuple[str, ...]], default: str) -> Iterator[tuple[type[Op], str]]:
    for op in OPS.values():
        for lengths in by_op.get(op.name, (default,)):
            yield op, lengths


def _case(device_type: str, op: type[Op], model: str, tokens: int, dtype: str, lengths: str) -> Case:
    def made(device: torch.device) -> Built:
        return build(op, MODELS[model], lengths_of(lengths, tokens), getattr(torch, dtype), device)

    return Case(
        SUITE, f"{op.name}, {tokens} tokens, {lengths}", model, dtype, device_type, op.needs, made, weight=WEIGHT
    )


def _addmm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _forced(sdpa: Callable[[Tensor], Tensor], backend: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(qkv)


def _no_varlen_attn() -> str | None:
    try:
        from torch.nn.attention import varlen as _  # noqa: F401
    except ImportError:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
