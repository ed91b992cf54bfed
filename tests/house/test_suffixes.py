"""Array names end in their axes: the letters are those of the key, and the arrays have these shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.audit.trace import trace
from mhmoe_np.inference.evaluate import score_stream
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.head import ExactHead
from mhmoe_np.model.language_model import Model, forward
from mhmoe_np.model.loss import Batch, loss
from mhmoe_np.model.moments import Moments
from mhmoe_np.model.packed import pack_int8, pack_weights, unpack_int8, unpack_weights
from mhmoe_np.model.parameters import Parameters, initialise
from mhmoe_np.model.weights import formats_for
from mhmoe_np.operations.door import axes_of
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import AdamWSettings, Operations
from mhmoe_np.settings.model import ModelConfig
from mhmoe_np.training.step import Learner
from mhmoe_np.types import DIMENSIONS
from tests.house.watch import PACKAGE, Watch

MODULES = sorted(PACKAGE.rglob("*.py"))


def names_in(text: str) -> Iterator[str]:
    """Variables, parameters, fields, attributes and keywords."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name


def suffixed(name: str) -> bool:
    """Whether a name says shapes; constants are in capitals altogether."""
    axes = axes_of(name)
    return axes is not None and not name.isupper() and not all(axis.isdigit() for axis in axes)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_shape_suffix_uses_letters_of_the_key(path: Path) -> None:
    for name in filter(suffixed, names_in(path.read_text(encoding="utf-8"))):
        letters = set(re.sub(r"\d", "", name.rpartition("_")[2]))
        assert letters <= DIMENSIONS.keys(), f"{name}: not in types.DIMENSIONS"


# ---- what they mean ---------------------------------------------------------------------------

# Every letter has a size of its own, so that none can stand for another unnoticed.
COMMON = {
    "vocab_size": 37,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 14,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 17,
    "decoder_sparse_step": 1,
}
HEADS = EXPERTS | {"moe_heads": 3}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"hidden_act": "relu2", "use_sub_norm": True, "tie_word_embeddings": False},
    "dense-sign": {"quantization": "bitnet"},
    "experts": EXPERTS | {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 19},
    "heads": HEADS
    | {
        "moe_projection_bias": True,
        "moe_capacity_factor": 0.6,
        "shared_expert_intermediate_size": 19,
        "router_z_loss_coef": 0.1,
        "router_aux_loss_type": "topk",
        "use_sub_norm": True,
    },
    "heads-alone": HEADS | {"moe_head_layer": False, "moe_merge_layer": False},
    "heads-ternary": HEADS
    | {
        "quantization": "bitnet_b158",
        "quantize_moe_projections": True,
        "moe_capacity_factor": 0.6,
        "shared_expert_intermediate_size": 19,
    },
    "heads-sign": HEADS | {"quantization": "bitnet"},
}
B, T = 2, 13


def all_of(config: ModelConfig, ops: Operations) -> None:
    """Training in one and in two micro-batches, evaluation, decoding, trace, packing; with padding."""
    parameters = Parameters(config, np.float32)
    initialise(parameters, 1)
    learner = Learner(parameters, Moments.zeros(config, np.float32), updates=0, ops=ops)
    windows = np.random.default_rng(2).integers(0, config.vocab_size, (2 * B, T + 1))
    target_BT = windows[:, 1:].copy()
    target_BT[0, 7:] = -100
    whole = Batch(Batch.of(windows).input_BT, target_BT)
    halves = [Batch(whole.input_BT[i : i + B], whole.target_BT[i : i + B]) for i in (0, B)]
    for micro_batches in ([whole], halves):
        learner.step(micro_batches, AdamWSettings(1e-3, 0.9, 0.95, 1e-6, 0.1, 1.0))
    model = learner.model
    learner.parameters.to_host(ops)  # as for a checkpoint
    loss(model, halves, ops=ops)
    score_stream(model, windows.ravel(), window=T, batch_tokens=2 * T, ops=ops)
    cache = KeyValueCache(model, sequences=B, positions=9, ops=ops)
    for new in (5, 1):
        cache.extend(windows[:B, :new])
    trace(model, windows[:B], gradients=True, ops=ops)
    for format in formats_for(config):
        packed = pack_weights(learner.parameters, format, ops=ops)
        forward(Model.with_weights(config, packed, ops=ops), windows[:B], None, drop=False, ops=ops)
        unpack_weights(config, packed, ops=ops)
    in_8_bits = pack_int8(learner.parameters.to_host(ops), ops=ops)
    forward(Model.with_weights(config, in_8_bits, ops=ops), windows[:B], None, drop=False, ops=ops)
    if not config.is_quantised:
        unpack_int8(config, in_8_bits, ops=ops)
    head = ExactHead(model.weights.output_VD, ops=ops)
    cache = KeyValueCache(model, sequences=B, positions=5, head=head.weight, ops=ops)
    scores = cache.extend(windows[:B, :5])
    for count in (1, config.vocab_size):
        assert cache.last_BD is not None
        head.logits(cache.last_BD, 0, scores[0], count)


@pytest.fixture(scope="module")
def watches() -> dict[str, Watch]:
    """Every model, watched on the defining backend."""
    found = {}
    for name, keys in MODELS.items():
        config = ModelConfig.model_validate(COMMON | keys)
        with Watch(config=config) as found[name]:
            all_of(config, load_operations("numpy"))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_arrays_have_the_shapes_that_their_names_say(model: str, watches: dict[str, Watch]) -> None:
    assert list(watches[model].faults) == []


@pytest.mark.parametrize("model", ["heads", "heads-ternary"])
def test_the_methods_of_the_fast_backend_have_them_too(model: str) -> None:
    config = ModelConfig.model_validate(COMMON | MODELS[model])
    ops = load_operations("numba")
    all_of(config, ops)  # the compiler's own functions are many, and nothing to us
    with Watch(config=config) as watch:
        all_of(config, ops)
    assert list(watch.faults) == []
    watched = {place.partition(":")[0] for place, names in watch.seen.items() if names}
    kernels = {f"operations/numba_cpu/{room}.py" for room in ("attention", "linear", "norm")}
    assert kernels <= watched


def test_no_function_of_a_formula_went_unwatched(watches: dict[str, Watch]) -> None:
    watched = {
        place.partition(".<locals>")[0]  # a comprehension's own frame counts for its function
        for watch in watches.values()
        for place, names in watch.seen.items()
        if names
    }
    unwatched = [
        place
        for path in MODULES
        if path.parent.name in ("layers", "model", "numpy_ref")
        for place, text in functions_of(path)
        if any(map(suffixed, names_in(text))) and place not in watched
    ]
    assert unwatched == []


def functions_of(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every function and method that is not inside another one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and not isinstance(node, ast.FunctionDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield f"{path.relative_to(PACKAGE)}: {prefix}{child.name}", ast.unparse(child)


# ---- what is found ------------------------------------------------------------------------------


PLANTED = """
from typing import NamedTuple
import numpy as np

class Pair(NamedTuple):
    x_ND: np.ndarray
    w_D: np.ndarray

def f():
    {}
"""


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("x_ND, w_D = np.zeros((3, 4)), np.zeros(3)", "w_D says D = 3, x_ND says D = 4"),
        ("x_ND, w_DV = np.zeros((3, 4)), np.zeros((5, 4))", "w_DV says D = 5, x_ND says D = 4"),
        ("x_ND = np.zeros(3)", "x_ND has 1 axes [3]; its name says 2"),
        ("loss_N = 0.5", "loss_N has 0 axes []; its name says 1"),
        ("N = 5; x_ND = np.zeros((3, 4))", "x_ND says N = 3, N says N = 5"),
        ("sum_N1 = np.zeros((3, 2))", "sum_N1 has 2 where its name says 1"),
        ("gate_up_2F = np.zeros(5)", "gate_up_2F has 5 for 2F, which is odd"),
        ("gate_up_2F, h_F = np.zeros(6), np.zeros(6)", "h_F says F = 6, gate_up_2F says F = 3"),
        ("pair = Pair(np.zeros((3, 4)), np.zeros(3))", "pair.w_D says D = 3, pair.x_ND says D = 4"),
        ("N = 5; pair = Pair(np.zeros((3, 4)), np.zeros(4))", "pair.x_ND says N = 3, N says N = 5"),
        ("id_BT, x_ND = np.zeros((2, 3)), np.zeros((5, 4))", "N = 5, but B*T = 6"),
        ("start_Z, count_E = np.zeros(4), np.zeros(4)", "Z = 4, but E+1 = 5"),
    ],
)
def test_a_name_that_says_something_else_is_found(tmp_path: Path, line: str, fault: str) -> None:
    assert found_in(tmp_path / "operations" / "planted.py", line) == [
        f"operations/planted.py: f: {fault}"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "x_ND, y_NF = np.zeros((3, 4)), np.zeros((3, 5))",
        "gate_up_N2F, h_NF = np.zeros((3, 10)), np.zeros((3, 5))",
        "id_BT, x_ND = np.zeros((2, 3)), np.zeros((6, 4))",
        "BATCH_TOKENS, x_NV, w_ND = 1, None, 'text'",
        "a = Pair(np.zeros((3, 4)), np.zeros(4)); b = Pair(np.zeros((3, 5)), np.zeros(5))",
    ],
)
def test_names_that_say_what_is_are_left_alone(tmp_path: Path, line: str) -> None:
    assert found_in(tmp_path / "operations" / "planted.py", line) == []


def test_a_size_that_is_not_the_models_is_found_where_code_knows_the_model(tmp_path: Path) -> None:
    config = ModelConfig.model_validate(COMMON | MODELS["heads"])
    line = "x_ND = np.zeros((26, 12)); y_MU = np.zeros((26, 12))"
    assert found_in(tmp_path / "layers" / "planted.py", line, config) == [
        "layers/planted.py: f: x_ND says D = 12, the model says D = 36",
        "layers/planted.py: f: M = 26, but N*H = 78",
        "layers/planted.py: f: D = 12, but U*H = 36",
    ]
    assert found_in(tmp_path / "operations" / "planted.py", line, config) == []


def found_in(file: Path, line: str, config: ModelConfig | None = None) -> list[str]:
    """The faults of a function with this body, planted in a room of a package."""
    file.parent.mkdir()
    variables: dict[str, Any] = {"__name__": "planted"}
    exec(compile(PLANTED.format(line), str(file), "exec"), variables)
    with Watch(root=file.parents[1], config=config) as watch:
        variables["f"]()
    return list(watch.faults)
