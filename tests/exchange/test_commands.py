"""The commands over GGUF files, whose contents `test_gguf.py` looks at."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhmoe_np.checkpoints.checkpoint import load_end_of_text, load_parameters, save_model
from mhmoe_np.data.tokenizer import train_tokenizer
from tests.conftest import Run
from tests.whole_models import parameters_of


def test_a_model_goes_out_and_comes_back_with_its_tokenizer(mhmoe_here: Run, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["it's what the others say " * 9], vocab_size=270)
    (tmp_path / "mine").mkdir()
    save_model(tmp_path / "mine", parameters_of("dense", vocab_size=270), tokenizer, (7, 9))
    mhmoe_here("export", "mine", "--format", "gguf", "--out", "theirs")
    mhmoe_here("import", "theirs/model.gguf", "--out", "again")
    ours, again = (load_parameters(tmp_path / name, np.float32) for name in ("mine", "again"))
    assert again.flat_P.tobytes() == ours.flat_P.tobytes()
    assert load_end_of_text(tmp_path / "again") == (7, 9)
    texts = [
        mhmoe_here("generate", name, "--prompt", "it's", "--seed", 1) for name in ("mine", "again")
    ]
    assert texts[0].stdout == texts[1].stdout
    assert "already" in mhmoe_here("import", "theirs/model.gguf", "--out", "again", code=2).stderr
