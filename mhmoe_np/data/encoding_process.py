"""The other end of `encoding_pool`: chunks from standard input, their ids to standard output.

It ends when its input does, however the process that started it ended.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys


def main() -> None:
    """Encode chunk after chunk, a list of pieces each, as `ChunkEncoder` does."""
    for kind in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # A terminal tells every process; the one that started this one decides.
        signal.signal(kind, signal.SIG_IGN)
    from mhmoe_np.data.chunks import ChunkEncoder
    from mhmoe_np.data.tokenizer import load_tokenizer
    from mhmoe_np.errors import UserError

    encoder = ChunkEncoder(load_tokenizer(sys.argv[1]))
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):
            return
        try:
            answer: object = encoder.encode(chunk)
        except UserError as error:
            answer = str(error)
        try:
            pickle.dump(answer, sys.stdout.buffer, protocol=5)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(1)  # nobody is there who could be told, and the interpreter would try


if __name__ == "__main__":
    main()
