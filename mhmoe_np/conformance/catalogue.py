"""All vectors."""

from __future__ import annotations

from collections.abc import Iterator

from mhmoe_np.conformance.block_vectors import block_vectors
from mhmoe_np.conformance.expert_vectors import expert_vectors
from mhmoe_np.conformance.layer_vectors import layer_vectors
from mhmoe_np.conformance.linear_vectors import linear_vectors
from mhmoe_np.conformance.model_vectors import model_vectors
from mhmoe_np.conformance.training_vectors import training_vectors
from mhmoe_np.conformance.vector import Vector


def all_vectors() -> Iterator[Vector]:
    """From single operations to whole models."""
    yield from linear_vectors()
    yield from block_vectors()
    yield from expert_vectors()
    yield from training_vectors()
    yield from layer_vectors()
    yield from model_vectors()
