import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhmoe_np.data import mixture
from mhmoe_np.data.batches import Windows
from mhmoe_np.data.mixture import MixedBatches
from mhmoe_np.errors import UserError

OFFSET = 1000  # between the ids of two streams


def mixed(weights, *, seed=0, batch_size=4, sizes=(60, 90, 40)) -> MixedBatches:
    """Streams of ids that say which stream they are of, and where in it."""
    streams = {
        f"d{n}": (np.arange(OFFSET * n, OFFSET * n + size), weight)
        for n, (size, weight) in enumerate(zip(sizes, weights, strict=False))
    }
    return MixedBatches(streams, sequence_length=5, batch_size=batch_size, seed=seed)


def domains(batches: MixedBatches, steps) -> list[int]:
    return [int(row[0]) // OFFSET for step in steps for row in batches.batch(step)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 5))
def test_every_block_holds_each_domain_by_its_weight(weights, block):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mixture, "BLOCK", 40)
        found = domains(mixed(weights), range(10 * block, 10 * block + 10))
    for number, weight in enumerate(weights):
        assert abs(found.count(number) - 40 * weight / sum(weights)) < 1


def test_weights_that_divide_the_block_are_met_exactly():
    found = domains(mixed([7, 2, 1], batch_size=100), range(100))
    assert [found.count(number) for number in range(3)] == [7000, 2000, 1000]
    assert len(set(map(tuple, np.array(found).reshape(100, 100)))) > 90  # mixed, not in turn


def test_each_domain_takes_its_own_windows_one_after_the_other():
    batches = mixed([2, 1])
    rows = [row for step in range(50) for row in batches.batch(step)]
    for number, size in enumerate((60, 90)):
        own = [row for row in rows if row[0] // OFFSET == number]
        windows = Windows(
            np.arange(OFFSET * number, OFFSET * number + size), sequence_length=5, seeds=(0, 1, number)
        )
        np.testing.assert_array_equal(own, windows.take(list(range(len(own)))))


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**5), max_size=8), st.integers(0, 2**40))
def test_a_batch_depends_on_seed_and_step_alone(steps, seed):
    batches, again = mixed([3, 1, 1], seed=seed), mixed([3, 1, 1], seed=seed)
    in_order = {step: batches.batch(step) for step in sorted(steps)}
    for step in steps:
        assert in_order[step].dtype == np.int64
        np.testing.assert_array_equal(again.batch(step), in_order[step])


def test_the_batches_of_a_seed_never_change():
    starts = [mixed([3, 1, 1], seed=7).batch(step)[:, 0].tolist() for step in range(2)]
    assert starts == [[2018, 1030, 2008, 54], [34, 4, 1005, 49]]


def test_a_weight_that_never_has_a_turn_is_refused():
    with pytest.raises(UserError, match="weight of 'd1': is under 1/20000 of all weights"):
        mixed([1.0, 1e-6])


def test_a_domain_shorter_than_a_window_is_refused_by_name():
    with pytest.raises(UserError, match="sequence_length: 5 needs 6 tokens and domain 'd1' has 5"):
        mixed([1, 1], sizes=(60, 5))
