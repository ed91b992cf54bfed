"""The other side of `benchmarks.decode`: `generate` of Hugging Face transformers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.decode_protocol import PROMPT, log_probability, read_options, serve


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Asked after each token whether to stop, it notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class HfSide:
    """See `decode_protocol.Side`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.inference_mode()
    def score(self, ids: np.ndarray) -> list[float]:
        given, found, past = torch.from_numpy(ids), [], None
        for first, last in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, ids.shape[1] - 1))]:
            out = self._model(given[:, first:last], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(log_probability(out.logits[0, -1].numpy(), ids[0, last]))
        return found

    @torch.inference_mode()
    def decode(self, prompt: np.ndarray, tokens: int) -> float:
        clock, given = Clock(), torch.from_numpy(prompt)
        self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times[-1] - clock.times[0]

    @torch.inference_mode()
    def prefill(self, prompt: np.ndarray) -> float:
        given = torch.from_numpy(prompt)
        start = time.perf_counter()
        self._model(given, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def main() -> None:
    options = read_options(__doc__ or "")
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    serve(HfSide(model), model.config.vocab_size)


if __name__ == "__main__":
    main()
