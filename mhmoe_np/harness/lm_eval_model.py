"""The model `mhmoe-np` of lm-evaluation-harness (EleutherAI): the extra `lm-eval` installs it.

Importing this module registers it. `loglikelihood_rolling` is the protocol `lm-eval-rolling` of `eval`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from mhmoe_np.checkpoints.checkpoint import (
    find_checkpoint,
    load_checkpoint_tokenizer,
    load_end_of_text,
    load_model,
)
from mhmoe_np.data.tokenizer import end_of_text_id
from mhmoe_np.errors import UserError
from mhmoe_np.inference.generate import generate
from mhmoe_np.inference.protocols import Window, choose_protocol
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.inference.window_losses import window_losses
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName

GENERATED = 256  # tokens at most, where a task does not say


@register_model("mhmoe-np")
class HarnessModel(TemplateLM):
    """A checkpoint, or the last one of a run folder."""

    def __init__(
        self,
        checkpoint: str,
        *,
        backend: BackendName = "numba",
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
    ) -> None:
        """Load it.

        max_length: tokens of a window; None: the model's `max_position_embeddings`.
        batch_size: windows that go through the model at once.
        device: the harness's command line always gives one, as PyTorch calls it; `backend` says where
        to compute.
        Raises UserError: the checkpoint is damaged, or a number is none that the model can take.
        """
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise UserError(f"batch_size {batch_size!r}: must be a number") from None
        found = find_checkpoint(Path(checkpoint))
        self._ops = load_operations(backend, threads=threads, keep_buffers=True)
        self._model = load_model(found, np.float32, ops=self._ops)
        self.tokenizer = load_checkpoint_tokenizer(found)
        self._end_of_text = load_end_of_text(found)
        self._protocol = choose_protocol(
            "lm-eval-rolling", self._model.config, self.tokenizer, window=max_length
        )

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at once."""
        return self._protocol.window

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return end_of_text_id(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which every token is scored."""
        assert self._protocol.bos_token_id is not None
        return self._protocol.bos_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's token ids; special tokens of the tokenizer only where asked for."""
        encoding = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return list(encoding.ids)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text (an instance's only argument), by the protocol `lm-eval-rolling`, in nats."""
        texts = [self.tok_encode(text) for (text,) in (request.args for request in requests)]
        lengths = np.array([len(ids) for ids in texts])
        separated = [token for ids in texts for token in (self.eot_token_id, *ids)][1:]
        ends = np.cumsum(lengths + 1)
        nll = np.zeros(len(texts))
        for window, losses, _ in self._scored(separated, self._protocol.windows(lengths)):
            nll[np.searchsorted(ends, window.end - 1, side="right")] += losses.sum(dtype=np.float64)
        return [-value for value in nll.tolist()]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether each of its tokens is the likeliest."""
        tokens: list[int] = []
        windows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"{self.max_length} positions"
                )
            whole = (context + continuation)[-(self.max_length + 1) :]
            scored = min(len(continuation), len(whole) - 1)
            windows.append(Window(len(tokens), len(tokens) + len(whole), scored, bos=False))
            tokens += whole
        order = sorted(range(len(windows)), key=lambda i: windows[i].inputs)  # little is padded
        found: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        scores = self._scored(tokens, (windows[i] for i in order), likeliest=True)
        for i, (_, losses, likeliest) in zip(order, scores, strict=True):
            found[i] = (-float(losses.sum(dtype=np.float64)), likeliest)
        return found

    def _scored(
        self, tokens: list[int], windows: Iterable[Window], *, likeliest: bool = False
    ) -> Iterable[tuple[Window, Any, bool]]:
        return window_losses(
            self._model,
            np.array(tokens, np.int64),
            windows,
            bos_token_id=self._protocol.bos_token_id,
            batch_tokens=self.batch_size * self.max_length,
            ops=self._ops,
            likeliest=likeliest,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string of its arguments.

        Of a context that leaves no room for `max_gen_toks`, its end is taken.

        Raises UserError: `max_gen_toks` is no less than the model's positions.
        """
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, arguments: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(arguments, GENERATED)
        stops = tuple(stop for stop in wanted["until"] if stop)
        most = wanted["max_gen_toks"]
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"max_gen_toks {most}: must be less than the model's {self.max_length} positions"
            )
        ids = self.tok_encode(context)
        if len(ids) > room:
            context = self.tokenizer.decode(ids[-room:], skip_special_tokens=False)
        sampling = Sampling(
            temperature=wanted.get("temperature", 1.0) if wanted["do_sample"] else 0.0,
            top_k=wanted.get("top_k"),
            top_p=wanted.get("top_p"),
        )
        return "".join(
            generate(
                self._model,
                self.tokenizer,
                context,
                max_new_tokens=most,
                sampling=sampling,
                stop=stops,
                end_of_text=self._end_of_text,
                ops=self._ops,
            )
        )
