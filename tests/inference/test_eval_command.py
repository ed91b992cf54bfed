"""`mhmoe-np eval` as a user runs it, on a model whose tokens are words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mhmoe_cli.scores import print_scores
from mhmoe_np.checkpoints.checkpoint import load_checkpoint_tokenizer, save_model
from mhmoe_np.data.tokenised_text import tokenise_documents
from mhmoe_np.data.tokenizer import tokenizer_sha256
from mhmoe_np.inference.evaluate import DomainScore
from tests.conftest import Run
from tests.inference.words import text_of, word_tokenizer
from tests.whole_models import parameters_of

DOCUMENTS = [text_of(range(1, 31)), text_of(range(5, 36)), text_of(range(2, 9))]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """In a run folder, as the newest and as the best; beside it a text."""
    for name in ("step-00000001", "best-00000001"):
        folder = tmp_path / "runs" / "mine" / "checkpoints" / name
        folder.mkdir(parents=True)
        save_model(folder, parameters_of("mh2"), word_tokenizer(37))
    (tmp_path / "held_out.txt").write_text("\n\n\n".join(DOCUMENTS))
    return tmp_path / "runs" / "mine" / "checkpoints" / "step-00000001"


def test_json_says_what_a_comparison_needs(checkpoint: Path, mhmoe_here: Run) -> None:
    options = ("--protocol", "stride", "--stride", 8, "--window", 16, "--bos", "--json")
    domain = ("--domain", "mine=held_out.txt", "--backend", "numpy")
    printed = json.loads(mhmoe_here("eval", "runs/mine", *domain, *options).stdout)
    score = printed.pop("domains")["mine"]
    assert printed == {
        "protocol": "stride",
        "window": 16,
        "stride": 8,
        "bos": True,
        "bos_token_id": 0,
        "tokenizer_sha256": tokenizer_sha256(load_checkpoint_tokenizer(checkpoint)),
    }
    assert (score["tokens"], score["text_tokens"], score["words"], score["documents"]) == (
        70,
        70,
        68,
        3,
    )
    tokenised = tokenise_documents("a", DOCUMENTS, load_checkpoint_tokenizer(checkpoint))
    assert score["corpus_sha256"] == tokenised.corpus_sha256
    assert score["standard_error"] > 0
    error = score["standard_error"] * score["token_ppl"]
    assert score["token_ppl_standard_error"] == pytest.approx(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--stride", 4), "--stride 4: is of --protocol stride, not of disjoint"),
        (("--window", 33), "--window 33: must be 1 to the model's max_position_embeddings 32"),
        (("--protocol", "llama-cpp", "--window", 36), "--window 36: must be 3 to"),
        (("--protocol", "lm-eval-rolling", "--no-bos"), "--no-bos: lm-eval-rolling always begins"),
    ],
)
@pytest.mark.usefixtures("checkpoint")
def test_what_does_not_go_together_is_one_line(
    options: tuple[Any, ...], said: str, mhmoe_here: Run
) -> None:
    domain = ("--domain", "mine=held_out.txt", "--backend", "numpy")
    line = mhmoe_here("eval", "runs/mine", *domain, *options, code=2).stderr
    assert line.count("\n") == 1
    assert said in line


# ---- what is shown -------------------------------------------------------------------------------


def score_of(nll: float) -> DomainScore:
    return DomainScore(
        nll, 0.0123, 12_345_678, 12_345_678, 9_876_543, 56_789_012, 1_234, "0" * 64, True
    )


LONG = "a-domain-with-a-name-of-" + "x" * 40


@pytest.mark.parametrize(("width", "tables"), [(60, 3), (80, 2), (120, 1)])
@pytest.mark.parametrize("name", ["lexicon", LONG])
def test_the_table_fits_the_terminal_and_leaves_nothing_out(
    name: str,
    width: int,
    tables: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    print_scores({"speech": score_of(7.4061e7), name: score_of(3e7)})
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if line.split()[:1] == ["domain"]]
    assert len(heads) == tables if name != LONG else len(heads) >= tables
    titles = " ".join(heads)
    for title in (
        "token ppl",
        "±",
        "word ppl",
        "byte ppl",
        "bits/byte",
        "NLL (nats)",
        "tokens",
        "words",
    ):
        assert titles.count(title) == 1
    for figure in ("403.0020", "4.9569", "1.8815", "12,345,678", "9,876,543", "56,789,012"):
        assert figure in printed
    assert "…" not in printed


def test_a_file_gets_every_column_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_scores({"speech": score_of(7.4061e7)})
    title, line = capsys.readouterr().out.splitlines()
    assert title.split()[0] == "domain"
    assert line.split()[0] == "speech"
    assert len(line.split()) == 10
