"""Evaluation speed, forward and loss, beside a peer: the same weights and batches.

    python -m benchmarks.evaluate [--size A|B] [--model dense|smoe|mhmoe|mhmoe-bitnet|mixtral]
                            [--peer torch|torch-compile|hf-mixtral] [--threads N]
                            [--blas own|openblas|mkl] [--json]

See `compare` for how it is measured. Writes the row and a plot into the machine's folder
of benchmarks/results.
"""

from benchmarks.report import main

if __name__ == "__main__":
    main("evaluate", __doc__ or "")
