"""What is said of a step's routers, against counts by hand; and that looking changes nothing."""

from __future__ import annotations

import html
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np import extras
from mhmoe_np.layers.balance import RouterStatistics
from mhmoe_np.layers.moe import MoeCache
from mhmoe_np.model.language_model import ForwardCache
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.table import Routing
from mhmoe_np.training import trainer as trainer_module
from mhmoe_np.training.router_statistics import (
    LayerBalance,
    LayerRouting,
    RouterAlarm,
    RouterWatch,
)
from mhmoe_np.training.run import resume_run
from tests.conftest import Run
from tests.resume import prepare
from tests.training.test_full_disk import started
from tests.whole_models import SETTINGS, batches_of, config_of, learner_of


def statistics(*choices: int) -> RouterStatistics:
    count_E = np.array(choices)
    return RouterStatistics(1, count_E, count_E, count_E / 1.0, 0.0, dropped=7)


def test_balance_by_hand() -> None:
    # Shares 1/2, 0, 1/4, 1/4: entropy (ln 2)/2 + (ln 4)/2 = 1.5 ln 2, of at most ln 4 = 2 ln 2.
    assert LayerBalance.of(3, statistics(8, 0, 4, 4)) == LayerBalance(3, 0.75, 2.0, 1, 7)
    assert LayerBalance.of(0, statistics(5, 5)) == LayerBalance(0, 1.0, 1.0, 0, 7)
    assert LayerBalance.of(0, statistics(9, 0, 0))[1:4] == (0.0, 3.0, 2)
    assert LayerBalance.of(0, statistics(9))[1:4] == (1.0, 1.0, 0)  # one expert cannot be uneven


@given(st.lists(st.integers(0, 99), min_size=2, max_size=9).filter(any), st.randoms())
def test_the_experts_order_says_nothing(choices: list[int], random: Any) -> None:
    found = LayerBalance.of(0, statistics(*choices))
    assert 0 <= found.entropy <= 1
    assert 1 <= found.max_over_mean <= len(choices)
    shuffled = random.sample(choices, len(choices))
    assert LayerBalance.of(0, statistics(*shuffled)) == pytest.approx(found)


def cache_of(routing: Routing, logits_ME: Any, counted_M: Any) -> ForwardCache:
    """A forward's cache with one MoE layer, of which only the router is there."""
    none: Any = None
    moe = MoeCache(none, none, logits_ME, routing, none, none, none, none, counted_M)

    class Block:
        feed_forward = moe

    return ForwardCache(none, [Block()], none, none)  # type: ignore[list-item]


def test_heads_by_hand() -> None:
    """Three tokens of two heads; the last token is padding."""
    config = config_of("mh2", num_experts=3)
    expert_MK = np.array([[0, 1], [2, 0], [0, 2], [2, 1], [1, 0], [1, 0]])
    gate_MK = np.array([[0.75, 0.25], [0.5, 0.5], [0.625, 0.375], [1, 0], [9, 9], [9, 9]])
    p_ME = np.array(
        [[0.6, 0.2, 0.2], [0.3, 0.2, 0.5], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8], *[[1, 1, 1]] * 2]
    )
    logits_ME = np.array([[-3.0, 0, 1], [0, 2, 0], [0, 0, 0], [0, 0, 0], [-9, 0, 0], [0, 9, 0]])
    counted_M = np.array([True, True, True, True, False, False])
    watch = RouterWatch(config, ops=load_operations("numpy"))
    routing = Routing(p_ME, np.zeros(6), expert_MK, gate_MK)
    watch(np.zeros(0), cache_of(routing, logits_ME, counted_M))
    (found,) = watch.layers()
    assert found.as_dict() == {
        "layer": 0,
        "load": [[2, 1, 1], [1, 1, 2]],
        "gate_mass": [[1.375, 0.25, 0.375], [0.5, 0.0, 1.5]],
        "logit_min": -3.0,
        "logit_max": 2.0,
        "top_probability": 0.6,
    }
    # A second micro-batch adds its counts; one that is padding alone changes nothing.
    watch(np.zeros(0), cache_of(routing, 2 * logits_ME, counted_M))
    watch(np.zeros(0), cache_of(routing, logits_ME, np.zeros(6, bool)))
    (twice,) = watch.layers()
    assert twice.choice_HE.tolist() == [[4, 2, 2], [2, 2, 4]]
    assert (twice.logit_min, twice.logit_max) == (-6.0, 4.0)
    assert twice.top_probability == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["smoe", "mh3-capacity-raw", "mh2-ternary"])
def test_a_step_that_is_watched_has_the_same_bits(kind: str) -> None:
    ops = load_operations("numpy")
    config = config_of(kind)
    micro_batches = batches_of(config, np.random.default_rng(5))
    plain, watched = learner_of(kind, ops), learner_of(kind, ops)
    watch = RouterWatch(config, ops=ops)
    expected = plain.step(micro_batches, SETTINGS)
    assert repr(watched.step(micro_batches, SETTINGS, watch)) == repr(expected)
    assert watched.parameters.flat_P.tobytes() == plain.parameters.flat_P.tobytes()
    assert watched.updates == 1
    # What was seen of the forward is what the step's own sums say.
    for routing, sums in zip(watch.layers(), expected.statistics, strict=True):
        assert routing.choice_HE.sum(axis=0).tolist() == sums.choice_E.tolist()
        gates = routing.gate_HE.sum()
        if config.norm_topk_prob:
            assert gates == pytest.approx(sums.sub_tokens, rel=1e-6)
        assert 0 < gates <= sums.sub_tokens * (1 + 1e-6)


# ---- warnings -------------------------------------------------------------------------------------


def balance_of(used: float, layer: int = 1) -> LayerBalance:
    """Of 32 experts so many are used."""
    return LayerBalance(layer, math.log(used) / math.log(32), 1.0, 0, 0)


def test_collapse_is_where_hardly_more_than_k_experts_are_used_for_ten_steps() -> None:
    config = config_of("fine-grained", num_experts=32)  # K = 2: collapsed below 2 + 3 experts
    for used in (2.0, 4.9, 5.1, 32.0):
        alarm = RouterAlarm(config)
        found = [alarm.look([balance_of(used)], [], 1000) for _ in range(30)]
        named = [(i + 1, warning.name) for i, raised in enumerate(found) for warning in raised]
        assert named == ([(10, "router-collapse")] if used < 5 else []), used
    # So few choices that they cannot meet many experts, or as many experts as each token needs.
    for few, kind in ((31, config), (1000, config_of("fine-grained", num_experts=2))):
        alarm = RouterAlarm(kind)
        assert not any(alarm.look([balance_of(1.0)], [], few) for _ in range(30))


def test_a_router_that_comes_back_is_not_warned_of_and_each_layer_is_on_its_own() -> None:
    alarm = RouterAlarm(config_of("fine-grained", num_experts=32))
    raised = []
    for step in range(1, 31):
        dips = 5.5 if step % 9 == 0 else 2.0
        raised += alarm.look([balance_of(dips, layer=1), balance_of(2.0, layer=3)], [], 1000)
    assert [(warning.name, warning.layer) for warning in raised] == [("router-collapse", 3)]


def test_saturation_is_where_the_first_choice_is_all_but_certain() -> None:
    for probability, expected in ((0.5, []), (0.98, []), (0.995, ["router-saturation"])):
        alarm = RouterAlarm(config_of("smoe"))
        routing = LayerRouting(1, np.zeros((1, 5), int), np.zeros((1, 5)), -9.0, 9.0, probability)
        found = [*alarm.look([], [routing], 1000), *alarm.look([], [routing], 1000)]
        assert [warning.name for warning in found] == expected
        assert all("0.9950" in warning.text for warning in found)


def plant(patch: pytest.MonkeyPatch, *, scale: float) -> None:
    """Runs start with router weights that are this many times what they should be."""
    initialise = trainer_module.initialise

    def planted(parameters: Any, seed: int, on_progress: Any) -> None:
        initialise(parameters, seed, on_progress)
        for name, tensor in parameters.tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor *= scale

    patch.setattr(trainer_module, "initialise", planted)


@pytest.mark.parametrize(
    ("scale", "step", "name", "says"),
    [
        # Equal logits: ties go to the lower index, so all tokens to the first two of 32 experts.
        (0.0, 10, "router-collapse", "it uses about 2.0 of 32 experts"),
        (1e5, 1, "router-saturation", "its first choice has a probability of"),
    ],
)
def test_a_planted_fault_is_named_once(
    mhmoe_here: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    step: int,
    name: str,
    says: str,
) -> None:
    prepare(tmp_path, steps=12)
    plant(monkeypatch, scale=scale)
    options = ("--data", "text.txt", "--out", "run", "--backend", "numpy", "--set", "num_experts=32")
    # The router stays as it was planted.
    options += ("--set", "learning_rate=1e-12", "--set", "schedule=constant", "--set", "router_every=4")
    said = mhmoe_here("train", "config.toml", *options).stderr
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    named = [line for line in warnings if line.startswith(f"warning: {name}: step {step}, layer 1: ")]
    assert len(named) == 1
    assert says in named[0]
    # The run's page repeats them all, before anything else.
    page = html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    banners = re.findall('<p class="banner failed">(.*?)</p>', page)
    assert sorted(banners) == sorted(line.removeprefix("warning: ") for line in warnings)
    assert page.index(banners[-1]) < page.index("<dl")
    assert len(warnings) == len(set(warnings))


def test_a_router_as_it_starts_is_not_warned_of(tmp_path: Path) -> None:
    trainer = started(tmp_path)
    reports: list[Any] = []
    trainer.train(reports.append)
    assert len(reports) == 9
    assert all(report.warnings == [] for report in reports)
    assert all(len(report.router) == 1 for report in reports)


# ---- the logs -------------------------------------------------------------------------------------


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_log_has_every_so_manieth_step_and_a_resumed_run_the_same(tmp_path: Path) -> None:
    trainer = started(tmp_path, router_every=2, keep_checkpoints=9, checkpoint_every=3)
    trainer.train()
    trainer.close()
    run = tmp_path / "run"
    straight, metrics = (run / "router.jsonl").read_bytes(), lines_of(run / "metrics.jsonl")
    lines = lines_of(run / "router.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    by_step = {line["step"]: line for line in metrics}
    for line in lines:
        (layer,), (balance,) = line["layers"], by_step[line["step"]]["router"]
        load_E = np.array(layer["load"]).sum(axis=0)
        assert layer["layer"] == balance["layer"] == 1
        assert load_E.sum() == 4 * 32 * 2 * 2  # B T H K
        assert balance == LayerBalance.of(1, statistics(*load_E))._replace(dropped=0)._asdict()
    for step in (6, 9):
        for file in (run / "checkpoints" / f"step-{step:08d}").iterdir():
            file.unlink()
        (run / "checkpoints" / f"step-{step:08d}").rmdir()
    again = resume_run(run, backend="numpy", threads=1)
    assert again.step == 3
    again.train()
    again.close()
    assert (run / "router.jsonl").read_bytes() == straight


def test_a_dense_run_has_no_such_log(mhmoe_here: Run, tmp_path: Path) -> None:
    prepare(tmp_path, steps=2)
    config = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(re.sub(r"(num_experts|moe)\w* = .*\n", "", config))
    options = ("--data", "text.txt", "--out", "run", "--backend", "numpy")
    assert "experts:" not in mhmoe_here("train", "config.toml", *options).stderr
    assert not (tmp_path / "run" / "router.jsonl").exists()
    assert all("router" not in line for line in lines_of(tmp_path / "run" / "metrics.jsonl"))


def test_plain_logs_say_how_experts_are_used_and_have_the_last_step(
    mhmoe_here: Run, tmp_path: Path
) -> None:
    prepare(tmp_path, steps=13)
    options = ("--data", "text.txt", "--out", "run", "--backend", "numpy")
    said = mhmoe_here("train", "config.toml", *options).stderr.splitlines()
    steps = [int(found[1]) for line in said if (found := re.match(r"step (\d+)/13 ", line))]
    assert steps == [1, 10, 13]
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    (layer,) = last["router"]
    shown = f"  experts: entropy {layer['entropy']:.2f}  max/mean {layer['max_over_mean']:.1f}  "
    assert said[-3] == f"{shown}dead {layer['dead']}"
    assert re.fullmatch(r"done in \d+ s: run; its report: run/report.html", said[-2])
    assert said[-1] == 'go on with: mhmoe-np generate run --prompt "..."'


# ---- TensorBoard ----------------------------------------------------------------------------------


def events_of(folder: Path) -> list[Any]:
    """All events of a run, parsed as TensorBoard does: length, its sum, bytes, their sum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    events = []
    for file in sorted((folder / "tensorboard").iterdir()):
        assert "tfevents" in file.name
        content = file.read_bytes()
        while content:
            length, sum_1 = struct.unpack("<QI", content[:12])
            assert sum_1 == masked_crc32c(content[:8])
            record, rest = content[12 : 12 + length], content[12 + length :]
            assert struct.unpack("<I", rest[:4])[0] == masked_crc32c(record)
            events.append(Event.FromString(record))
            content = rest[4:]
    return events


def test_event_files_hold_what_the_logs_do(tmp_path: Path) -> None:
    trainer = started(tmp_path, tensorboard=True, router_every=4, eval_every=4)

    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 5:
            raise Stop

    with pytest.raises(Stop):
        trainer.train(stop)
    trainer.close()
    run = tmp_path / "run"
    again = resume_run(run, backend="numpy", threads=1)
    again.train()
    again.close()
    events = events_of(run)
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 6]  # from where on what older files say no longer counts
    summaries = [event for event in events if event.HasField("summary")]
    validations = [event for event in summaries if event.summary.value[0].tag.startswith("validation/")]
    for event, line in zip(validations, lines_of(run / "validation.jsonl"), strict=True):
        assert event.step == line["step"]
        found = {value.tag: value.simple_value for value in event.summary.value}
        scores = line["domains"]["text"]
        assert found == pytest.approx(
            {"validation/mean_nll": line["mean_nll"]}
            | {
                f"validation/text/{name}": scores[name]
                for name in ("mean_nll", "token_ppl", "bits_per_byte")
            }
        )
    assert validations[0].step == 4
    steps = [event for event in summaries if event not in validations]
    assert [event.step for event in steps] == list(range(1, 10))
    routers = {line["step"]: line["layers"][0] for line in lines_of(run / "router.jsonl")}
    for event, line in zip(steps, lines_of(run / "metrics.jsonl"), strict=True):
        values = {value.tag: value for value in event.summary.value}
        assert values["loss"].simple_value == pytest.approx(line["loss"])
        entropy = values["router/layer_1/entropy"].simple_value
        assert entropy == pytest.approx(line["router"][0]["entropy"])
        assert ("router/layer_1/load" in values) == (line["step"] in (1, 4, 8))
        if line["step"] in routers:
            router = routers[line["step"]]
            heads = [values[f"router/layer_1/head_{head}/load"].histo.bucket for head in (0, 1)]
            assert [list(bucket) for bucket in heads] == router["load"]
            whole = values["router/layer_1/gate_mass"].histo
            assert list(whole.bucket) == pytest.approx(np.sum(router["gate_mass"], axis=0), rel=1e-5)
            assert list(whole.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
            assert values["router/layer_1/logit_max"].simple_value == pytest.approx(
                router["logit_max"], rel=1e-5
            )


def test_without_tensorboardx_nothing_is_started(
    mhmoe_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, steps=2)
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda _name: None)
    options = ("--data", "text.txt", "--out", "run", "--backend", "numpy", "--tensorboard")
    said = mhmoe_here("train", "config.toml", *options, code=2).stderr
    assert said == (
        "mhmoe-np: training.tensorboard: needs tensorboardX, which is not installed; install it with: "
        "pip install 'mhmoe-np[tensorboard]', or leave the setting out\n"
    )
    assert not (tmp_path / "run").exists()
