"""Tokens a second of generation beside transformers' `generate`, and what memory would allow.

    python -m benchmarks.decode [--sequences 1 4 16] [--prompt 512] [--blas openblas|mkl]
    python -m benchmarks.decode --positions 2048     whether a later token costs more (`positions.py`)

Both sides have the same weights in float32, those of --model CKPT or a Llama of 135 million parameters
drawn at random, and are processes of their own. First the log-probabilities of some tokens must agree.
Then they take turns as in `benchmarks.train`. The share of bandwidth is the time in which the same
threads read as many bytes as a step needs, weights once and keys and values, over the step's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

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
from mhmoe_np.checkpoints.checkpoint import load_parameters, save_model
from mhmoe_np.exchange.hf_export import exported_as, write_hf
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.operations.load import cores, load_operations
from mhmoe_np.settings.model import ModelConfig

LLAMA_135M = {
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
TOLERANCE = 1e-4  # of a log-probability, absolute
WARM_TOKENS = 4


def bytes_a_token(config: ModelConfig, count: int, sequences: int, positions: float) -> float:
    """What one step reads: every weight once, and each sequence's keys and values.

    Of an embedding that is no output head a step reads single rows, which are left out.
    """
    untied = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return 4.0 * (count - untied + sequences * positions * cached)


def check_agreement(ours: list[float], theirs: list[float]) -> None:
    """Of log-probabilities.

    Raises SystemExit: they differ by more than rounding.
    """
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the sides' log-probabilities differ by {difference}; no report")


def measure(parameters: Parameters, options: argparse.Namespace) -> dict[str, Any]:
    """The whole report.

    Raises SystemExit: the two sides disagree, or the machine is busy.
    """
    config = parameters.config
    with tempfile.TemporaryDirectory() as folder:
        own, theirs = Path(folder, "ours"), Path(folder, "hf")
        own.mkdir(), theirs.mkdir()
        save_model(own, parameters, None)
        as_theirs = exported_as(config, ours=False, packed=None)
        write_hf(theirs, as_theirs, parameters, None, (), ops=load_operations("numpy"))
        sides = [
            Process(module, ["--model", str(path), "--threads", str(options.threads)])
            for module, path in (("benchmarks.decode_ours", own), ("benchmarks.decode_hf", theirs))
        ]
    for sequences in options.sequences:
        check_agreement(*(side.ask(f"score {sequences}") for side in sides))
    read_bytes = bandwidth(options.threads, options.repeats)
    rows = []
    for sequences in options.sequences:
        times, dropped = interleave(
            sides, f"decode-{sequences}", WARM_TOKENS, options.repeats, options.disturbed
        )
        seconds, peer_seconds = map(min, times)
        needed = bytes_a_token(config, parameters.count, sequences, PROMPT)
        rows.append(
            {
                "work": "decode",
                "sequences": sequences,
                "ours_tokens_per_s": round(sequences / seconds, 2),
                "peer_tokens_per_s": round(sequences / peer_seconds, 2),
                "ratio": round(peer_seconds / seconds, 3),
                "ours_ms": round(seconds * 1e3, 3),
                "mb_a_step": round(needed / 1e6, 1),
                "share_of_bandwidth": round(needed / seconds / read_bytes, 3),
                "disturbed_rounds": dropped,
            }
        )
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
        "peer": "transformers",
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
    parser.add_argument("--model", type=Path, help="a checkpoint; default: random weights")
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
        parameters, name = Parameters(ModelConfig.model_validate(LLAMA_135M), np.float32), "llama-135m"
        initialise(parameters, seed=0)
    report = {"model": name, **measure(parameters, options)}
    folder = options.results or folder_of(report["machine"])
    write_results(folder, f"{KIND}{name}{tag(report['blas'])}-{options.threads}", report)
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
