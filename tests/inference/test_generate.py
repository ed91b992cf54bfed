"""Texts made by a small model: alone and together, where they end, and the command."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from mhmoe_np.checkpoints.checkpoint import save_model
from mhmoe_np.data.tokenizer import train_tokenizer
from mhmoe_np.errors import UserError
from mhmoe_np.inference.generate import Limits, generate, generate_all, head_of
from mhmoe_np.inference.prompts import read_prompts
from mhmoe_np.inference.sampling import Sampling
from mhmoe_np.model.decode import KeyValueCache
from mhmoe_np.model.head import HeadDtype
from mhmoe_np.model.language_model import Model, last_hidden
from mhmoe_np.operations.int8 import Int8Weight
from mhmoe_np.operations.load import load_operations
from tests.conftest import Run
from tests.whole_models import parameters_of

OPS = load_operations("numpy")
TOKENIZER = train_tokenizer(["the whale and the sea, the ship; the sea"], vocab_size=270)
# Untied: with a tied output a model that has learnt nothing repeats its last token.
PARAMETERS = parameters_of(
    "mh2-shared", seed=3, vocab_size=270, max_position_embeddings=40, tie_word_embeddings=False
)
for token in range(270):  # and one that draws bytes writes no text
    written = TOKENIZER.decode([token], skip_special_tokens=True)
    if not written.isascii() or not written:
        PARAMETERS.tensors["lm_head.weight"][token] = 0
MODEL = Model.of(PARAMETERS, ops=OPS)
HEAD_DTYPES = get_args(HeadDtype)
PROMPTS = ["the whale", "", "sea, the ship and the whale and the sea", "a", "the"]


def alone(prompt: str, sampling: Sampling, limits: Limits) -> str:
    return "".join(
        generate(
            MODEL,
            TOKENIZER,
            prompt,
            max_new_tokens=limits.max_new_tokens,
            sampling=sampling,
            stop=limits.stop,
            end_of_text=limits.end_of_text,
            ops=OPS,
        )
    )


def together(prompts: list[str], sampling: Sampling, limits: Limits, batch_size: int = 16) -> Any:
    return generate_all(
        MODEL,
        TOKENIZER,
        prompts,
        limits=limits,
        sampling=sampling,
        batch_size=batch_size,
        ops=OPS,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(1.0, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7)]
)
def test_texts_made_together_are_those_made_alone(sampling: Sampling, batch_size: int) -> None:
    limits = Limits(12)
    made = together(PROMPTS, sampling, limits, batch_size).continuations
    assert [text.prompt for text in made] == PROMPTS
    assert [text.seed for text in made] == [sampling.seed + i for i in range(len(PROMPTS))]
    assert [text.text for text in made] == [
        alone(prompt, sampling._replace(seed=sampling.seed + i), limits)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert len({text.text for text in made}) > 2


def test_each_text_is_drawn_from_the_logits_of_the_whole_of_it() -> None:
    """Without the cache, without a batch: the definition."""
    made = together(PROMPTS, Sampling(0), Limits(8)).continuations
    for text in made:
        ids = TOKENIZER.encode(text.prompt).ids or [0]
        for token in text.token_ids:
            y_ND = last_hidden(MODEL, np.array([ids]), ops=OPS)
            assert int(np.argmax(y_ND[-1] @ MODEL.weights.output_VD.T)) == token
            ids.append(token)


def test_a_text_need_not_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(OPS, "joined_step", lambda branches, **_: asked.append(branches))
    pieces = [
        list(
            generate(
                MODEL, TOKENIZER, "a", max_new_tokens=5, sampling=Sampling(0), joined=joined, ops=OPS
            )
        )
        for joined in (False, True)
    ]
    assert len(asked) == 1
    assert pieces[0] == pieces[1]


def test_every_way_to_end_is_told() -> None:
    prompts = [prompt for prompt in PROMPTS if prompt]
    free = together(prompts, Sampling(0), Limits(60)).continuations
    assert {text.finish_reason for text in free} == {"positions"}
    for text in free:
        prompt_length = len(TOKENIZER.encode(text.prompt).ids)
        assert prompt_length + len(text.token_ids) == 40
    first = free[0]
    (short, *_) = together(prompts, Sampling(0), Limits(3)).continuations
    assert (short.finish_reason, short.token_ids) == ("length", first.token_ids[:3])
    # Any token may be said to end a text.
    token = next(token for token in first.token_ids[1:] if token != first.token_ids[0])
    place = first.token_ids.index(token)
    (ended, *_) = together(prompts, Sampling(0), Limits(60, end_of_text=(269, token))).continuations
    assert (ended.finish_reason, ended.token_ids) == ("end_of_text", first.token_ids[:place])


def test_a_text_ends_before_a_stop_string_that_spans_tokens() -> None:
    (free,) = together(["the"], Sampling(0), Limits(30)).continuations
    stop = free.text[5:9]
    assert len(stop) == 4
    end = free.text.index(stop)
    (made,) = together(["the"], Sampling(0), Limits(30, stop=("\0" * 9, stop))).continuations
    assert (made.text, made.finish_reason) == (free.text[:end], "stop")
    assert made.token_ids == free.token_ids[: len(made.token_ids)]
    assert stop in TOKENIZER.decode(made.token_ids)
    assert stop not in TOKENIZER.decode(made.token_ids[:-1])
    assert alone("the", Sampling(0), Limits(30, stop=(stop,))) == made.text
    # What might have become one is shown at the end.
    half = Limits(30, stop=(free.text[-2:] + "\0",))
    assert alone("the", Sampling(0), half) == free.text


def test_a_prompt_that_cannot_be_read_is_named_before_a_text_is_begun() -> None:
    told: list[int] = []
    with pytest.raises(
        UserError, match=r"prompt 'the the the the the the the the the the \.\.\.': its"
    ):
        generate_all(
            MODEL,
            TOKENIZER,
            ["a", "the " * 60],
            limits=Limits(2),
            sampling=Sampling(),
            batch_size=1,
            on_progress=lambda stage, done, total: told.append(done),
            ops=OPS,
        )
    assert not told


def test_progress_ends_with_all_tokens() -> None:
    told: list[tuple[int, int]] = []
    generate_all(
        MODEL,
        TOKENIZER,
        PROMPTS,
        limits=Limits(6),
        sampling=Sampling(0),
        batch_size=2,
        on_progress=lambda stage, done, total: told.append((done, total)),
        ops=OPS,
    )
    assert told == sorted(told)
    assert told[-1] == (30, 30)


def test_more_texts_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(UserError, match=r"the keys and values of 5 texts of .* lower the batch size"):
        together(PROMPTS, Sampling(0), Limits(6))


# ---- files of prompts ----------------------------------------------------------------------------


def test_prompts_are_read_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone two\r\n\n  three\nü".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one two", "  three", "ü"]
    (tmp_path / "a.jsonl").write_text(
        '\ufeff{"prompt": "a\\nb", "id": 3}\n\n{"prompt": ""}\n', encoding="utf-8"
    )
    assert read_prompts(tmp_path / "a.jsonl") == ["a\nb", ""]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", b"x", "a.csv: is neither .txt nor .jsonl"),
        ("a.txt", b"", "a.txt: holds no prompt"),
        ("a.txt", b" \n\n", "a.txt: holds no prompt"),
        ("a.txt", b"\xff", "a.txt: is not UTF-8 at byte offset 0"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"text": "a"}',
            "a.jsonl: line 2: must be an object with a string",
        ),
        ("a.jsonl", b'\n"a"', 'a.jsonl: line 2: must be an object with a string under "prompt"'),
        ("a.jsonl", b"{", "a.jsonl: line 1: cannot be read as JSON"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "a.jsonl: line 1: is not UTF-8"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(
    tmp_path: Path, name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_prompts(tmp_path / name)
    assert line in str(refused.value)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def generated(mhmoe_here: Run, tmp_path: Path) -> Run:
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", PARAMETERS, TOKENIZER)

    def run(*arguments: object, code: int = 0) -> Any:
        return mhmoe_here("generate", "model", "--backend", "numpy", *arguments, code=code)

    return run


def test_json_has_texts_tokens_and_speed(generated: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[2:]))
    options = ("--temperature", 0.7, "--seed", 5, "--max-new-tokens", 6)
    given = ("--prompt", PROMPTS[0], "--prompt", "", "--prompts", "prompts.txt")
    result = generated(*given, *options, "--json")
    found = json.loads(result.stdout)
    expected = together(PROMPTS, Sampling(0.7, seed=5), Limits(6))
    assert found["continuations"] == [
        {
            "prompt": made.prompt,
            "seed": made.seed,
            "token_ids": made.token_ids,
            "text": made.text,
            "finish_reason": made.finish_reason,
        }
        for made in expected.continuations
    ]
    assert found["tokens"] == expected.tokens
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert f"{expected.tokens} tokens: " in result.stderr
    # One of them alone, by its seed.
    made = expected.continuations[4]
    single = generated("--prompt", PROMPTS[4], *options[:2], "--seed", 9, *options[4:])
    assert single.stdout == f"{made.prompt}{made.text}\n"
    assert f"{len(made.token_ids)} tokens: " in single.stderr


def test_several_texts_are_told_apart(generated: Run) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 4)
    made = together(["the", "a"], Sampling(0), Limits(4)).continuations
    printed = generated("--prompt", "the", "--prompt", "a", *options).stdout
    assert printed == f"--- 1 of 2 ---\nthe{made[0].text}\n--- 2 of 2 ---\na{made[1].text}\n"


def test_standard_input_is_a_prompt(generated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 4)
    expected = generated("--prompt", "the\nsea", *options).stdout
    for content in (b"the\nsea", b"the\nsea\n", b"the\nsea\r\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert generated("--prompt", "-", *options).stdout == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    assert "is not UTF-8 at byte offset 1" in generated("--prompt", "-", code=2).stderr


def test_the_readmes_commands_continue_prompts(generated: Run, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("the\na\n")
    lines = re.findall("^mhmoe-np generate runs/mine (.*)", readme, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert generated(*shlex.split(line), "--max-new-tokens", 3).stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give --prompt TEXT, --prompt - or --prompts FILE"),
        (["--prompt", "-", "--prompt", "-"], "give it once"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--prompt", "a", "--stop", ""], "stop: an empty string"),
        (["--prompt", "a", "--stop", "\udcff"], "--stop: is not UTF-8"),
        (["--prompt", "a", "--min-p", "1.5"], "'--min-p'"),
        (["--prompt", "a", "--min-p", "nan"], "min_p: nan"),
        (["--prompt", "a", "--repetition-penalty", "0"], "'--repetition-penalty'"),
        (["--prompt", "a", "--repetition-penalty", "1e300"], "repetition_penalty: 1e+300"),
    ],
)
def test_what_makes_no_sense_is_refused(generated: Run, arguments: list[str], line: str) -> None:
    assert line in generated(*arguments, code=2).stderr


def test_a_terminal_is_given_no_control_characters(
    generated: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, options = "a\x1b[31m\tb\nc\r", ("--temperature", 0, "--max-new-tokens", 1)
    assert generated("--prompt", prompt, *options).stdout.startswith(prompt)
    monkeypatch.setattr("mhmoe_cli.generate_command.sys.stdout.isatty", lambda: True)
    assert generated("--prompt", prompt, *options).stdout.startswith("a\\x1b[31m\tb\nc\\r")


# ---- the output head's numbers -------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(0.8, top_k=5, top_p=0.9, seed=3)])
def test_an_exact_head_makes_the_texts_of_float32(sampling: Sampling) -> None:
    made = [
        generate_all(
            MODEL,
            TOKENIZER,
            PROMPTS,
            limits=Limits(20),
            sampling=sampling,
            batch_size=batch_size,
            head=head_of(MODEL, dtype, sampling, ops=OPS),
            ops=OPS,
        ).continuations
        for dtype, batch_size in (("float32", 16), ("exact", 16), ("exact", 1))
    ]
    assert made[0] == made[1] == made[2]


def test_an_int8_heads_logits_are_those_of_8_bits() -> None:
    head = head_of(MODEL, "int8", Sampling(1.0), ops=OPS)
    assert isinstance(head, Int8Weight)
    id_BT = np.array([[3, 5, 8]])
    cache = KeyValueCache(MODEL, sequences=1, positions=3, head=head, ops=OPS)
    found = cache.extend(id_BT)
    expected = OPS.linear(last_hidden(MODEL, id_BT, ops=OPS)[-1:], head, None)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert (found != KeyValueCache(MODEL, sequences=1, positions=3, ops=OPS).extend(id_BT)).any()


def test_the_command_takes_a_heads_numbers(generated: Run) -> None:
    arguments = ("--prompt", "the whale", "--max-new-tokens", 8, "--temperature", 0)
    texts = {dtype: generated(*arguments, "--head-dtype", dtype).stdout for dtype in HEAD_DTYPES}
    assert texts["exact"] == texts["float32"]
    assert texts["int8"].startswith("the whale")
    for more in (["--temperature", 1], ["--top-k", 3, "--repetition-penalty", 1.1]):
        result = generated("--prompt", "a", "--head-dtype", "exact", *more, code=2)
        assert result.stderr.count("\n") == 1
        assert "--top-k K" in result.stderr
