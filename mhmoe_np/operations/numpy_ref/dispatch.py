"""Sorting the router's choices by expert, with or without a capacity."""

from __future__ import annotations

import numpy as np

from mhmoe_np.operations.table import Dispatch
from mhmoe_np.types import IntArray


def dispatch(expert_MK: IntArray, *, experts: int, capacity: int | None) -> Dispatch:
    """See `Operations.dispatch`.

    A choice is a number s*K + j: the j-th of sub-token s. There are M*K; R of them are kept.
    """
    M, K = expert_MK.shape
    expert_of_choice = expert_MK.reshape(M * K)
    # The order in which experts fill: all first choices by sub-token, then all second ones, and so on.
    choices = np.arange(M * K).reshape(M, K).T.reshape(M * K)
    # By expert; a stable sort leaves each expert's choices in that order.
    choices = choices[np.argsort(expert_of_choice[choices], kind="stable")]
    if capacity is not None:
        experts_sorted = expert_of_choice[choices]
        place = np.arange(M * K) - np.searchsorted(experts_sorted, experts_sorted)  # in its expert
        choices = choices[place < capacity]

    route_R = choices
    count_E = np.bincount(expert_of_choice[route_R], minlength=experts)
    start_Z = np.concatenate([[0], np.cumsum(count_E)])
    slot_MK = np.full((M, K), -1)  # dropped, unless set
    slot_MK.reshape(M * K)[route_R] = np.arange(len(route_R))  # the inverse of route
    return Dispatch(route_R, slot_MK, start_Z)
