from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.training.schedule import learning_rate, weight_decay

KINDS = ["linear", "cosine", "two-stage", "constant"]
DECAYING = ["linear", "cosine", "two-stage"]


def rates(kind, *, total_steps, warmup_steps, peak=1.0, final=0.1, second_stage_peak=None):
    """The learning rate of every step of a run."""
    rate = partial(
        learning_rate,
        total_steps=total_steps,
        kind=kind,
        peak=peak,
        final=final,
        warmup_steps=warmup_steps,
        second_stage_peak=second_stage_peak,
    )
    return [rate(step) for step in range(total_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_a_straight_line_that_ends_at_the_peak(kind):
    assert rates(kind, total_steps=100, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_the_released_recipe():
    # [R1], [spec 6 warm-up]: warm-up 375, then linear from 6e-4 to 3e-5 at the last of 100,000 updates.
    run = rates("linear", total_steps=100_000, warmup_steps=375, peak=6e-4, final=3e-5)
    assert run[0] == pytest.approx(6e-4 / 375)
    assert run[374] == max(run) == 6e-4
    assert run[-1] == 3e-5
    middle = (374 + 99_999) / 2
    assert (run[int(middle)] + run[int(middle) + 1]) / 2 == pytest.approx((6e-4 + 3e-5) / 2)


def test_linear_falls_by_equal_amounts():
    run = rates("linear", total_steps=11, warmup_steps=1)
    assert run == pytest.approx([1.0 - 0.09 * step for step in range(11)])


def test_cosine_is_half_way_down_in_the_middle_and_flat_at_the_ends():
    run = rates("cosine", total_steps=101, warmup_steps=1, final=0.0)
    assert run[50] == pytest.approx(0.5)
    assert run[25] == pytest.approx((1 + 2**-0.5) / 2)
    assert run[1] > 0.999
    assert run[99] < 0.001
    assert run[100] == 0.0


def test_constant_stays_at_the_peak():
    assert rates("constant", total_steps=5, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_two_stage_drops_from_the_higher_line_to_the_lower_at_half_way():
    # [spec 6 BitNet recipe], [spec 6 half-way], [Tips]
    # The tips: 1.5e-3 -> 1e-3. The lines stand at about half their peaks when they are swapped.
    run = rates("two-stage", total_steps=1000, warmup_steps=10, peak=1.5e-3, final=0.0)
    high = rates("linear", total_steps=1000, warmup_steps=10, peak=1.5e-3, final=0.0)
    low = rates("linear", total_steps=1000, warmup_steps=10, peak=1.0e-3, final=0.0)
    assert run == pytest.approx(high[:500] + low[500:])
    assert run[499] == pytest.approx(0.75e-3, rel=0.02)
    assert run[500] == pytest.approx(0.5e-3, rel=0.02)
    assert run[-1] == 0.0


def test_two_stage_takes_a_given_second_peak():
    run = rates("two-stage", total_steps=10, warmup_steps=0, final=0.0, second_stage_peak=0.9)
    assert run[4] == pytest.approx(1.0 * 5 / 9)
    assert run[5] == pytest.approx(0.9 * 4 / 9)


def test_weight_decay_ends_half_way_in_two_stages_alone():
    # [spec 6 decoupled decay], [spec 6 BitNet recipe], [Tips]
    def decays(kind, total_steps):
        return [
            weight_decay(step, total_steps=total_steps, kind=kind, decay=0.1)
            for step in range(total_steps)
        ]

    assert decays("two-stage", 4) == [0.1, 0.1, 0.0, 0.0]
    assert decays("two-stage", 5) == [0.1, 0.1, 0.1, 0.0, 0.0]
    assert decays("two-stage", 1) == [0.1]
    for kind in ("linear", "cosine", "constant"):
        assert decays(kind, 4) == [0.1] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_no_warmup_starts_at_the_peak(kind):
    run = rates(kind, total_steps=10, warmup_steps=0)
    assert run == rates(kind, total_steps=10, warmup_steps=1)
    assert run[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_run_of_one_step(kind, warmup_steps):
    assert rates(kind, total_steps=1, warmup_steps=warmup_steps) == [1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_a_warmup_as_long_as_the_run_or_longer(kind):
    assert rates(kind, total_steps=4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
    assert rates(kind, total_steps=2, warmup_steps=4) == [0.25, 0.5]


def test_a_warmup_beyond_half_way_rises_to_the_second_peak():
    run = rates("two-stage", total_steps=4, warmup_steps=4, second_stage_peak=0.5)
    assert run == [0.25, 0.5, 0.375, 0.5]


@pytest.mark.parametrize("kind", DECAYING)
def test_after_the_last_step_the_rate_stays_final(kind):
    rate = learning_rate(
        12, total_steps=10, kind=kind, peak=1.0, final=0.1, warmup_steps=2, second_stage_peak=0.5
    )
    assert rate == pytest.approx(0.1)


@given(
    kind=st.sampled_from(KINDS),
    total_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    peak=st.floats(1e-6, 1.0),
    ratio=st.floats(0.0, 0.6),
)
def test_up_then_down_and_always_between_zero_and_the_peak(
    kind, total_steps, warmup_steps, peak, ratio
):
    final = ratio * peak
    run = rates(kind, total_steps=total_steps, warmup_steps=warmup_steps, peak=peak, final=final)
    rounding = 1e-12 * peak
    assert all(0 <= rate <= peak + rounding for rate in run)
    warm, decaying = run[:warmup_steps], run[max(warmup_steps - 1, 0) :]
    # The drop at half-way is the one place where a warm-up may fall.
    drop = (total_steps + 1) // 2 if kind == "two-stage" else None
    for step, (before, after) in enumerate(pairwise(warm), start=1):
        assert before < after or step == drop
    for before, after in pairwise(decaying):
        assert after <= before + rounding
    if kind in DECAYING and total_steps > max(warmup_steps, 1):
        assert run[-1] == pytest.approx(final, abs=rounding)
