"""The standalone script: what passes, what fails, and that it says where."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.conformance.folder import SHIPPED
from tests.conformance.results import VECTORS, checked, expected, named, save, save_npz

ROUTE = "route/ties"
SCRIPT = str(SHIPPED / "check_vectors.py")


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run it in this process: exit code and what it printed."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(SCRIPT, run_name="__main__")
        printed, said = capsys.readouterr()
        return int(ended.value.code or 0), printed + said

    return run


def test_the_expected_results_pass(script: Any, tmp_path: Path) -> None:
    for i, name in enumerate(VECTORS):
        (save, save_npz)[i % 2](tmp_path, name, expected(name))
    code, printed = script(tmp_path)
    assert (code, printed.splitlines()[-1]) == (0, f"{len(VECTORS)} of {len(VECTORS)} vectors pass")


def test_it_needs_nothing_of_this_package(tmp_path: Path) -> None:
    save(tmp_path, ROUTE, expected(ROUTE))
    assert checked(tmp_path, ROUTE).startswith("ok    route/ties ")
    lines = checked(tmp_path, "route/*", code=1).splitlines()
    assert lines[-1] == f"1 of {len(named('route/*'))} vectors pass"
    assert all("no results" in line for line in lines[:-1] if not line.startswith("ok"))


def narrow(tensors: dict[str, Any]) -> dict[str, Any]:
    """Floats as float32, as an implementation in float32 would have them at best."""
    return {
        name: tensor.astype(np.float32) if tensor.dtype == np.float64 else tensor
        for name, tensor in tensors.items()
    }


def test_float32_is_held_to_its_own_tolerance(script: Any, tmp_path: Path) -> None:
    save(tmp_path, ROUTE, narrow(expected(ROUTE)))
    assert script(tmp_path, "--only", ROUTE)[0] == 0
    # The same numbers pretending to be float64 are not good enough.
    widened = {
        name: tensor.astype(np.float64) if tensor.dtype == np.float32 else tensor
        for name, tensor in narrow(expected(ROUTE)).items()
    }
    save(tmp_path, ROUTE, widened)
    assert script(tmp_path, "--only", ROUTE)[0] == 1


def changed(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {**tensors, key: change(tensors[key].copy())}


def put(place: tuple[int, ...], value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[place] = value
        return array

    return change


def moved(place: tuple[int, ...], tolerances: float) -> Callable[[Any], Any]:
    """One element off by so many tolerances."""
    step = VECTORS[ROUTE]["tensors"]["p_ME"]["tolerance"]["float64"] * tolerances

    def change(array: Any) -> Any:
        array[place] += step
        return array

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("p_ME", moved((1, 3), 1.5)), "p_ME[1, 3] is"),
        (changed("p_ME", put((2, 0), np.nan)), "p_ME[2, 0] is nan, must be"),
        (changed("dlogits_ME", put((0, 4), np.inf)), "dlogits_ME[0, 4] is inf, must be"),
        (changed("expert_MK", put((0, 1), 4)), "expert_MK[0, 1] is 4, must be 2 exactly"),
        (changed("expert_MK", lambda a: a.astype(float)), "expert_MK is float64; must hold integers"),
        (changed("gate_MK", lambda a: a.T.copy()), "gate_MK has shape [2, 3], must be [3, 2]"),
        (
            changed("gate_MK", lambda a: a.astype(np.float16)),
            "gate_MK is float16; must be float64 or float32",
        ),
        (lambda t: {k: v for k, v in t.items() if k != "gate_MK"}, "gate_MK is missing"),
        (lambda t: {**t, "gates": t["gate_MK"]}, "gates is no tensor of this vector"),
    ],
)
def test_each_fault_is_named(change: Any, words: str, script: Any, tmp_path: Path) -> None:
    save(tmp_path, ROUTE, change(expected(ROUTE)))
    code, printed = script(tmp_path, "--only", ROUTE)
    assert code == 1
    assert printed.startswith(f"FAIL  {ROUTE} ")
    assert words in printed


def test_half_a_tolerance_passes(script: Any, tmp_path: Path) -> None:
    save(tmp_path, ROUTE, changed("p_ME", moved((1, 3), 0.5))(expected(ROUTE)))
    code, printed = script(tmp_path, "--only", ROUTE)
    assert code == 0
    share = re.search(r"([\d.]+)% of the tolerance, p_ME", printed)
    assert share is not None
    assert float(share[1]) == pytest.approx(50, abs=5)  # beside it the expected numbers are rounded


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_damaged_file_fails_its_vector_alone(suffix: str, script: Any, tmp_path: Path) -> None:
    for name in named("route/*"):
        save(tmp_path, name, expected(name))
    (tmp_path / f"{ROUTE}.safetensors").unlink()
    (tmp_path / f"{ROUTE}.{suffix}").write_bytes(b"not a file of tensors")
    code, printed = script(tmp_path, "--only", "route/*")
    assert code == 1
    assert f"{ROUTE}.{suffix}: cannot be read" in printed
    assert printed.count("FAIL") == 1


def test_it_lists_the_vectors(script: Any) -> None:
    code, printed = script("--list")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == list(VECTORS)


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["--only", "no-such/*", "."]])
def test_wrong_arguments_are_told(arguments: list[str], script: Any) -> None:
    assert script(*arguments)[0] == 2
