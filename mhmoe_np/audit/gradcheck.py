"""Every hand-derived gradient against central differences in float64 (see `derivative`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from mhmoe_np.audit.derivative import GradientCheck
from mhmoe_np.audit.host_facing import on_host
from mhmoe_np.audit.model_checks import check_model
from mhmoe_np.audit.models import KINDS
from mhmoe_np.audit.operation_checks import check_operations
from mhmoe_np.operations.checked import Checked
from mhmoe_np.operations.table import Operations


def check_all(ops: Operations) -> Iterator[GradientCheck]:
    """Every operation, then a model of every kind, with every call held to the table's promises."""
    yield from check_operations(on_host(cast(Operations, Checked(ops))))
    for kind in KINDS:
        yield check_model(kind, ops)
