"""Batches of several domains, mixed by weights: a pure function of the seed and the step, too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mhmoe_np.data.batches import Tokens, Windows, check_batch
from mhmoe_np.errors import UserError
from mhmoe_np.types import IntArray

BLOCK = 10_000  # sequences in which every domain has its share, rounded to whole sequences
MIXING = 1  # apart from the seeds of the domains' own orders


class MixedBatches:
    """The endless series of batches over several streams, each with its share of the sequences.

    Every `BLOCK` sequences hold each domain as often as its weight says, in an order drawn from the
    seed and the block's number. A domain's sequences are those of `Windows`, one after the other: a
    small domain with a large weight is read again and again.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[Tokens, float]],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
    ) -> None:
        """Mix streams by weight.

        streams: name -> ids and weight, above 0 and relative to the others'.
        sequence_length, batch_size, seed: as of `Batches`.

        Raises UserError: a stream is shorter than one window, a weight is so small that its domain
        never has a turn, or a batch does not fit into memory.
        """
        check_batch(sequence_length=sequence_length, batch_size=batch_size)
        self._windows = [
            Windows(
                tokens,
                sequence_length=sequence_length,
                seeds=(seed, MIXING, number),
                name=f"domain {name!r}",
            )
            for number, (name, (tokens, _)) in enumerate(streams.items())
        ]
        self._per_block = _whole_shares([weight for _, weight in streams.values()])
        for name, count in zip(streams, self._per_block.tolist(), strict=True):
            if not count:
                raise UserError(
                    f"weight of {name!r}: is under 1/{2 * BLOCK} of all weights; raise it or leave the "
                    "domain out"
                )
        self._sequence_length, self._batch_size, self._seed = sequence_length, batch_size, seed
        self._laid_block = -1
        self._domain_of_place: IntArray = np.empty(0, dtype=np.int64)
        self._turn_of_place: IntArray = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> IntArray:
        """Token ids, int64 [B, T+1]: [:, :-1] are the inputs and [:, 1:] their targets."""
        first = step * self._batch_size
        turns = [self._turn(number) for number in range(first, first + self._batch_size)]
        tokens_BT1 = np.empty((self._batch_size, self._sequence_length + 1), dtype=np.int64)
        for domain, windows in enumerate(self._windows):
            rows = [row for row, (other, _) in enumerate(turns) if other == domain]
            if rows:
                tokens_BT1[rows] = windows.take([turns[row][1] for row in rows])
        return tokens_BT1

    def _turn(self, number: int) -> tuple[int, int]:
        """Which domain's sequence has this number, and which of the domain's it is."""
        block, place = divmod(number, BLOCK)
        if block != self._laid_block:
            sequence = np.random.SeedSequence([self._seed, MIXING, len(self._windows), block])
            generator = np.random.Generator(np.random.PCG64(sequence))
            domains = np.repeat(np.arange(len(self._per_block)), self._per_block)
            self._domain_of_place = generator.permutation(domains)
            self._turn_of_place = np.empty(BLOCK, dtype=np.int64)
            for domain, count in enumerate(self._per_block.tolist()):
                here = self._domain_of_place == domain
                self._turn_of_place[here] = block * count + np.arange(count)
            self._laid_block = block
        return int(self._domain_of_place[place]), int(self._turn_of_place[place])


def _whole_shares(weights: list[float]) -> IntArray:
    """`BLOCK` shared out by weight in whole numbers, by largest remainder."""
    shares = np.array(weights) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(np.int64)
    missing = BLOCK - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    return counts
