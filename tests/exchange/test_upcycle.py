"""A dense model becomes a mixture of experts and computes the same at first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mhmoe_np.audit.trace import trace
from mhmoe_np.checkpoints.checkpoint import (
    find_checkpoint,
    load_end_of_text,
    load_parameters,
    save_model,
)
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.exchange.upcycle import Experts, upcycle
from mhmoe_np.model.language_model import Model
from mhmoe_np.model.parameters import Parameters
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import BackendName
from tests.conftest import Run
from tests.documents import embedded_documents
from tests.whole_models import parameters_of

TOKENS = np.random.default_rng(5).integers(0, 37, (4, 32))
KEPT = {
    "copies": Experts(4, 2),
    "copies, every layer": Experts(5, 3, step=1),
    "halves": Experts(6, 2, split=2),
    "fifths, two groups, every layer": Experts(15, 10, split=5, step=1),
    "all pieces of one copy": Experts(4, 4, split=4),
}


def traced(parameters: Parameters, backend: BackendName) -> dict[str, np.ndarray]:
    ops = load_operations(backend)
    return trace(Model.of(parameters, ops=ops), TOKENS, gradients=False, ops=ops)


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "numpy") for case in KEPT), ("fifths, two groups, every layer", "numba")],
)
def test_the_function_is_kept(case: str, backend: BackendName) -> None:
    dense = parameters_of("dense", num_hidden_layers=4)
    made = upcycle(dense, KEPT[case], seed=3)
    expected, found = traced(dense, backend)["logits"], traced(made, backend)
    assert np.abs(found["logits"] - expected).max() <= 1e-5 * np.abs(expected).max()
    # Experts are in use: not all tokens choose the same, unless all are chosen.
    chosen = [found[name] for name in found if name.endswith(".experts")]
    assert len(chosen) == 4 // KEPT[case].step
    E, K, S, *_ = KEPT[case]
    for expert_MK in chosen:
        assert len(np.unique(expert_MK)) == E if E == K else len(np.unique(expert_MK)) > K
        # Each piece as often as any other.
        pieces = np.sort(expert_MK % S, axis=1)
        np.testing.assert_array_equal(pieces, np.sort(np.arange(K) % S)[None].repeat(len(pieces), 0))


def test_a_ternary_model_keeps_its_function_by_copies() -> None:
    dense = parameters_of("dense-ternary")
    made = upcycle(dense, Experts(4, 2), seed=3)
    expected, found = traced(dense, "numpy")["logits"], traced(made, "numpy")["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_an_mh_moe_keeps_all_but_its_experts() -> None:
    dense = parameters_of("dense")
    made = upcycle(dense, Experts(6, 2, heads=3), seed=3)
    assert made.config.sub_token_width == 8
    mlp = "model.layers.1.mlp"
    for name in ("head_proj", "merge_proj"):
        np.testing.assert_array_equal(made.tensors[f"{mlp}.{name}.weight"], np.eye(24))
    for name, tensor in dense.tensors.items():
        if not name.startswith(mlp):
            np.testing.assert_array_equal(made.tensors[name], tensor)
    again = upcycle(dense, Experts(6, 2, heads=3), seed=3)
    assert again.flat_P.tobytes() == made.flat_P.tobytes()
    assert upcycle(dense, Experts(6, 2, heads=3), seed=4).flat_P.tobytes() != made.flat_P.tobytes()


@pytest.mark.parametrize(
    ("kind", "experts", "words"),
    [
        ("fine-grained", Experts(4, 2), "has 5 already"),
        ("dense", Experts(4, 1), "--top-k 1"),
        ("dense", Experts(4, 3, split=2), "must divide --top-k 3"),
        ("dense", Experts(5, 2, split=2), "--experts 5"),
        ("dense", Experts(6, 3, split=3), "intermediate_size 20"),
        ("dense", Experts(4, 2, split=2, heads=2), "leave one of the two out"),
        ("dense", Experts(4, 2, heads=5), "moe_heads: 5 does not divide"),
        ("dense", Experts(2, 3), "num_experts_per_tok: 3"),
        ("dense", Experts(4, 2, step=3), "--step 3"),
        ("dense", Experts(100_000, 2), "num_experts 100000"),
        ("dense-ternary", Experts(4, 2, split=2), "quantization 'bitnet_b158'"),
        ("dense-relu2-sub-norm-untied", Experts(4, 2, split=2), "use_sub_norm True"),
    ],
)
def test_what_would_change_the_function_is_refused(kind: str, experts: Experts, words: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        upcycle(parameters_of(kind), experts, seed=0)
    assert words in str(refused.value)


def test_the_command_says_when_the_function_is_lost(mhmoe_here: Run, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    save_model(tmp_path / "dense", parameters_of("dense"), None)
    base = ("upcycle", "dense", "--experts", 4)
    refused = mhmoe_here(*base, "--top-k", 1, "--out", "new", code=2).stderr
    assert "--top-k 1" in refused
    assert refused.count("\n") == 1
    assert not (tmp_path / "new").exists()
    said = mhmoe_here(*base, "--top-k", 1, "--heads", 2, "--out", "new").stdout
    assert "does NOT compute what the dense model computes" in said
    assert load_parameters(tmp_path / "new", np.float32).config.moe_heads == 2


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (("smoe", "--top-k", 2), {"num_experts": 8, "num_experts_per_tok": 2}),
        (
            ("fine-grained-smoe", "--experts", 6, "--step", 1),
            {"num_experts": 6, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
        ),
        (
            ("mh-moe-3",),
            {"num_experts": 96, "num_experts_per_tok": 3, "moe_heads": 3, "moe_intermediate_size": 8},
        ),
        (
            ("mh-moe-2", "--experts", 10, "--inner-width", 7),
            {"num_experts": 10, "moe_heads": 2, "moe_intermediate_size": 7},
        ),
    ],
    ids=str,
)
def test_experts_as_those_of_a_model_of_the_paper(
    options: tuple[object, ...], keys: dict[str, int], mhmoe_here: Run, tmp_path: Path
) -> None:
    (tmp_path / "dense").mkdir()
    dense = parameters_of("dense", intermediate_size=32)
    save_model(tmp_path / "dense", dense, None)
    mhmoe_here("upcycle", "dense", "--preset-like", *options, "--out", "new")
    made = load_parameters(tmp_path / "new", np.float32)
    assert made.config.model_dump() | keys == made.config.model_dump()
    expected, found = traced(dense, "numpy")["logits"], traced(made, "numpy")["logits"]
    kept = np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert kept == (made.config.moe_heads == 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preset-like", "smoe"), "--top-k 1: a gate alone"),
        (("--preset-like", "mh-moe-2"), "intermediate_size 20: 3/8 of it"),
        (("--preset-like", "mh-moe-4"), "'mh-moe-4' is not one of"),
        (("--experts", 4), "--experts and --top-k: give both, or --preset-like"),
        (("--experts", 4, "--top-k", 2, "--inner-width", 5), "--inner-width"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit_are_refused_in_a_line(
    options: tuple[object, ...], words: str, mhmoe_here: Run, tmp_path: Path
) -> None:
    (tmp_path / "dense").mkdir()
    save_model(tmp_path / "dense", parameters_of("dense"), None)
    refused = mhmoe_here("upcycle", "dense", *options, "--out", "new", code=2).stderr
    assert words in refused
    assert refused.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("experts", [KEPT["copies"], KEPT["halves"]], ids=["copies", "halves"])
def test_training_goes_on_from_there(experts: Experts, mhmoe_here: Run, tmp_path: Path) -> None:
    """200 steps of training of the upcycled model lower the loss, and its experts part."""
    tokenizer = train_tokenizer(["it's what the others say " * 9], vocab_size=270)
    dense = parameters_of("dense", vocab_size=270)
    (tmp_path / "dense").mkdir()
    save_model(tmp_path / "dense", dense, tokenizer, (7, 9))
    (tmp_path / "text.txt").write_text(embedded_documents()["books"].documents[0][:20000])
    options = ("--experts", experts.num_experts, "--top-k", experts.num_experts_per_tok)
    said = mhmoe_here("upcycle", "dense", *options, "--split", experts.split, "--out", "start").stdout
    assert "It computes what the dense model computes" in said
    start = load_parameters(tmp_path / "start", np.float32)
    assert load_end_of_text(tmp_path / "start") == (7, 9)
    small = ("sequence_length=16", "batch_size=4", "learning_rate=0.01", "schedule=constant")
    settings = [word for setting in small for word in ("--set", setting)]
    options = ("--out", "run", "--steps", 200, "--backend", "numpy", *settings)
    mhmoe_here("train", "--init", "start", "--data", "text.txt", *options)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 200
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    trained = load_parameters(find_checkpoint(tmp_path / "run"), np.float32)
    router = "model.layers.1.mlp.gate.weight"
    same_at_first = start.tensors[router][0] == start.tensors[router][1]
    assert same_at_first.all() == (experts.split == 2)
    assert (trained.tensors[router][0] != trained.tensors[router][1]).any()
