"""Learning rate, weight decay and the optimiser's other numbers as functions of the step.

A step is the index, from 0, of the update about to be made.
"""

from __future__ import annotations

import math

from mhmoe_np.operations.table import AdamWSettings
from mhmoe_np.settings.run import OptimizerConfig, ScheduleKind

# Tips: 1.5e-3 -> 1e-3 (700M) and 1.2e-3 -> 8e-4 (1.3B).
DEFAULT_SECOND_STAGE = 2 / 3


def in_second_stage(step: int, *, total_steps: int) -> bool:
    """Whether `step` lies in the second half of the run; an odd middle step is in the first.

    Source   [spec 6 half-way], [Tips]
    """
    return 2 * step >= total_steps


def learning_rate(
    step: int,
    *,
    total_steps: int,
    kind: ScheduleKind,
    peak: float,
    final: float,
    warmup_steps: int,
    second_stage_peak: float | None = None,
) -> float:
    """The learning rate of update `step` of a run of `total_steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup_steps - 1`. Then, to `final` at the
    last step, `total_steps - 1` (and after it):

    - linear: in a straight line; cosine: along half a cosine; constant: stays at `peak`;
    - two-stage: linear, but from half-way on with `second_stage_peak` (default 2/3 of `peak`) in
      the place of `peak`. The rate drops at half-way to the lower line; it does not jump up to
      `second_stage_peak`, which a line from `peak` has long passed by then.

    A warm-up as long as the run or longer leaves no decay. A run of one step makes it at the
    warm-up's rate, or at `peak` without one. `second_stage_peak` is read by two-stage alone.

    Source   linear [spec 6 warm-up], from [R1]; two-stage [spec 6 BitNet recipe], from [Tips]
    """
    if kind == "two-stage" and in_second_stage(step, total_steps=total_steps):
        peak = DEFAULT_SECOND_STAGE * peak if second_stage_peak is None else second_stage_peak
    if step < warmup_steps:
        return (step + 1) / warmup_steps * peak
    if kind == "constant":
        return peak
    decay_start = max(warmup_steps - 1, 0)
    # A run of one step has no way to go: it stays at the start of its decay.
    decay_steps = max(total_steps - 1 - decay_start, 1)
    progress = min((step - decay_start) / decay_steps, 1.0)
    if kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return (1 - progress) * peak + progress * final


def weight_decay(step: int, *, total_steps: int, kind: ScheduleKind, decay: float) -> float:
    """The weight decay of update `step`: `decay`, but 0 in the second half of a two-stage run.

    Source   [spec 6 decoupled decay]; two-stage [spec 6 BitNet recipe], from [Tips]
    """
    if kind == "two-stage" and in_second_stage(step, total_steps=total_steps):
        return 0.0
    return decay


def adamw_settings(step: int, *, total_steps: int, optimizer: OptimizerConfig) -> AdamWSettings:
    """The optimiser's numbers for update `step` of a run of `total_steps`.

    Source   [spec 6 AdamW]
    """
    return AdamWSettings(
        learning_rate(
            step,
            total_steps=total_steps,
            kind=optimizer.schedule,
            peak=optimizer.learning_rate,
            final=optimizer.final_learning_rate,
            warmup_steps=optimizer.warmup_steps,
            second_stage_peak=optimizer.second_stage_learning_rate,
        ),
        optimizer.beta1,
        optimizer.beta2,
        optimizer.epsilon,
        weight_decay(
            step, total_steps=total_steps, kind=optimizer.schedule, decay=optimizer.weight_decay
        ),
        optimizer.clip_norm,
    )
