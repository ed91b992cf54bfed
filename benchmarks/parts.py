"""Where our step's time goes: every operation timed, and put down to a part of the model.

    python -m benchmarks.parts --work train (and a side's options)

prints the milliseconds of each part of a step as JSON.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

from benchmarks.numpy_side import NumpySide
from benchmarks.protocol import parser_of_sides
from mhmoe_np.model.weights import Weights
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Operations

PARTS = (
    "attention",
    "router",
    "dispatch",
    "experts",
    "feed-forward",
    "head + loss",
    "optimiser",
    "rest",
)

# Linear maps by their weight's name, all other operations by their own; what is missing is "rest".
_LINEAR = {
    "self_attn": "attention",
    "mlp.gate.": "router",
    "mlp.head_proj": "experts",
    "mlp.merge_proj": "experts",
    "mlp.": "feed-forward",
}
PART_OF_OPERATION = {
    "attention": "attention",
    "attention_with_cache": "attention",
    "attention_backward": "attention",
    "rotate_in_place": "attention",
    "route": "router",
    "route_backward": "router",
    "add_router_statistics": "router",
    "dispatch": "dispatch",
    "expert_ffn": "experts",
    "expert_ffn_backward": "experts",
    "gated_activation": "feed-forward",
    "gated_activation_backward": "feed-forward",
    "token_nll": "head + loss",
    "token_nll_and_gradient": "head + loss",
    "add_sum_of_squares": "optimiser",
    "adamw_in_place": "optimiser",
    "quantise_weight": "optimiser",
}
_WEIGHT_ARGUMENT = {"linear": 1, "linear_backward": 2}


class Stopwatch:
    """Operations that time themselves.

    Attributes:
        seconds: spent in each part so far.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops = ops
        self.seconds: dict[str, float] = defaultdict(float)
        self._part_of_weight: dict[int, str] = {}

    def watch(self, weights: Weights) -> None:
        """Tell linear maps apart by these weights."""
        self._part_of_weight |= {
            id(weight): next(part for key, part in _LINEAR.items() if name.startswith(key))
            for block in weights.blocks
            for name, weight in block.items()
            if name.startswith(tuple(_LINEAR))
        }

    def __getattr__(self, name: str) -> Any:
        operation: Callable[..., Any] = getattr(self._ops, name)
        if name not in PART_OF_OPERATION and name not in _WEIGHT_ARGUMENT:
            return operation

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments, **keywords)
            if name in _WEIGHT_ARGUMENT:
                part = self._part_of_weight[id(arguments[_WEIGHT_ARGUMENT[name]])]
            else:
                part = PART_OF_OPERATION[name]
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


def breakdown(step: Callable[[], object], stopwatch: Stopwatch, count: int) -> dict[str, float]:
    """Milliseconds of each part of one `step`, of `count` made through the stopwatch's operations."""
    stopwatch.seconds.clear()
    start = time.perf_counter()
    for _ in range(count):
        step()
    seconds = dict(stopwatch.seconds)
    seconds["rest"] = time.perf_counter() - start - sum(seconds.values())
    return {part: round(1e3 * seconds.get(part, 0.0) / count, 2) for part in PARTS}


def main() -> None:
    parser = parser_of_sides(__doc__ or "")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    ops = load_operations("numba", threads=options.threads, keep_buffers=True)
    stopwatch = Stopwatch(ops)
    side = NumpySide(options, cast(Operations, stopwatch))
    stopwatch.watch(side.model.weights)
    step = side.train_step if options.work == "train" else side.evaluate_batch
    step()
    print(json.dumps(breakdown(step, stopwatch, options.steps)))


if __name__ == "__main__":
    main()
