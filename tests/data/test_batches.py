import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.data.batches import Batches
from mhmoe_np.data.store import TokenStream
from mhmoe_np.errors import UserError


@st.composite
def layouts(draw):
    """Streams 0, 1, 2, ... so that a token is its own position, and the windows over them."""
    sequence_length = draw(st.integers(1, 8))
    tokens = draw(st.integers(sequence_length + 1, 60))
    return Batches(
        np.arange(tokens, dtype=np.uint16),
        sequence_length=sequence_length,
        batch_size=draw(st.integers(1, 20)),
        seed=draw(st.integers(0, 2**64)),
    )


def sequences(batches: Batches, count: int):
    """The first `count` sequences of all epochs, one [T+1] array each."""
    rows = []
    step = 0
    while len(rows) < count:
        rows.extend(batches.batch(step))
        step += 1
    return rows[:count]


@given(batches=layouts(), epochs=st.integers(1, 4))
def test_each_epoch_takes_every_window_once_and_no_target_twice(batches, epochs):
    size = batches.sequences_per_epoch
    rows = sequences(batches, epochs * size)
    for epoch in range(epochs):
        epoch_rows = rows[epoch * size : (epoch + 1) * size]
        length = len(epoch_rows[0]) - 1
        starts = sorted(int(row[0]) for row in epoch_rows)
        assert starts == [starts[0] + length * index for index in range(size)]
        assert 0 <= starts[0] < length
        for row in epoch_rows:
            np.testing.assert_array_equal(row, np.arange(row[0], row[0] + length + 1))


@given(batches=layouts(), steps=st.lists(st.integers(0, 10**6), max_size=10))
def test_a_batch_depends_on_the_step_alone(batches, steps):
    in_order = {step: batches.batch(step) for step in sorted(steps)}
    for step in steps:
        np.testing.assert_array_equal(batches.batch(step), in_order[step])


@given(st.integers(1, 50), st.integers(1, 500))
def test_at_most_two_windows_worth_of_tokens_are_left_out_of_an_epoch(sequence_length, extra):
    token_W = np.zeros(sequence_length + extra, dtype=np.uint16)
    batches = Batches(token_W, sequence_length=sequence_length, batch_size=1, seed=0)
    left_out = len(token_W) - 1 - batches.sequences_per_epoch * sequence_length
    assert 0 <= left_out <= 2 * sequence_length - 2


def make(token_count: int, *, seed: int = 0, sequence_length: int = 10, batch_size: int = 4):
    return Batches(
        np.arange(token_count, dtype=np.uint16),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )


def test_a_batch_is_int64_inputs_and_targets():
    batch_BT = make(100).batch(3)
    assert batch_BT.shape == (4, 11)
    assert batch_BT.dtype == np.int64
    assert type(batch_BT) is np.ndarray
    np.testing.assert_array_equal(batch_BT[:, :-1] + 1, batch_BT[:, 1:])


def test_seeds_and_epochs_give_other_orders_and_phases():
    first, other_seed = make(1000), make(1000, seed=1)
    size = first.sequences_per_epoch
    assert not np.array_equal(first.batch(0), other_seed.batch(0))
    phases = {int(row[0]) % 10 for row in sequences(first, 40 * size)[::size]}
    assert phases == set(range(10))


def test_every_token_is_a_target_within_a_few_epochs_even_of_a_short_text():
    batches = make(15)
    assert batches.sequences_per_epoch == 1
    targets = {int(token) for row in sequences(batches, 60) for token in row[1:]}
    assert targets == set(range(1, 15))


def test_the_batches_of_a_seed_never_change():
    starts = [make(100, seed=7).batch(step)[:, 0].tolist() for step in range(3)]
    assert starts == [[89, 9, 79, 19], [39, 69, 29, 49], [59, 68, 8, 18]]


def test_a_batch_may_hold_several_epochs():
    batches = make(30, batch_size=7)
    assert batches.sequences_per_epoch == 2
    starts = batches.batch(0)[:, 0]
    for epoch in range(3):
        assert abs(int(starts[2 * epoch]) - int(starts[2 * epoch + 1])) == 10


@given(
    ends=st.sets(st.integers(1, 99), max_size=5),
    seed=st.integers(0, 9),
    step=st.integers(0, 20),
)
def test_shards_leave_no_mark_on_the_batches(ends, seed, step):
    token_W = np.arange(100, dtype=np.uint16)
    shards = TokenStream(np.split(token_W, sorted(ends)))
    options = {"sequence_length": 10, "batch_size": 4, "seed": seed}
    found = Batches(shards, **options).batch(step)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, Batches(token_W, **options).batch(step))


def test_the_shortest_text_that_fits_is_one_window():
    batches = make(11, batch_size=2)
    np.testing.assert_array_equal(batches.batch(9), [range(11), range(11)])


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="sequence_length: 10 needs 11 tokens and the text has 10"):
        make(10)


def test_the_global_random_state_is_neither_read_nor_changed():
    np.random.seed(0)  # noqa: NPY002
    before = make(100).batch(0)
    drawn = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert np.random.random() == drawn  # noqa: NPY002
    np.testing.assert_array_equal(make(100).batch(0), before)
