"""The model `mhmoe-np` in the real lm-evaluation-harness, on local tasks, beside the harness's own.

Not in CI: the harness brings 0.4 GB of packages. To run it:

    pip install -e '.[test,lm-eval]'
    python -m pytest -n 0 tests/harness
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.checkpoints.checkpoint import load_checkpoint_tokenizer, load_model, save_model
from mhmoe_np.data.tokenised_text import tokenise_text
from mhmoe_np.errors import UserError
from mhmoe_np.inference.evaluate import evaluate
from mhmoe_np.inference.protocols import Protocol, choose_protocol
from mhmoe_np.operations.load import load_operations
from tests.inference.words import END, text_of, word_tokenizer
from tests.libraries import is_there
from tests.operations.cases import quick
from tests.whole_models import parameters_of

if not is_there("lm_eval"):
    pytest.skip("lm_eval is not installed: see the head of this file", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")  # of the harness and its libraries

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from mhmoe_np.harness.lm_eval_model import HarnessModel  # noqa: E402

LENGTHS = (3, 50, 1, 31, 97, 32, 33)  # of documents; the model has 32 positions
CHOICES = [("w3 w4", [" w5", " w6 w7"], 0), ("w9", [" w8 w1 w2", " w3"], 1), ("w2", [" w4", " w9"], 0)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint/, of a dense model; theirs/, the same for transformers; and the tasks' data."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ["HF_HOME"] = str(folder / "hf")
    (folder / "checkpoint").mkdir()
    save_model(folder / "checkpoint", parameters_of("dense", seed=3), word_tokenizer(37))
    export = "from mhmoe_cli.main import main; main()"
    arguments = ("export", "checkpoint", "--format", "hf", "--out", "theirs")
    subprocess.run([sys.executable, "-c", export, *arguments], cwd=folder, check=True)
    rng = np.random.default_rng(4)
    texts = [text_of(rng.integers(1, 37, length)) for length in LENGTHS]
    rows = [{"text": f" {text}\n"} for text in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"query": query, "choices": each, "gold": gold} for query, each, gold in CHOICES]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def task(places: Path, name: str, data: str, **keys: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(places / data)}},
        "test_split": "test",
        **keys,
    }


def run(places: Path, of: dict[str, Any], batch_size: int = 4) -> dict[str, Any]:
    found = simple_evaluate(
        model="mhmoe-np",
        model_args={"checkpoint": str(places / "checkpoint"), "backend": "numpy"},
        tasks=[of],
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    assert found is not None
    results: dict[str, Any] = found["results"][of["task"]]
    return results | {"samples": found["samples"][of["task"]]}


@pytest.fixture(scope="module")
def theirs(places: Path) -> HFLM:
    return HFLM(pretrained=str(places / "theirs"), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(places: Path) -> HarnessModel:
    return HarnessModel(str(places / "checkpoint"), backend="numpy", batch_size=3)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_eval_gives_the_harnesss_own_numbers_of_a_task(places: Path) -> None:
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    found = run(
        places,
        task(
            places,
            "rolling",
            "texts.jsonl",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": name} for name in metrics],
        ),
    )
    ops = load_operations("numpy")
    model = load_model(places / "checkpoint", np.float32, ops=ops)
    tokenizer = load_checkpoint_tokenizer(places / "checkpoint")
    score = evaluate(
        model,
        tokenise_text("texts", places / "texts.jsonl", tokenizer),
        ops=ops,
        protocol=choose_protocol("lm-eval-rolling", model.config, tokenizer),
    ).as_dict()
    for key, metric in zip(("word_ppl", "byte_ppl", "bits_per_byte"), metrics, strict=True):
        assert score[key] == pytest.approx(found[f"{metric},none"], rel=1e-6)


def test_rolling_is_that_of_the_harnesss_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    texts = [text_of(np.random.default_rng(i).integers(1, 37, n)) for i, n in enumerate(LENGTHS)]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    assert ours.max_length == theirs.max_length == 32
    assert ours.loglikelihood_rolling(asked) == pytest.approx(
        theirs.loglikelihood_rolling(asked), rel=1e-6
    )


@quick(200)
@given(st.integers(0, 60), st.integers(1, 12))
def test_its_windows_are_the_harnesss(length: int, window: int) -> None:
    tokens = list(range(100, 100 + length))
    expected = [
        make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, END, window, 1)
    ]
    found = []
    for w in Protocol("lm-eval-rolling", window, None, END).windows(np.array([length])):
        whole = [END] * w.bos + tokens[w.begin : w.end]
        found.append((whole[: len(whole) - w.scored], whole[len(whole) - w.scored :]))
    assert found == expected


def test_choices_are_scored_as_by_the_harnesss_own_model(
    places: Path, ours: HarnessModel, theirs: HFLM
) -> None:
    pairs = [(query, choice) for query, choices, _ in CHOICES for choice in choices]
    long = text_of(np.random.default_rng(5).integers(1, 37, 60))
    # A continuation that is the likeliest: what the model generates itself.
    greedy = (
        " "
        + theirs.generate_until(
            requests("generate_until", ("w3 w4", {"until": [], "max_gen_toks": 2}))
        )[0].strip()
    )
    asked = requests("loglikelihood", *pairs, (long, " w3 w4"), ("", "w7 w8"), ("w3 w4", greedy))
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [nll for nll, _ in found] == pytest.approx([nll for nll, _ in expected], rel=1e-5)
    assert [bool(likeliest) for _, likeliest in found] == [bool(likeliest) for _, likeliest in expected]
    assert [bool(likeliest) for _, likeliest in found][-1] is True
    assert not all(likeliest for _, likeliest in found)
    results = run(
        places,
        task(
            places,
            "choosing",
            "choices.jsonl",
            output_type="multiple_choice",
            doc_to_text="{{query}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{gold}}",
            target_delimiter="",
            metric_list=[{"metric": "acc"}],
        ),
    )
    right = [
        int(np.argmax([nll for nll, _ in expected[2 * i : 2 * i + 2]]) == gold)
        for i, (_, _, gold) in enumerate(CHOICES)
    ]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))


def test_text_is_generated_as_by_the_harnesss_own_model(ours: HarnessModel, theirs: HFLM) -> None:
    long = text_of(np.random.default_rng(6).integers(1, 37, 60))
    arguments = {"until": [], "max_gen_toks": 9}
    asked = requests("generate_until", ("w3 w4", arguments), ("w9", arguments), (long, arguments))
    found = [text.split() for text in ours.generate_until(asked)]
    assert found == [text.split() for text in theirs.generate_until(asked)]
    assert all(len(words) > 3 for words in found)
    stop = found[0][2]
    (cut,) = ours.generate_until(
        requests("generate_until", ("w3 w4", {"until": [stop], "max_gen_toks": 9}))
    )
    assert cut.split() == found[0][: found[0].index(stop)]


def test_what_it_cannot_do_is_refused(places: Path, ours: HarnessModel) -> None:
    with pytest.raises(UserError, match="batch_size 'auto': must be a number"):
        HarnessModel(str(places / "checkpoint"), backend="numpy", batch_size="auto")
    with pytest.raises(UserError, match="max_gen_toks 32: must be less than the model's 32"):
        ours.generate_until(requests("generate_until", ("w3", {"until": [], "max_gen_toks": 32})))
    long = " ".join(["w1"] * 40)
    with pytest.raises(UserError, match="a continuation of 40 tokens is longer"):
        ours.loglikelihood(requests("loglikelihood", ("w3", " " + long)))


def test_the_harnesss_command_line_knows_the_model(places: Path) -> None:
    keys = task(places, "local", "texts.jsonl", output_type="loglikelihood_rolling", doc_to_text="")
    keys |= {"doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}]}
    (places / "tasks").mkdir()
    (places / "tasks" / "local.yaml").write_text(json.dumps(keys))  # JSON is YAML
    subprocess.run(
        [
            *(sys.executable, "-m", "mhmoe_np.harness", "run", "--model", "mhmoe-np"),
            *("--model_args", "checkpoint=checkpoint,backend=numpy", "--tasks", "local"),
            *("--include_path", "tasks", "--output_path", "results", "--batch_size", "4"),
        ],
        cwd=places,
        timeout=300,
        check=True,
    )
    (found,) = (places / "results").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["local"]["bits_per_byte,none"] > 1
