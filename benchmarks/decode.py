"""Tokens a second of generation beside another program's, and what memory would allow.

    python -m benchmarks.decode [--beside transformers] [--sequences 1 4 16] [--prompt 512]
    python -m benchmarks.decode --beside llama.cpp|llama.cpp-8-bit --model CKPT --sequences 1
    python -m benchmarks.decode --beside own-float32 --preset paper-dense
    python -m benchmarks.decode --positions 2048     whether a later token costs more (`positions.py`)

Both sides have the same weights, those of --model CKPT or of a preset drawn at random (`llama-135m` is
a Llama of 135 million parameters), and are processes of their own. First the log-probabilities of some
tokens must agree. Then they take turns as in `benchmarks.train`. What is compared:

    transformers        float32, and `generate` of transformers
    llama.cpp           float32, and llama.cpp's F32 (`pip install xllamacpp`); CKPT has a tokenizer
    llama.cpp-8-bit     `pack --format int8` and `--head-dtype int8`, and llama.cpp's Q8_0
    own-float32         a ternary model packed to 2 bits with `--head-dtype exact`, which must make the
                        tokens of its float32 head, and our float32 decoding of a model of this size

The share of bandwidth is the time in which the same threads read as many bytes as a step needs, weights
once and keys and values, over the step's; of a model with experts, which reads some, it is not given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.compare import Process, interleave
from benchmarks.decode_ours import bandwidth
from benchmarks.decode_protocol import PROMPT
from benchmarks.machines import (
    add_blas_option,
    described,
    folder_of,
    machine,
    tag,
    use_blas,
    write_results,
)
from benchmarks.positions import along
from mhmoe_np.checkpoints.checkpoint import (
    find_tokenizer,
    load_parameters,
    save_model,
    save_packed_model,
)
from mhmoe_np.exchange.gguf_export import export_gguf
from mhmoe_np.exchange.hf_export import exported_as, write_hf
from mhmoe_np.model.packed import pack_int8, pack_weights
from mhmoe_np.model.parameters import Parameters, initialise, output_name
from mhmoe_np.model.weights import EMBEDDING, Weights
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.operations.table import PackedWeight, Weight
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.settings.presets import MODEL_PRESETS

LLAMA_NAME = "llama-135m"
LLAMA_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
KIND = "decode-"  # how the names of reports begin
WARM_TOKENS = 4
SAME_TOKENS = 64  # that an exact head must choose as the float32 head does


class Beside(NamedTuple):
    """What is compared with what."""

    module: str  # of the other side
    weights: str  # ours
    head: str  # ours, as `--head-dtype`
    tolerance: float  # of a log-probability, absolute; infinite: the two are not the same model


BESIDE = {
    "transformers": Beside("benchmarks.decode_hf", "float32", "float32", 1e-4),
    "llama.cpp": Beside("benchmarks.decode_llama_cpp", "float32", "float32", 1e-3),
    # Each rounds in its own way: of SmolLM2-135M both are up to 0.3 from float32, for unlikely tokens.
    "llama.cpp-8-bit": Beside("benchmarks.decode_llama_cpp", "int8", "int8", 0.5),
    "own-float32": Beside("benchmarks.decode_ours", "ternary-2bit", "exact", np.inf),
}
# Bytes of a number of the output head; an exact one reads few rows in float32 besides.
HEAD_BYTES = {"float32": 4.0, "int8": 34 / 32, "exact": 34 / 32}


def bytes_of(weight: Weight) -> int:
    """What reading all of it takes."""
    if isinstance(weight, PackedWeight):
        return int(weight.w.code.nbytes + weight.beta.nbytes)
    return int(weight.nbytes)  # type: ignore[union-attr]


def bytes_a_step(weights: Weights, head: str, sequences: int, positions: float) -> float:
    """What one step reads: every weight once, and each sequence's keys and values.

    Of an embedding that is no output head a step reads single rows, which are left out.
    """
    config, total = weights.config, 0.0
    for name, weight in weights.arrays.items():
        if name == output_name(config):
            total += config.vocab_size * config.hidden_size * HEAD_BYTES[head]
        elif name != EMBEDDING:
            total += bytes_of(weight)
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return total + 4.0 * sequences * positions * cached


def check_agreement(ours: list[float], theirs: list[float], *, tolerance: float) -> None:
    """Of log-probabilities.

    Raises SystemExit: they differ by more than rounding.
    """
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    if not difference <= tolerance:
        raise SystemExit(f"the sides' log-probabilities differ by {difference}; no report")


def our_weights(parameters: Parameters, kind: str) -> Weights:
    """The host's, of a kind of `Beside.weights`."""
    ops = load_operations("numba")
    if kind == "float32":
        return Weights(parameters.config, parameters.arrays)
    if kind == "int8":
        return pack_int8(parameters, ops=ops)
    return pack_weights(parameters.to_device(ops), "ternary-2bit", ops=ops).to_host(ops)


def unquantised(parameters: Parameters) -> Parameters:
    """A model of float32 weights of the same size."""
    config = ModelConfig.model_validate(
        parameters.config.model_dump() | {"quantization": "none", "use_sub_norm": False}
    )
    floats = Parameters(config, np.float32)
    initialise(floats, seed=0)
    return floats


def write_sides(
    folder: Path, parameters: Parameters, weights: Weights, checkpoint: Path | None, beside: str
) -> tuple[Path, Path]:
    """What each side reads, written into a folder."""
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir(), theirs.mkdir()
    if BESIDE[beside].weights == "float32":
        save_model(ours, parameters, None)
    else:
        save_packed_model(ours, parameters.config, weights, None)
    if beside == "transformers":
        as_theirs = exported_as(parameters.config, ours=False, packed=None)
        write_hf(theirs, as_theirs, parameters, None, (), ops=load_operations("numpy"))
        return ours, theirs
    if beside == "own-float32":
        save_model(theirs, unquantised(parameters), None)
        return ours, theirs
    tokenizer = find_tokenizer(checkpoint) if checkpoint else None
    if tokenizer is None:
        raise SystemExit(f"--beside {beside}: give --model CKPT of a model with a tokenizer")
    from benchmarks.decode_llama_cpp import to_8_bits

    export_gguf(parameters, tokenizer, theirs / "float32.gguf")
    if beside == "llama.cpp":
        return ours, theirs / "float32.gguf"
    to_8_bits(theirs / "float32.gguf", theirs / "8-bit.gguf")
    return ours, theirs / "8-bit.gguf"


def measure(parameters: Parameters, options: argparse.Namespace) -> dict[str, Any]:
    """The whole report.

    Raises SystemExit: the two sides disagree, or the machine is busy.
    """
    beside = BESIDE[options.beside]
    weights = our_weights(parameters, beside.weights)
    threads = ("--threads", str(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        own, theirs = write_sides(Path(folder), parameters, weights, options.model, options.beside)
        ours = Process("benchmarks.decode_ours", ["--model", str(own), *threads, "--head", beside.head])
        if beside.head == "exact":
            plain = Process("benchmarks.decode_ours", ["--model", str(own), *threads])
            request = f"tokens {SAME_TOKENS}"
            if ours.ask(request) != plain.ask(request):
                raise SystemExit("the exact head makes other tokens than the float32 head; no report")
            plain.end()
        sides = [ours, Process(beside.module, ["--model", str(theirs), *threads])]
    if np.isfinite(beside.tolerance):
        for sequences in options.sequences:
            check_agreement(
                *(side.ask(f"score {sequences}") for side in sides), tolerance=beside.tolerance
            )
    read_bytes = bandwidth(options.threads, options.repeats)
    rows: list[dict[str, Any]] = []
    for sequences in options.sequences:
        times, dropped = interleave(
            sides, f"decode-{sequences}", WARM_TOKENS, options.repeats, options.disturbed
        )
        seconds, peer_seconds = map(min, times)
        needed = bytes_a_step(weights, beside.head, sequences, PROMPT)
        rows.append(
            {
                "work": "decode",
                "sequences": sequences,
                "ours_tokens_per_s": round(sequences / seconds, 2),
                "peer_tokens_per_s": round(sequences / peer_seconds, 2),
                "ratio": round(peer_seconds / seconds, 3),
                "ours_ms": round(seconds * 1e3, 3),
                "disturbed_rounds": dropped,
            }
        )
        if not parameters.config.num_experts:
            rows[-1] |= {
                "mb_a_step": round(needed / 1e6, 1),
                "share_of_bandwidth": round(needed / seconds / read_bytes, 3),
            }
    times, dropped = interleave(
        sides, f"prefill-{options.prompt}", 1, options.repeats, options.disturbed
    )
    seconds, peer_seconds = map(min, times)
    rows.append(
        {
            "work": "prefill",
            "tokens": options.prompt,
            "ours_tokens_per_s": round(options.prompt / seconds, 1),
            "peer_tokens_per_s": round(options.prompt / peer_seconds, 1),
            "ratio": round(peer_seconds / seconds, 3),
            "disturbed_rounds": dropped,
        }
    )
    for side in sides:
        side.end()
    blas = load_operations("numba").blas()
    assert blas is not None
    return {
        "parameters": parameters.count,
        "weights": beside.weights,
        "head": beside.head,
        "peer": options.beside,
        "threads": options.threads,
        "gb_per_s": round(read_bytes / 1e9, 2),
        "rounds": options.repeats,
        "rows": rows,
        "blas": blas._asdict(),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", choices=BESIDE, default="transformers")
    parser.add_argument("--model", type=Path, help="a checkpoint")
    parser.add_argument(
        "--preset",
        choices=[LLAMA_NAME, *MODEL_PRESETS],
        default=LLAMA_NAME,
        help="without --model: whose weights are drawn",
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is read")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=7, help="undisturbed turns of each side")
    parser.add_argument(
        "--disturbed", type=float, default=0.05, help="share of others that spoils a turn"
    )
    parser.add_argument("--positions", type=int, help="cost along so many positions, of our side alone")
    parser.add_argument(
        "--results", type=Path, help="where the report is written; default: the machine's folder"
    )
    add_blas_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    use_blas(options.blas)
    if options.positions:
        along(options.positions, options.threads)
        return
    if options.model:
        parameters, name = load_parameters(options.model, np.float32), options.model.name
    else:
        settings = (
            LLAMA_135M if options.preset == LLAMA_NAME else MODEL_PRESETS[options.preset].model_dump()
        )
        if options.beside == "own-float32":
            settings |= {"quantization": "bitnet_b158", "use_sub_norm": True}
        parameters, name = Parameters(ModelConfig.model_validate(settings), np.float32), options.preset
        initialise(parameters, seed=0)
    report = {"model": name, **measure(parameters, options)}
    folder = options.results or folder_of(report["machine"])
    write_results(
        folder, f"{KIND}{name}-{options.beside}{tag(report['blas'])}-{options.threads}", report
    )
    if options.json:
        print(json.dumps(report))
        return
    print(
        f"{report['machine']}, {described(report['blas'])}: {report['gb_per_s']} GB/s with "
        f"{options.threads} threads"
    )
    for row in report["rows"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
