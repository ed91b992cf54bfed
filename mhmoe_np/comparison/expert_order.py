"""In which order another implementation has the experts, where their outputs alone are wrong."""

from __future__ import annotations

import numpy as np

from mhmoe_np.comparison.hypotheses import Change, Tensors, changed, reordered
from mhmoe_np.comparison.one_layer import Case
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig

MOST_EXPERTS = 16  # each is tried in each place


def cause_in_order(case: Case, config: ModelConfig, tensors: Tensors, *, ops: Operations) -> str | None:
    """The order of the experts with which the layer's output comes out; None: there is none.

    The output is a sum over the places e = 0 .. E-1, and what place e adds is a function of the expert
    j that stands there: with D_ej the change of the output when j takes place e,

        theirs - ours = sum_e sum_j P_ej D_ej,    P_ej = 1 where expert j stands at place e, else 0

    (D_ee = 0). P is found by least squares and must then explain the layer: a quantised merge layer is
    no sum, and where few sub-tokens go, P may not be determined.

    config, tensors: of the layer alone.
    """
    E = config.num_experts
    if not 2 <= E <= MOST_EXPERTS or "hidden" not in case.theirs:
        return None

    def computed(order: list[int]) -> dict[str, np.ndarray]:
        layer, given = changed(config, tensors, Change("", tensors=reordered(tensors, order)), ops=ops)
        return case.computed(layer, None, given)

    own = list(range(E))
    ours, theirs = computed(own)["hidden"].ravel(), case.theirs["hidden"].ravel()
    if ours.size != theirs.size or not np.isfinite(theirs).all():
        return None
    pairs = [(e, j) for e in own for j in own if e != j]
    D_RS = np.stack(
        [computed([*own[:e], j, *own[e + 1 :]])["hidden"].ravel() - ours for e, j in pairs], axis=1
    )
    P_EE = np.zeros((E, E))
    share_S, *_ = np.linalg.lstsq(D_RS, theirs - ours, rcond=None)
    P_EE[tuple(np.transpose(pairs))] = share_S
    np.fill_diagonal(P_EE, 1 - P_EE.sum(axis=1))
    order = P_EE.argmax(axis=1).tolist()
    if case.distance(computed(order)) is None:
        return None
    changes = {e for (e, _), D_R in zip(pairs, D_RS.T, strict=True) if D_R.any()}
    shown = [str(j) if e in changes else "?" for e, j in enumerate(order)]
    unused = " (?: no sub-token goes there)" if "?" in shown else ""
    return f"the experts are in another order: {', '.join(shown)}{unused}"
