import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mhmoe_np.data.interruptible import interruptible

DNA = (
    "import random\n"
    "table = bytes(b'ACGT'[byte % 4] for byte in range(256))\n"
    "def dna(size, seed=1): return random.Random(seed).randbytes(size).translate(table).decode()\n"
)
# Each takes well over 5 s: GPT-2's own cut of one run (merges alone), documents without end (read
# through Python all the while), a large text, and encoding.
CALLS = {
    "merging": (
        "from tokenizers import Tokenizer, models, pre_tokenizers, trainers\n"
        "from mhmoe_np.data.interruptible import interruptible\n"
        "tokenizer = Tokenizer(models.BPE())\n"
        "tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)\n"
        "trainer = trainers.BpeTrainer(vocab_size=4096, show_progress=False)\n"
        "texts = [dna(600_000)]\n"
        "def call(): interruptible(lambda: tokenizer.train_from_iterator(texts, trainer))\n"
    ),
    "reading": (
        "import itertools\n"
        "from mhmoe_np.data.tokenizer import train_tokenizer\n"
        "texts = itertools.cycle(['some text', 'some more of it'])\n"
        "def call(): train_tokenizer(texts, vocab_size=4096)\n"
    ),
    "training": (
        "from mhmoe_np.data.tokenizer import train_tokenizer\n"
        "texts = [dna(2_000_000, seed) for seed in range(20)]\n"
        "def call(): train_tokenizer(texts, vocab_size=4096)\n"
    ),
    "encoding": (
        "from mhmoe_np.data.tokenise import tokenise\n"
        "from mhmoe_np.data.tokenizer import train_tokenizer\n"
        "tokenizer = train_tokenizer([dna(10_000)], vocab_size=400)\n"
        "texts = [dna(4_000_000)] * 40\n"
        "def call(): tokenise(texts, tokenizer)\n"
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_process_ends_at_once(name):
    code = f"{DNA}{CALLS[name]}print('ready', flush=True)\ncall()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - sent < 2
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "panicked" not in errors


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stderr == ""
    return result.stdout


def test_what_a_handler_raises_leaves_a_call_that_goes_on_and_the_process_ends_without_it():
    code = (
        "import os, signal, sys, threading, time\n"
        "from mhmoe_np.data.interruptible import interruptible\n"
        "def handler(*_): raise ValueError('told to end')\n"
        "signal.signal(signal.SIGTERM, handler)\n"
        "threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()\n"
        "started = time.monotonic()\n"
        "try: interruptible(lambda: time.sleep(1000))\n"
        "except ValueError as error: print(error, time.monotonic() - started < 2)\n"
    )
    assert run_python(code) == "told to end True\n"


def test_what_a_handler_raises_is_not_put_down_to_the_text():
    code = (
        "import os, signal, threading, time\n"
        "from mhmoe_np.data.tokenise import tokenise\n"
        "class Slow:\n"
        "    def get_vocab(self): return {'</s>': 0}\n"
        "    def token_to_id(self, name): return 0\n"
        "    def encode_batch_fast(self, *_, **__): time.sleep(1000)\n"
        "def handler(*_): raise ValueError('told to end')\n"
        "signal.signal(signal.SIGTERM, handler)\n"
        "threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()\n"
        "try: tokenise(['text'], Slow())\n"
        "except ValueError as error: print(error)\n"
    )
    assert run_python(code) == "told to end\n"


def test_the_call_gives_what_it_returns():
    assert interruptible(lambda: [1, 2]) == [1, 2]


@pytest.mark.parametrize("error", [ValueError("a fault"), SystemExit(3), KeyboardInterrupt()])
def test_what_the_call_raises_is_raised(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        interruptible(fail)
    assert caught.value is error


def test_it_may_be_called_in_any_thread():
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(interruptible(os.getpid)))
    thread.start()
    thread.join()
    assert results == [os.getpid()]
