"""One side of `benchmarks.decode`: a process that answers a line with a line.

    python -m benchmarks.decode_SIDE --model FOLDER --threads 2

`ready` comes once, when it has loaded. `score B` -> the log-probabilities of known tokens as B
sequences are decoded; `decode-B N` -> the seconds that N tokens of each of B sequences took after
short prompts; `prefill-T N` -> the seconds that reading a prompt of T tokens took, N times; `quit` ends
it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mhmoe_np.model.head import HeadDtype

PROMPT = 16  # tokens before the first one that is timed
ROUND = 64  # tokens after one prompt, at most
SCORED = 8  # tokens that the sides must agree on


class Side(Protocol):
    """What a side can do; ids are int64 [B, T]."""

    def score(self, ids: np.ndarray) -> list[float]:
        """The log-probability of each token after the prompt, decoded one by one, of the first one."""
        ...

    def decode(self, prompt: np.ndarray, tokens: int) -> float:
        """The seconds that so many tokens took, after the first."""
        ...

    def prefill(self, prompt: np.ndarray) -> float:
        """The seconds that reading it took, up to the logits after its last token."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A side whose choices can be asked for."""

    def tokens(self, prompt: np.ndarray, count: int) -> list[float]:
        """The likeliest tokens after a prompt, each with those before it."""
        ...


class Options(argparse.Namespace):
    """The command line of a side."""

    model: Path
    threads: int
    head: HeadDtype  # of our side alone


def read_options(description: str) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--head", default="float32")
    return parser.parse_args(namespace=Options())


def ids_of(sequences: int, length: int, vocabulary: int) -> np.ndarray:
    """The same tokens on all sides."""
    return np.random.default_rng(sequences).integers(0, vocabulary, (sequences, length))


def log_probability(logits: np.ndarray, token: int) -> float:
    wide = logits.astype(np.float64)
    highest = wide.max()
    return float(wide[token] - highest - np.log(np.exp(wide - highest).sum()))


def serve(side: Side, vocabulary: int) -> None:
    """Answer requests until `quit` or the end of the input."""
    print("ready", flush=True)
    for line in sys.stdin:
        work, _, count = line.strip().partition(" ")
        kind, _, size = work.partition("-")
        if kind == "quit":
            break
        if kind == "score":
            answer = side.score(ids_of(int(count), PROMPT + SCORED, vocabulary))
            print(*map(repr, answer), flush=True)
        elif kind == "decode":
            prompt, left = ids_of(int(size), PROMPT, vocabulary), int(count)
            rounds = [min(ROUND, left - done) for done in range(0, left, ROUND)]
            print(sum(side.decode(prompt, tokens) for tokens in rounds), flush=True)
        elif kind == "prefill":
            prompt = ids_of(1, int(size), vocabulary)
            print(sum(side.prefill(prompt) for _ in range(int(count))), flush=True)
        elif kind == "tokens" and isinstance(side, Chooser):
            print(*side.tokens(ids_of(1, PROMPT, vocabulary), int(count)), flush=True)
        else:
            raise SystemExit(f"unknown request {line!r}")
