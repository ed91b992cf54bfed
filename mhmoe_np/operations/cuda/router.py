"""The router: softmax over all experts, top-k, gates; `router.cu` has the kernels."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.cuda.device import Kernels, blocks
from mhmoe_np.operations.cuda.memory import Memory
from mhmoe_np.operations.table import Dispatch, RouterLosses, RouterSums, Routing
from mhmoe_np.types import BoolArray, FloatArray

WARP, ROWS = 32, 8
STRIP = 256  # rows that one block of `router_statistics` adds up
BLOCK = (WARP, ROWS)
KERNELS = Kernels("router")


class Router(Memory):
    """See `Operations`: the router."""

    def route(self, logits_ME: FloatArray, *, top_k: int, normalise: bool) -> Routing:
        """See `Operations.route`."""
        (M, E), dtype = logits_ME.shape, logits_ME.dtype
        routing = Routing(
            p_ME=self.empty((M, E), dtype),
            log_sum_exp_M=self.empty((M,), dtype),
            expert_MK=self.empty((M, top_k), np.int64),
            gate_MK=self.empty((M, top_k), dtype),
        )
        sizes = M, E, top_k, normalise
        KERNELS.launch("route", dtype, (blocks(M, ROWS),), BLOCK, logits_ME, *sizes, *routing)
        return routing

    def route_backward(
        self,
        dgate_MK: FloatArray,
        routing: Routing,
        counted_M: BoolArray,
        losses: RouterLosses,
        *,
        normalise: bool,
    ) -> FloatArray:
        """See `Operations.route_backward`."""
        (M, E), K, dtype = routing.p_ME.shape, dgate_MK.shape[1], dgate_MK.dtype
        count_E, choices, sub_tokens, daux, dz = losses
        dlogits_ME: FloatArray = self.empty((M, E), dtype)
        KERNELS.launch(
            "route_backward",
            dtype,
            (blocks(M, ROWS),),
            BLOCK,
            *(dgate_MK, *routing, counted_M, count_E, M, E, K, normalise),
            np.float64(daux * E / choices / sub_tokens),  # of the balance loss
            float(2 * dz / sub_tokens),  # of the z-loss
            dlogits_ME,
        )
        return dlogits_ME

    def add_router_statistics(
        self, routing: Routing, dispatch: Dispatch, counted_M: BoolArray, sums: RouterSums
    ) -> None:
        """See `Operations.add_router_statistics`."""
        p_ME, log_sum_exp_M, expert_MK, _ = routing
        (M, E), K, dtype = p_ME.shape, expert_MK.shape[1], p_ME.dtype
        strip_count = blocks(M, STRIP)
        with self.scope():
            strips = self.empty((4 * E + 1, strip_count), np.float64)
            KERNELS.launch(
                "router_statistics",
                dtype,
                (strip_count, blocks(E, WARP)),
                BLOCK,
                *(p_ME, log_sum_exp_M, expert_MK, dispatch.slot_MK, counted_M, M, E, K, STRIP, strips),
            )
            grid = (blocks(4 * E + 1, ROWS),)
            KERNELS.launch("add_router_statistics", dtype, grid, BLOCK, strips, strip_count, E, *sums)
