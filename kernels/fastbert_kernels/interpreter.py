"""This module corrects Triton's interpreter, so that it computes the same numbers as a compiled kernel.

The interpreter (TRITON_INTERPRET=1) runs kernels on the CPU with numpy. numpy has no bfloat16, so the interpreter keeps
bit patterns as uint16. In Triton 3.6 to 3.9 it truncates float32 to bfloat16 where the hardware rounds, and multiplies
the bit patterns as integers in tl.dot. It rounds float32 to float8 wrongly if the mantissa carries into the exponent.
Triton 3.6 reads loop bounds in a way that numpy 2.4 refuses. numpy's matrix product sums a row in an order that depends
on its place in the matrix. Tensor cores do not do this, and tests could not check that a row has the same bits at any
place. This module corrects all five. Nothing changes outside the interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fastbert_kernels import interpreter_speed

ACTIVE = bool(triton.knobs.runtime.interpret)
QUICKENED: dict[str, bool] = {}  # the changes of interpreter_speed -> whether each fits this Triton


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even, in uint16 bit patterns. A NaN stays a (quiet) NaN."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _to_float8(x: np.ndarray) -> np.ndarray:
    """Rounds float32 to float8_e4m3fn to nearest, ties to even, in uint8 bit patterns. Above 448: 448, as on a GPU."""
    clamped = torch.from_numpy(np.ascontiguousarray(x)).clamp(-448.0, 448.0)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _install() -> None:
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, patch_tensor = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor
    fp_to_fp = builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return handle(_to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return handle(_to_float32(src.data), target)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            return handle(_to_float8(src.data), tl.float8e4nv)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_to_float32(x.data), tl.float32) for x in (a, b))
        acc = args[0]
        if a.data.ndim != 2 or a.data.dtype not in (np.float16, np.float32) or acc.data.dtype != np.float32:
            return dot(self, a, b, *args)
        # Each row has its own product, (rows, 1, K) @ (K, columns), with the same order of sums.
        rows, columns = (x.data.astype(np.float32, copy=False) for x in (a, b))
        return handle(np.matmul(rows[:, None, :], columns)[:, 0] + acc.data, acc.dtype.scalar)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    interpreter._patch_lang_tensor = patch_lang_tensor
    QUICKENED.update(interpreter_speed.install(interpreter))


if ACTIVE:
    _install()
