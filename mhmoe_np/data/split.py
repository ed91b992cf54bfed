"""Setting validation text aside, by document and reproducibly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mhmoe_np.errors import UserError


def split_documents(
    documents: Sequence[str], *, fraction: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split one domain's documents, at least one and none empty, for training and validation.

    Documents are drawn in an order given by `seed` (0 or above); each goes to validation if the
    total then stays within `fraction` of the domain's bytes. If none fits, the shortest goes. The
    original order is kept in both parts. A lone document is cut, its end going to validation.
    Fraction 0 gives no validation text.

    Returns the training documents and the validation documents.

    Raises UserError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction: {fraction} is not in [0, 1); try 0.05")
    if fraction == 0:
        return tuple(documents), ()
    if len(documents) == 1:
        return _cut(documents[0], fraction)
    chosen = _choose([len(document.encode()) for document in documents], fraction, seed)
    training = tuple(text for index, text in enumerate(documents) if index not in chosen)
    validation = tuple(text for index, text in enumerate(documents) if index in chosen)
    return training, validation


def _choose(byte_counts: Sequence[int], fraction: float, seed: int) -> set[int]:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    room = fraction * sum(byte_counts)
    chosen = set()
    taken = 0
    for index in generator.permutation(len(byte_counts)).tolist():
        if taken + byte_counts[index] <= room:
            taken += byte_counts[index]
            chosen.add(index)
    return chosen or {byte_counts.index(min(byte_counts))}


def _cut(document: str, fraction: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if len(document) < 2:
        return (document,), ()
    encoded = document.encode()
    # Whole characters in the training share of the bytes.
    aim = len(encoded[: round(len(encoded) * (1 - fraction))].decode(errors="ignore"))
    aim = min(max(aim, 1), len(document) - 1)
    # No line end may take more than half of either part away: better to cut inside a line then.
    reach = min(aim, len(document) - aim) // 2
    for boundary in ("\n", " "):
        before = document.rfind(boundary, aim - reach, aim) + 1
        after = document.find(boundary, aim, aim + reach) + 1
        ends = [end for end in (before, after) if end]
        if ends:
            aim = min(ends, key=lambda end: abs(end - aim))
            break
    return (document[:aim],), (document[aim:],)
