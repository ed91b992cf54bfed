"""Which tokens step s trains on: a pure function of the seed and the step."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.types import IntArray


class Tokens(Protocol):
    """A stream of ids, as an array [W] or the shards of a store."""

    def __len__(self) -> int:
        """Count the ids."""
        ...

    def take(self, indices: IntArray, /) -> IntArray:
        """The ids at these places, in the shape of `indices`."""
        ...


class Batches:
    """The endless series of batches over a stream of tokens.

    An epoch cuts the stream into windows whose targets are disjoint, from a phase and in an order
    drawn from the seed and the epoch, and takes each window once. Step s takes the sequences
    s*B to s*B + B - 1 of all epochs laid end to end.
    """

    def __init__(self, tokens: Tokens, *, sequence_length: int, batch_size: int, seed: int) -> None:
        """Lay windows of T = `sequence_length` inputs over `tokens`.

        `batch_size` is B, the sequences per optimiser step; `seed` is 0 or above.

        Raises UserError: the stream is shorter than one window, or a batch does not fit into memory.
        """
        check_batch(sequence_length=sequence_length, batch_size=batch_size)
        self._batch_size = batch_size
        self._windows = Windows(tokens, sequence_length=sequence_length, seeds=(seed,))
        self.sequences_per_epoch = self._windows.per_epoch

    def batch(self, step: int) -> IntArray:
        """Token ids, int64 [B, T+1]: [:, :-1] are the inputs and [:, 1:] their targets."""
        first = step * self._batch_size
        return self._windows.take(list(range(first, first + self._batch_size)))


def check_batch(*, sequence_length: int, batch_size: int) -> None:
    """Refuse a batch that does not fit into memory.

    Raises UserError.
    """
    # Of every token its place and its id as int64, and of every sequence its start.
    check_memory(
        batch_size * (2 * 8 * (sequence_length + 1) + 8),
        f"batch_size: {batch_size} sequences of {sequence_length} tokens need",
        remedy="lower training.batch_size or training.sequence_length",
    )


class Windows:
    """The windows of all epochs of a stream, laid end to end.

    Attributes:
        per_epoch: how many windows an epoch has.
    """

    def __init__(
        self, tokens: Tokens, *, sequence_length: int, seeds: tuple[int, ...], name: str = "the text"
    ) -> None:
        """Lay windows of T = `sequence_length` inputs over `tokens`.

        seeds: what the order depends on, 0 or above each.
        name: what a message calls the stream.

        Raises UserError: the stream is shorter than one window.
        """
        if len(tokens) <= sequence_length:
            raise UserError(
                f"sequence_length: {sequence_length} needs {sequence_length + 1} tokens and "
                f"{name} has {len(tokens)}; lower sequence_length or add text"
            )
        # The plain array is a view: indexing a memmap costs a Python call more each time.
        self._tokens = np.asarray(tokens) if isinstance(tokens, np.ndarray) else tokens
        self._sequence_length = sequence_length
        self._seeds = seeds
        # One window fewer than would fit leaves every phase room, so that all epochs are of one
        # size; a stream too short for that has one window per epoch.
        self.per_epoch = max(1, len(tokens) // sequence_length - 1)
        self._laid_epoch = -1
        self._start_of_sequence: IntArray = np.empty(0, dtype=np.int64)

    def take(self, numbers: list[int]) -> IntArray:
        """The ids of these windows, int64 [B, T+1]."""
        starts = [self._start(number) for number in numbers]
        window = np.arange(self._sequence_length + 1)
        return self._tokens.take(np.array(starts)[:, None] + window).astype(np.int64)

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._laid_epoch:
            self._start_of_sequence = self._lay(epoch)
            self._laid_epoch = epoch
        return int(self._start_of_sequence[index])

    def _lay(self, epoch: int) -> IntArray:
        """The start of each window of `epoch`, in the order in which they are taken."""
        sequence = np.random.SeedSequence([*self._seeds, epoch])
        generator = np.random.Generator(np.random.PCG64(sequence))
        covered = self.per_epoch * self._sequence_length
        phases = min(self._sequence_length, len(self._tokens) - covered)
        phase = generator.integers(phases)
        return phase + self._sequence_length * generator.permutation(self.per_epoch)
