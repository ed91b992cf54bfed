"""Causal attention, its backward, attention to a key-value cache; `attention.cu` has the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mhmoe_np.operations.cuda.device import Kernels, blocks, steps_of, strided
from mhmoe_np.operations.cuda.rotary import Rotary
from mhmoe_np.types import FloatArray, IntArray

LANES, THREADS = 16, 256  # as in attention.cu: a block is 16 x 16 threads
SPLIT = 128  # positions of a cache that one block attends to
DOT_ROWS = 8  # of a block of attention_dots: one for each warp
WIDTHS = (32, 64, 128, 256)  # that the kernels are compiled for
VECTOR_BYTES = 16
KERNELS = Kernels("attention")


class Attention(Rotary):
    """See `Operations`: attention."""

    def attention(
        self, q_BTAC: FloatArray, k_BSGC: FloatArray, v_BSGC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """See `Operations.attention`."""
        B, T, A, C = q_BTAC.shape
        S, G = k_BSGC.shape[1:3]
        real = q_BTAC.dtype
        out_BTAC, log_sum_exp_BAT = self.empty((B, T, A, C), real), self.empty((B, A, T), real)
        views = q_BTAC, k_BSGC, v_BSGC
        arrays = *_arguments(*views), out_BTAC, log_sum_exp_BAT
        width, numbers = _width(C), (B, T, S, A, G, C, _aligned(*views), C**-0.5)
        grid = (B * A * blocks(T, _forward_rows(width, real)),)
        KERNELS.launch(f"attention_{width}", real, grid, (THREADS,), *arrays, *numbers)
        return out_BTAC, log_sum_exp_BAT

    def attention_backward(
        self,
        dout_BTAC: FloatArray,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        out_BTAC: FloatArray,
        log_sum_exp_BAT: FloatArray,
        dq_BTAC: FloatArray,
        dk_BTGC: FloatArray,
        dv_BTGC: FloatArray,
    ) -> None:
        """See `Operations.attention_backward`."""
        B, T, A, C = q_BTAC.shape
        G, real, width = k_BTGC.shape[2], q_BTAC.dtype, _width(C)
        dot_BAT = self.empty((B, A, T), real)
        grid = (blocks(B * T * A, DOT_ROWS),)
        KERNELS.launch(
            "attention_dots", real, grid, (THREADS,), dout_BTAC, out_BTAC, B, T, A, C, dot_BAT
        )
        views = q_BTAC, k_BTGC, v_BTGC
        arrays = *_arguments(*views), dout_BTAC, log_sum_exp_BAT, dot_BAT
        given = *arrays, B, T, A, G, C, _aligned(*views, dout_BTAC), C**-0.5
        tiles = blocks(T, _backward_rows(real))
        KERNELS.launch(
            f"query_gradient_{width}", real, (B * A * tiles,), (THREADS,), *given, *_arguments(dq_BTAC)
        )
        KERNELS.launch(
            f"key_value_gradient_{width}",
            real,
            (B * G * tiles,),
            (THREADS,),
            *given,
            *_arguments(dk_BTGC, dv_BTGC),
        )

    def attention_with_cache(
        self,
        q_BTAC: FloatArray,
        k_BTGC: FloatArray,
        v_BTGC: FloatArray,
        kv_BS2GC: FloatArray,
        filled_1: IntArray,
    ) -> FloatArray:
        """See `Operations.attention_with_cache`."""
        B, T, A, C = q_BTAC.shape
        S, G, real, width = kv_BS2GC.shape[1], k_BTGC.shape[2], q_BTAC.dtype, _width(C)
        out_BTAC = self.empty((B, T, A, C), real)
        new = *_arguments(k_BTGC, v_BTGC), kv_BS2GC, filled_1
        KERNELS.launch("write_cache", real, (B * T,), (THREADS,), *new, T, S, G, C)
        given = *_arguments(q_BTAC), kv_BS2GC, filled_1
        sizes = S, A, G, C, _aligned(q_BTAC, kv_BS2GC), C**-0.5
        if T > 1:
            grid = (B * A * blocks(T, _forward_rows(width, real)),)
            name = f"cached_attention_{width}"
            KERNELS.launch(name, real, grid, (THREADS,), *given, out_BTAC, B, T, *sizes)
            return out_BTAC
        splits = blocks(S, SPLIT)
        parts = self.empty((B, A, splits, C + 2), real)
        grid = (B * G * blocks(A // G, LANES) * splits,)
        KERNELS.launch(f"attention_step_{width}", real, grid, (THREADS,), *given, parts, splits, *sizes)
        KERNELS.launch(
            "attention_step_end", real, (B * A,), (THREADS,), parts, filled_1, splits, S, C, out_BTAC
        )
        return out_BTAC


def _backward_rows(real: DTypeLike) -> int:
    """The rows of a tile in the backward: 16 * BACKWARD_ROWS of attention.cu."""
    return 64 if real == np.float32 else 32


def _forward_rows(width: int, real: DTypeLike) -> int:
    """The rows of a tile in the forward: 16 * FORWARD_ROWS of attention.cu."""
    return _backward_rows(real) * (2 if width == 64 else 1)


def _width(C: int) -> int:
    """The width to compute with. Raises ValueError: a head is too wide."""
    for width in WIDTHS:
        if width >= C:
            return width
    raise ValueError(
        f"an attention head of width {C}; the cuda backend has kernels for up to {WIDTHS[-1]}"
    )


def _arguments(*views: Any) -> list[Any]:
    """Each view's memory and its steps by sequence, position and head."""
    parts = []
    for view in views:
        sequence, position, head = steps_of(view)
        parts += [strided(view), np.int64(sequence), position, head]
    return parts


def _aligned(*views: Any) -> bool:
    """Whether every row may be read in whole vectors."""
    return all(
        number % VECTOR_BYTES == 0
        for view in views
        for number in (view.data.ptr, view.shape[-1] * view.dtype.itemsize, *view.strides[:-1])
    )
