"""`--backend cuda` where there is none, or not the right one: one line with the remedy, at once."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mhmoe_np.errors import UserError
from mhmoe_np.operations.cuda.driver import check_cupy, check_driver
from tests.conftest import Run
from tests.cuda.emulator import has_gpu

COMMANDS = {
    "train": ["train"],
    "eval": ["eval", "CKPT", "--domain", "a=b"],
    "generate": ["generate", "CKPT", "--prompt", "x"],
    "trace": ["trace", "CKPT", "--tokens", "t.json", "--out", "o"],
    "gradcheck": ["gradcheck"],
    "audit": ["audit"],
    "plan": ["plan"],
}


class Driver:
    """What `libcuda` says."""

    def __init__(self, *, start: int = 0, devices: int = 1, version: int = 13000) -> None:
        self._start, self._devices, self._version = start, devices, version

    def cuInit(self, flags: int) -> int:
        return self._start

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._devices
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0


def cupy(*, runtime: int = 13000, driver: int = 13000, capability: str = "90") -> Any:
    return SimpleNamespace(
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(runtimeGetVersion=lambda: runtime, driverGetVersion=lambda: driver),
            Device=lambda: SimpleNamespace(compute_capability=capability),
        )
    )


def refused(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, *, cupy: bool = True) -> str:
    def library(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if cupy else None)
    with pytest.raises(UserError) as error:
        check_driver()
    return str(error.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no NVIDIA driver" in refused(monkeypatch, None)


def test_a_driver_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "error 999" in refused(monkeypatch, Driver(start=999))


@pytest.mark.parametrize("driver", [Driver(start=100), Driver(devices=0)])
def test_a_missing_device_is_named(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    assert "no NVIDIA GPU is visible" in refused(monkeypatch, driver)


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, Driver(version=11080))
    assert "too old: it is for CUDA 11, 12 or later" in said


@pytest.mark.parametrize(("version", "extra"), [(12040, "12"), (13000, "13"), (14000, "13")])
def test_a_missing_cupy_is_named_with_the_extra_for_the_driver(
    monkeypatch: pytest.MonkeyPatch, version: int, extra: str
) -> None:
    said = refused(monkeypatch, Driver(version=version), cupy=False)
    assert f"pip install 'mhmoe-np[cupy-cuda{extra}x]'" in said


def test_a_cupy_for_a_newer_driver_is_named() -> None:
    with pytest.raises(UserError, match=r"CuPy is for CUDA 13, the NVIDIA driver for CUDA 12"):
        check_cupy(cupy(driver=12080), "float32")
    check_cupy(cupy(runtime=12000), "float32")


def test_a_device_that_is_too_old_is_named() -> None:
    with pytest.raises(UserError, match=r"compute capability is 7.0, 7.5 or more"):
        check_cupy(cupy(capability="70"), "float32")
    with pytest.raises(UserError, match=r"training.matmul=tf32: .* 7.5, 8.0 or more"):
        check_cupy(cupy(capability="75"), "tf32")
    check_cupy(cupy(capability="75"), "float32")
    check_cupy(cupy(capability="80"), "tf32x3")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_in_one_line_that_there_is_no_gpu(
    mhmoe: Run, tmp_path: Path, command: str
) -> None:
    result = mhmoe(*COMMANDS[command], "--backend", "cuda", code=2)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    if command in ("train", "gradcheck", "audit", "plan"):  # the others miss their checkpoint first
        assert "--backend cuda: " in lines[0]
        assert "use --backend numba" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_nothing_slow_is_imported_before_a_missing_gpu_is_named() -> None:
    program = (
        "import sys; from mhmoe_cli.main import main\n"
        "sys.argv = ['mhmoe-np', 'train', '--backend', 'cuda']\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, [m for m in ('numba', 'cupy', 'scipy') if m in sys.modules])"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "2 []", result.stdout + result.stderr
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_other_products_than_float32_are_for_the_gpu(mhmoe: Run, backend: str) -> None:
    result = mhmoe("train", "--backend", backend, "--set", "training.matmul=tf32", code=2)
    assert "--set training.matmul=tf32: --backend cuda alone computes so" in result.stderr
    result = mhmoe("train", "--set", "training.matmul=half", code=2)
    assert "matmul" in result.stderr
