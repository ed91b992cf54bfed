"""Small whole models as tests make them: parameters, a learner, two micro-batches with padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhmoe_np.audit.models import settings
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.training.step import Learner

SETTINGS = AdamWSettings(1e-3, 0.9, 0.95, 1e-6, 0.1, 1.0)


def config_of(kind: str, **changes: Any) -> ModelConfig:
    """The configuration of a kind of `audit.models`, with changes."""
    return ModelConfig.model_validate(settings(kind) | changes)


def parameters_of(kind: str, dtype: Any = np.float32, seed: int = 0, **changes: Any) -> Parameters:
    parameters = Parameters(config_of(kind, **changes), dtype)
    initialise(parameters, seed)
    return parameters


def learner_of(
    kind: str, ops: Operations, dtype: Any = np.float32, seed: int = 0, **changes: Any
) -> Learner:
    """One that has learnt nothing yet."""
    parameters = parameters_of(kind, dtype, seed, **changes)
    return Learner(parameters, Moments.zeros(parameters.config, dtype), updates=0, ops=ops)


def batches_of(config: ModelConfig, rng: np.random.Generator) -> list[Batch]:
    """Two micro-batches, with padding."""
    tokens = rng.integers(0, config.vocab_size, (4, 9))
    targets = tokens[:, 1:].copy()
    targets[1, 5:] = -100
    inputs = np.ascontiguousarray(tokens[:, :-1])
    return [Batch(inputs[:2], targets[:2]), Batch(inputs[2:], targets[2:])]
