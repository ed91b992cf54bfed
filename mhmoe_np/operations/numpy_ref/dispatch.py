"""Sorting the router's choices by expert, with or without a capacity."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.table import Dispatch
from mhmoe_np.types import IntArray


def dispatch(expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
    """See `Operations.dispatch`."""
    M, K = expert_MK.shape
    # Filling order: all first choices in sub-token order, then all second choices, and so on.
    filling_order = np.arange(M * K).reshape(M, K).T.ravel()
    expert_of_choice = expert_MK.ravel()
    by_expert = np.argsort(expert_of_choice[filling_order], kind="stable")
    route_R = filling_order[by_expert]
    if capacity is not None:
        sorted_expert = expert_of_choice[route_R]
        place_in_expert = np.arange(M * K) - np.searchsorted(sorted_expert, sorted_expert)
        route_R = route_R[place_in_expert < capacity]
    count_E = np.bincount(expert_of_choice[route_R], minlength=experts)
    slot_MK = np.full((M, K), -1, np.int64)
    slot_MK.ravel()[route_R] = np.arange(len(route_R))
    return Dispatch(route_R, slot_MK, np.concatenate([[0], np.cumsum(count_E)]))
