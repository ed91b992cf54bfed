"""A number that is not finite stops training, wherever in the model it is."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from mhmoe_np.audit.models import BASE, KINDS
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.table import Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.training.step import Learner
from tests.operations.cases import ADAMW, BACKENDS

# Together these have every tensor that a model can have, as floats and quantised.
CHOSEN = [
    "dense-relu2-sub-norm-untied",
    "smoe-head-and-merge",
    "mh2-bias",
    "mh2-z-loss",
    "mh3-shared-sub-norm",
    "dense-ternary",
    "mh2-ternary",
    "mh2-sign-shared",
    "mh3-sign-projections-bias",
]
EMULATED = ["mh2-z-loss"]
STRIDES = {
    "numpy": 2,
    "cuda-emulated": 5,
}  # of the tensors, so many further on each time: these are slow
# Every token goes in, and through every expert (5 of them, of 96 sub-tokens at least).
WINDOWS = np.random.default_rng(71).permutation(102).reshape(6, 17) % BASE["vocab_size"]


def of_kind(kind: str) -> Parameters:
    """A small model with its initial weights."""
    parameters = Parameters(ModelConfig.model_validate(BASE | KINDS[kind]), np.float32)
    initialise(parameters, seed=72)
    return parameters


def numbers(backend: str) -> tuple[float, ...]:
    """That are not finite; emulated, one: what an operation makes of the others is tested there."""
    return (math.nan,) if "emulated" in backend else (math.nan, math.inf, -math.inf)


def beginner(parameters: Parameters, ops: Operations) -> Learner:
    return Learner(parameters, Moments.zeros(parameters.config, np.float32), updates=0, ops=ops)


def test_every_tensor_is_in_one_of_the_chosen_models() -> None:
    def tensors(kinds: list[str]) -> set[tuple[str, bool]]:
        return {
            (re.sub(r"\d+", "#", part.tensor), entry.quantised)
            for kind in kinds
            for entry in of_kind(kind).table
            for part in entry.parts
        }

    assert tensors(CHOSEN) == tensors(list(KINDS))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(k, b) for b in BACKENDS for k in (EMULATED if "emulated" in b else CHOSEN)],
)
def test_a_parameter_that_is_not_finite_stops_training(kind: str, backend: str) -> None:
    parameters, ops = of_kind(kind), BACKENDS[backend]
    rng = np.random.default_rng(73)
    for name, tensor in list(parameters.tensors.items())[:: STRIDES.get(backend, 1)]:
        for bad in numbers(backend):
            place = np.unravel_index(rng.integers(tensor.size), tensor.shape)
            kept, tensor[place] = tensor[place], bad
            before = parameters.flat_P.copy()
            with np.errstate(all="ignore"):
                learner = beginner(parameters, ops)
                result = learner.step([Batch.of(WINDOWS)], ADAMW)
            assert not result.is_finite, f"{name} = {bad}"
            assert learner.updates == 0
            assert parameters.flat_P.tobytes() == before.tobytes()
            tensor[place] = kept
    learner = beginner(parameters, ops)
    assert learner.step([Batch.of(WINDOWS)], ADAMW).is_finite
    assert learner.updates == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mh2-z-loss", "mh3-sign-projections-bias"])
@pytest.mark.parametrize("spoilt", ["gradient", "first", "second", "unused row"])
def test_what_the_loss_does_not_see_stops_training_before_it_spreads(
    spoilt: str, kind: str, backend: str
) -> None:
    for bad in numbers(backend):
        parameters = of_kind(kind)
        for name in list(parameters.tensors)[:: 3 * STRIDES.get(backend, 1)]:
            learner = beginner(parameters, BACKENDS[backend])
            with np.errstate(all="ignore"):
                learner.add_gradient([Batch.of(WINDOWS)])
                group = {
                    "gradient": learner.gradient,
                    "first": learner.moments.first,
                    "second": learner.moments.second,
                    "unused row": learner.parameters,
                }[spoilt]
                group.tensors[name].flat[-1] = bad
                learner.update(ADAMW)
                result = learner.read()
            assert result.left_out == 1, name
            assert not result.is_finite
            assert learner.updates == 0
            if group is learner.parameters:
                group.tensors[name].flat[-1] = 0
            assert np.isfinite(learner.parameters.flat_P).all(), name
