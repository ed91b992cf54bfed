"""Long calls into a compiled library, made so that a signal ends the wait for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

# The end of the call ends the wait in any case. A system whose signals do not wake a waiting thread
# (Windows) runs their handlers this often.
SECONDS_BETWEEN_HANDLERS = 0.1


def interruptible(call: Callable[[], T]) -> T:
    """Make a call in a thread of its own and wait for it, in any thread.

    Python runs the handlers of signals in the main thread, between two of its instructions. A call
    into a compiled library is one instruction, however long; a wait for a thread is many. `call` must
    let other threads run, as `tokenizers` does while it trains and encodes.

    What a handler raises leaves this function at once. Nothing can stop `call` itself: it goes on
    without a caller until it is done or the process ends, which does not wait for it.

    Raises what `call` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # The library's panics are no Exception.
            outcome.set_exception(error)

    # A daemon, or the interpreter would wait for it before it ends.
    thread = Thread(target=run, name="interruptible", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SECONDS_BETWEEN_HANDLERS)
    return outcome.result()
