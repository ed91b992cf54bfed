"""In which order another implementation has the experts, where their outputs alone are wrong."""

from __future__ import annotations

import numpy as np

from mhmoe_np.comparison.hypotheses import Change, Tensors, changed, reordered
from mhmoe_np.comparison.one_layer import Case
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig

MOST_EXPERTS = 16  # each is tried in each place
SWEEPS = 3


def cause_in_order(case: Case, config: ModelConfig, tensors: Tensors, *, ops: Operations) -> str | None:
    """The order of the experts with which the layer's output comes out; None: there is none.

    Place by place, in several sweeps, the expert is taken that brings the output nearest: other places
    that are still wrong disturb each candidate alike. What was found must then explain the layer.

    config, tensors: of the layer alone.
    """
    E = config.num_experts
    if not 2 <= E <= MOST_EXPERTS or "hidden" not in case.theirs:
        return None
    wanted = case.theirs["hidden"]

    def computed(order: list[int]) -> dict[str, np.ndarray]:
        layer, given = changed(config, tensors, Change("", tensors=reordered(tensors, order)), ops=ops)
        return case.computed(layer, None, given)

    def gap(order: list[int]) -> float:
        return float(np.linalg.norm(computed(order)["hidden"].ravel() - wanted.ravel()))

    if wanted.size != computed(list(range(E)))["hidden"].size:
        return None
    order = list(range(E))
    for _ in range(SWEEPS):
        before = list(order)
        for place in range(E):
            order = min(([*order[:place], expert, *order[place + 1 :]] for expert in range(E)), key=gap)
        if order == before:
            break
    if case.distance(computed(order)) is None:
        return None
    return f"the experts are in another order: {', '.join(map(str, order))}"
