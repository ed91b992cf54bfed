"""The other end of `encoding_pool`: chunks from standard input, their ids to standard output.

It ends when its input does, however the process that started it ended.
"""

from __future__ import annotations

import pickle
import signal
import sys


def main() -> None:
    """Encode chunk after chunk, a list of pieces each, as `encode_chunk` does."""
    for kind in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)  # the terminal tells everyone; who started this one decides
    from mhmoe_np.data.chunks import ChunkEncoder
    from mhmoe_np.data.tokenizer import load_tokenizer
    from mhmoe_np.errors import UserError

    encoder = ChunkEncoder(load_tokenizer(sys.argv[1]))
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: object = encoder.encode(chunk)
        except UserError as error:
            answer = str(error)
        pickle.dump(answer, sys.stdout.buffer, protocol=5)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
