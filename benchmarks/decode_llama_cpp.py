"""The other side of `benchmarks.decode`: llama.cpp, by the wheel `xllamacpp`, on the model as GGUF.

It makes one text at a time here. Its own clock says how long reading the prompt and each further token
took; a text's first token counts as reading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from benchmarks.decode_protocol import PROMPT, read_options, serve

FLOAT32 = 0  # its number for numbers of a cache
ALL_WEIGHTS = "Q8_0"  # what the matrices become with `--weights int8`


class LlamaSide:
    """See `decode_protocol.Side`."""

    def __init__(self, server: Any, tokens: list[str]) -> None:
        self._server, self._vocabulary = server, len(tokens)
        # Of a token that is part of a character it gives no probabilities: this one is drawn then.
        self._whole = tokens.index("a")

    def _made(self, ids: np.ndarray, tokens: int, probabilities: int = 0) -> dict[str, Any]:
        if len(ids) != 1:
            raise SystemExit("beside llama.cpp: give --sequences 1")
        request = {
            "prompt": ids[0].tolist(),
            "n_predict": tokens,
            "n_probs": probabilities,
            "temperature": 0,
            "logit_bias": [[self._whole, 1000]] if probabilities else [],
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer: dict[str, Any] = self._server.handle_completions(request)
        return answer

    def score(self, ids: np.ndarray) -> list[float]:
        found = []
        for last in range(PROMPT, ids.shape[1]):
            made = self._made(ids[:, :last], 1, self._vocabulary)
            said = made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append(next(each["logprob"] for each in said if each["id"] == ids[0, last]))
        return found

    def decode(self, prompt: np.ndarray, tokens: int) -> float:
        timings = self._made(prompt, tokens + 1)["timings"]
        if timings["predicted_n"] != tokens + 1:
            raise SystemExit(f"llama.cpp made {timings['predicted_n']} tokens of {tokens + 1}")
        return float(timings["predicted_ms"]) * 1e-3

    def prefill(self, prompt: np.ndarray) -> float:
        return float(self._made(prompt, 1)["timings"]["prompt_ms"]) * 1e-3


def to_8_bits(source: Path, target: Path) -> None:
    """A GGUF file with its matrices as Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    wanted = gguf.GGMLQuantizationType[ALL_WEIGHTS]
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    options = read_options(__doc__ or "")
    given = xllamacpp.CommonParams()
    given.model.path = str(options.model)
    given.n_ctx, given.n_parallel, given.verbosity = 1024, 1, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = options.threads
    reader = gguf.GGUFReader(options.model)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    if ALL_WEIGHTS not in kinds:  # else its cache stays in float16, as is its way
        given.cache_type_k = given.cache_type_v = FLOAT32
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    serve(LlamaSide(xllamacpp.Server(given), tokens), len(tokens))


if __name__ == "__main__":
    main()
