"""Encoding in several processes at once, with the same result, in the same order, as in one.

Processes of their own, started anew: threads would wait for each other, and a copy of a process with
threads may hang.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tokenizers import Tokenizer

from mhmoe_np.data.chunks import Chunk, ChunkEncoder, EncodedChunk
from mhmoe_np.errors import UserError

PACKAGE_PARENT = Path(__file__).parents[2]


def encode_chunks(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, tokenizer_file: Path, *, workers: int
) -> Generator[EncodedChunk, None, None]:
    """The ids of each chunk, in order.

    tokenizer_file: where `tokenizer` is saved, for other processes.
    workers: processes; 1: this one alone.

    Raises UserError: the tokenizer cannot encode a text, or a process ended.
    """
    if workers == 1:
        encoder = ChunkEncoder(tokenizer)
        yield from map(encoder.encode, chunks)
        return
    with contextlib.ExitStack() as stack:
        processes = [_start(tokenizer_file) for _ in range(workers)]
        threads = ThreadPoolExecutor(workers)
        # A process that is killed ends its thread's wait as well.
        stack.callback(threads.shutdown, cancel_futures=True)
        for process in processes:
            stack.callback(_end, process)
        free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in processes:
            free.put(process)

        def encode(chunk: Chunk) -> EncodedChunk:
            process = free.get()
            try:
                return _ask(process, chunk)
            finally:
                free.put(process)

        waiting: deque[Future[EncodedChunk]] = deque()
        for chunk in chunks:
            waiting.append(threads.submit(encode, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start(tokenizer_file: Path) -> subprocess.Popen[bytes]:
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "mhmoe_np.data.encoding_process", str(tokenizer_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def _ask(process: subprocess.Popen[bytes], chunk: Chunk) -> EncodedChunk:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pickle.dump(chunk, process.stdin, protocol=5)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError):
        raise UserError(
            "a process that encodes text ended (was it killed, or out of memory?); "
            "start again, with fewer --workers"
        ) from None
    if isinstance(answer, str):
        raise UserError(answer)
    encoded: EncodedChunk = answer
    return encoded


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what it was still to be told
                stream.close()
