"""Which tokens step s trains on: a pure function of the seed and the step."""

from __future__ import annotations

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.storage.memory import check_memory
from mhmoe_np.types import IntArray


class Batches:
    """The endless series of batches over a stream of tokens.

    An epoch cuts the stream into windows whose targets are disjoint, from a phase and in an order
    drawn from the seed and the epoch, and takes each window once. Step s takes the sequences
    s*B to s*B + B - 1 of all epochs laid end to end.
    """

    def __init__(self, token_W: IntArray, *, sequence_length: int, batch_size: int, seed: int) -> None:
        """Lay windows of T = `sequence_length` inputs over `token_W`.

        `batch_size` is B, the sequences per optimiser step; `seed` is 0 or above.

        Raises UserError: the stream is shorter than one window, or a batch does not fit into memory.
        """
        if len(token_W) <= sequence_length:
            raise UserError(
                f"sequence_length: {sequence_length} needs {sequence_length + 1} tokens and the "
                f"text has {len(token_W)}; lower sequence_length or add text"
            )
        # Of every token its place and its id as int64, and of every sequence its start.
        check_memory(
            batch_size * (2 * 8 * (sequence_length + 1) + 8),
            f"batch_size: {batch_size} sequences of {sequence_length} tokens need",
            remedy="lower training.batch_size or training.sequence_length",
        )
        # The plain array is a view: indexing a memmap costs a Python call more each time.
        self._token_W = np.asarray(token_W)
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        # One window fewer than would fit leaves every phase room, so that all epochs are of one
        # size; a stream too short for that has one window per epoch.
        self.sequences_per_epoch = max(1, len(token_W) // sequence_length - 1)
        self._laid_epoch = -1
        self._start_of_sequence: IntArray = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> IntArray:
        """Token ids, int64 [B, T+1]: [:, :-1] are the inputs and [:, 1:] their targets."""
        first = step * self._batch_size
        starts = [self._start(number) for number in range(first, first + self._batch_size)]
        window = np.arange(self._sequence_length + 1)
        return self._token_W[np.array(starts)[:, None] + window].astype(np.int64)

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, self.sequences_per_epoch)
        if epoch != self._laid_epoch:
            self._start_of_sequence = self._lay(epoch)
            self._laid_epoch = epoch
        return int(self._start_of_sequence[index])

    def _lay(self, epoch: int) -> IntArray:
        """The start of each window of `epoch`, in the order in which they are taken."""
        sequence = np.random.SeedSequence([self._seed, epoch])
        generator = np.random.Generator(np.random.PCG64(sequence))
        covered = self.sequences_per_epoch * self._sequence_length
        phases = min(self._sequence_length, len(self._token_W) - covered)
        phase = generator.integers(phases)
        return phase + self._sequence_length * generator.permutation(self.sequences_per_epoch)
