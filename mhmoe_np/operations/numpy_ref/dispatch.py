"""Sorting the router's choices by expert, with or without a capacity."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.table import Dispatch
from mhmoe_np.types import IntArray


def dispatch(expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
    """See `Operations.dispatch`.

    A choice is a number s*K + j: the j-th of sub-token s. R choices are kept.
    """
    M, K = expert_MK.shape
    expert_of_choice = expert_MK.reshape(M * K)
    # Filling order: all first choices in sub-token order, then all second choices, and so on.
    filling_order = np.arange(M * K).reshape(M, K).T.reshape(M * K)
    # A stable sort keeps that order within an expert.
    sorted_by_expert = np.argsort(expert_of_choice[filling_order], kind="stable")
    route_R = filling_order[sorted_by_expert]
    if capacity is not None:
        expert_R = expert_of_choice[route_R]
        first_row_R = np.searchsorted(expert_R, expert_R)  # of the same expert
        place_R = np.arange(M * K) - first_row_R  # within the expert
        route_R = route_R[place_R < capacity]

    count_E = np.bincount(expert_of_choice[route_R], minlength=experts)
    start_Z = np.concatenate([[0], np.cumsum(count_E)])
    slot_of_choice = np.full(M * K, -1)
    slot_of_choice[route_R] = np.arange(len(route_R))  # the inverse of route
    return Dispatch(route_R, slot_of_choice.reshape(M, K), start_Z)
