"""How the next token is drawn from the logits.

The steps and their order are those of Hugging Face transformers: repetition penalty, temperature,
top-k, top-p, min-p. Each of the last three leaves the most probable tokens, so each is a function that
says how many; where tokens are equally probable the lower id comes first. After each the probabilities
are divided by their sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mhmoe_np.errors import UserError
from mhmoe_np.types import FloatArray, IntArray

LARGEST_PENALTY = 1e30  # its products with float32's logits fit into float64


class Sampling(NamedTuple):
    """How the next token is drawn; temperature 0 takes the most probable one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuse what is no such number.

        Raises UserError: the line names it.
        """
        if not 0 <= self.temperature < math.inf:  # NaN is in no range
            raise UserError(
                f"temperature: {self.temperature} is not a finite number of at least 0; try 1"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is not at least 1; try 50")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not above 0 and at most 1; try 0.95")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} is not between 0 and 1; try 0.05")
        if not 1 / LARGEST_PENALTY <= self.repetition_penalty <= LARGEST_PENALTY:
            raise UserError(
                f"repetition_penalty: {self.repetition_penalty} is not between "
                f"{1 / LARGEST_PENALTY:g} and {LARGEST_PENALTY:g}; try 1.1"
            )

    @property
    def most_probable(self) -> int | None:
        """How many tokens the choice depends on, the most probable ones; None: on others, too."""
        if self.repetition_penalty != 1:
            return None
        return 1 if self.temperature == 0 else self.top_k


def penalised(logits_V: FloatArray, seen_T: IntArray, penalty: float) -> FloatArray:
    """The logits, those of tokens that were seen made smaller: x / penalty, or x * penalty below 0.

    However often a token was seen, it counts once (CTRL, arXiv 1909.05858, with the sign's care of
    transformers). seen_T: ids of prompt and continuation; those beyond the logits do not count.

    Returns logits_V, float64.
    """
    logits_V = logits_V.astype(np.float64)
    seen = np.unique(seen_T[seen_T < len(logits_V)])
    x = logits_V[seen]
    logits_V[seen] = np.where(x < 0, x * penalty, x / penalty)
    return logits_V


def nucleus_size(p: FloatArray, top_p: float) -> int:
    """Count the fewest most probable tokens whose probabilities reach top_p.

    p: probabilities, falling, of sum 1. At least 1 (Holtzman et al., arXiv 1904.09751).
    """
    return min(len(p), int(np.searchsorted(np.cumsum(p), top_p)) + 1)


def min_p_size(p: FloatArray, min_p: float) -> int:
    """Count the tokens at least min_p times as probable as the most probable one.

    p: probabilities, falling. At least 1 (Nguyen et al., arXiv 2407.01082).
    """
    return int(np.count_nonzero(p >= min_p * p[0]))


def candidates(
    logits_V: FloatArray, sampling: Sampling, seen_T: IntArray
) -> tuple[IntArray, FloatArray]:
    """The tokens that can be drawn, the most probable first, and their probabilities.

    seen_T: ids of prompt and continuation, for the repetition penalty.

    Returns ids, int64, and p, float64 of sum 1, of at least one token; with temperature 0 of one.
    """
    if sampling.repetition_penalty != 1:
        logits_V = penalised(logits_V, seen_T, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return np.array([np.argmax(logits_V)]), np.ones(1)
    ids = np.argsort(-logits_V, kind="stable")[: sampling.top_k]
    sorted_logits = logits_V[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0: -inf, hence probability 0
        p = np.exp((sorted_logits - sorted_logits[0]) / sampling.temperature)
    p /= p.sum()
    if sampling.top_p is not None:
        p = p[: nucleus_size(p, sampling.top_p)]
        p /= p.sum()
    if sampling.min_p is not None:
        p = p[: min_p_size(p, sampling.min_p)]
        p /= p.sum()
    return ids[: len(p)], p


def next_token(
    logits_V: FloatArray, sampling: Sampling, seen_T: IntArray, rng: np.random.Generator
) -> int:
    """Draw one of the `candidates`. With temperature 0 nothing is drawn from `rng`."""
    ids, p = candidates(logits_V, sampling, seen_T)
    return int(ids[0] if sampling.temperature == 0 else ids[rng.choice(len(ids), p=p)])
