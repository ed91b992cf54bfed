"""A machine with a GPU needs little else: CuPy, and what the settings, files and tokenizers need.

The modules that such a machine may lack are refused here, as if they were not installed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.libraries import DISPENSABLE

ROOT = Path(__file__).parents[1]

REFUSE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""

WORK = """
import numpy as np

from tests.cuda.backend import cuda_operations
from mhmoe_np.audit.models import parameters
from mhmoe_np.audit.trace import trace
from mhmoe_np.inference.evaluate import evaluate, score_stream
from mhmoe_np.inference.generate import generate
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.loss import Batch
from mhmoe_np.model.moments import Moments
from mhmoe_np.settings.presets import MODEL_PRESETS
from mhmoe_np.settings.run import OptimizerConfig
from mhmoe_np.training.schedule import adamw_settings
from mhmoe_np.training.step import Learner

ops = cuda_operations(keep_buffers=True)
settings = adamw_settings(0, total_steps=1, optimizer=OptimizerConfig())
for kind in ("mh2-shared", "mh2-ternary"):
    initial = parameters(kind, np.float32)
    moments = Moments.zeros(initial.config, np.float32)
    learner = Learner(initial, moments, updates=0, ops=ops)
    tokens = np.random.default_rng(0).integers(0, initial.config.vocab_size, (2, 9))
    for _ in range(3):
        assert learner.step([Batch.of(tokens)], settings).is_finite
    assert trace(learner.model, tokens, gradients=True, ops=ops)
    nll = score_stream(learner.model, tokens.reshape(-1), window=8, batch_tokens=16, ops=ops)
    assert np.isfinite(nll)
    cache = KeyValueCache(learner.model, sequences=2, positions=9, ops=ops)
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 7)):
        with ops.scope():
            logits = ops.to_host(cache.extend(tokens[:, first:last]))
        assert np.isfinite(logits).all()
print("done")
"""

IMPORTS = """
import benchmarks.floors, benchmarks.gpu, benchmarks.gpu_ours, benchmarks.kernel_costs
import tests.conftest, tests.operations.cases
from benchmarks.gpu_report import page

assert tests.operations.cases.FAST.keys() == {tests.operations.cases.CUDA_NAME}
assert page({"facts": {"device": "none", "date": "never"}, "rows": [], "sections": {}}, None)
print("done")
"""

OF_THE_PEER = {"torch"}


def run_without(refused: set[str], code: str) -> None:
    program = f"REFUSED = {sorted(refused)!r}\n{REFUSE}\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


def test_training_evaluation_and_decoding_need_no_library_of_the_cpu() -> None:
    run_without(set(DISPENSABLE), WORK)


def test_the_benchmark_and_the_shared_tests_can_be_imported() -> None:
    run_without(set(DISPENSABLE), IMPORTS)


def test_the_peer_needs_pytorch_alone() -> None:
    code = 'import benchmarks.gpu_peer\nprint("done")'
    run_without(set(DISPENSABLE) - OF_THE_PEER, code)
