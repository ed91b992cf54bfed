"""A run's figures for TensorBoard, beside the logs: event files in the run folder's `tensorboard/`.

The records are made by tensorboardX and written in the thread of the run: a full disk is met here and
not in a thread that nobody asks.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mhmoe_np.training.router_statistics import LayerRouting
from mhmoe_np.types import FloatArray, IntArray

FOLDER = "tensorboard"
OF_A_DOMAIN = "mean_nll", "token_ppl", "bits_per_byte"  # of its scores


class EventFile:
    """One sitting's event file; what older ones say of later steps no longer counts."""

    def __init__(self, run: Path, *, step: int) -> None:
        """Go on after `step`.

        Raises OSError: the file cannot be made.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000:020d}.{os.getpid()}"
        self._path, self._event = folder / name, Event
        self._file = RecordWriter(str(self._path))
        self._end = weakref.finalize(self, _close, self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, report: dict[str, Any], routings: Sequence[LayerRouting]) -> None:
        """One step: every number of its line in `metrics.jsonl`, and what its routers did.

        Raises OSError: the disk is full or refuses.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=number)
            for tag, number in _scalars(report).items()
            if tag != "step"
        ]
        for routing in routings:
            layer = f"router/layer_{routing.layer}"
            values += [
                Summary.Value(tag=f"{layer}/{name}", simple_value=getattr(routing, name))
                for name in ("logit_min", "logit_max", "top_probability")
            ]
            values.append(_histogram(f"{layer}/load", routing.choice_HE.sum(axis=0)))
            values.append(_histogram(f"{layer}/gate_mass", routing.gate_HE.sum(axis=0)))
            for head, (choice_E, gate_E) in enumerate(
                zip(routing.choice_HE, routing.gate_HE, strict=True)
            ):
                values.append(_histogram(f"{layer}/head_{head}/load", choice_E))
                values.append(_histogram(f"{layer}/head_{head}/gate_mass", gate_E))
        self._write(step=report["step"], summary=Summary(value=values))

    def add_validation(self, report: dict[str, Any]) -> None:
        """A line of `validation.jsonl`: the mean NLL, and what compares of each domain's scores.

        Raises OSError: the disk is full or refuses.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {"mean_nll": report["mean_nll"]}
        for domain, scores in report["domains"].items():
            numbers |= {f"{domain}/{name}": scores[name] for name in OF_A_DOMAIN}
        values = [
            Summary.Value(tag=f"validation/{tag}", simple_value=number)
            for tag, number in numbers.items()
            if number is not None
        ]
        self._write(step=report["step"], summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        record = self._event(wall_time=time.time(), **fields).SerializeToString()
        with self._named_errors():
            self._file.write(record)

    def flush(self) -> None:
        """Wait until the disk has it.

        Raises OSError: the disk is full or refuses.
        """
        with self._named_errors():
            self._file.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        """Nothing more comes."""
        self._end()


def _close(file: Any) -> None:
    with suppress(OSError):  # of what is still to be written, which a full disk was asked for already
        file.close()


def _scalars(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Tag -> number, of a line and what is nested in it."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            for part in value:
                layer = part["layer"]
                rest = {name: number for name, number in part.items() if name != "layer"}
                found |= _scalars(rest, f"{prefix}{key}/layer_{layer}/")
        else:
            found[prefix + key] = value
    return found


def _histogram(tag: str, weight_E: IntArray | FloatArray) -> Any:
    """The experts' shares as the distribution of the chosen expert's number."""
    from tensorboardX.summary import histogram_raw

    number_E, total = np.arange(len(weight_E)), float(weight_E.sum())
    summary = histogram_raw(
        tag,
        min=0.0,
        max=len(weight_E) - 1.0,
        num=total,
        sum=float(number_E @ weight_E),
        sum_squares=float(number_E**2 @ weight_E),
        bucket_limits=(number_E + 0.5).tolist(),
        bucket_counts=weight_E.tolist(),
    )
    return summary.value[0]
