"""Which BLAS compiled kernels multiply with, and that they do."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhmoe_np.errors import UserError
from mhmoe_np.operations.blas import VARIABLE, blas_of
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu import blas_choice, own_product
from mhmoe_np.operations.numba_cpu.blas_choice import choose, fastest
from mhmoe_np.operations.numba_cpu.blas_libraries import Library, openblas, product

ROOT = Path(__file__).parents[2]
SOMEWHERE = (Path("/somewhere/libmkl_core.so.2"),)
MKL, OWN = Library("mkl", 1, 2), Library("own", 3, 4)
INTEL, AMD, ANOTHER = "GenuineIntel", "AuthenticAMD", "CentaurHauls"


@pytest.mark.parametrize("package", ["numpy", "scipy"])
def test_a_blas_says_its_name_and_version_as_its_package_does(package: Any) -> None:
    built = import_module(package).show_config(mode="dicts")["Build Dependencies"]["blas"]
    found = blas_of(package)
    assert built["name"].endswith(found.name)
    assert built["version"].startswith(found.version)


def test_a_backend_says_whose_products_it_uses() -> None:
    assert load_operations("numpy").blas() == blas_of("numpy")
    expected = choose().blas()
    assert load_operations("numba").blas() == expected


# ---- which one ------------------------------------------------------------------------------------


class Surroundings:
    """A processor, and whether MKL is installed, as `choose` finds them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def set(
        self,
        wanted: str | None,
        *,
        installed: bool,
        vendor: str,
        ours: bool = True,
        architecture: str = "AVX2",
    ) -> None:
        if wanted is None:
            self._patch.delenv(VARIABLE, raising=False)
        else:
            self._patch.setenv(VARIABLE, wanted)
        self._patch.setattr(blas_choice, "mkl_libraries", lambda: SOMEWHERE if installed else ())
        self._patch.setattr(blas_choice, "mkl", lambda paths: MKL if paths == SOMEWHERE else None)
        self._patch.setattr(blas_choice, "own", lambda: OWN)
        self._patch.setattr(own_product, "available", lambda: ours)
        self._patch.setattr(own_product, "ARCHITECTURE", architecture)
        self._patch.setattr(blas_choice, "processor_facts", lambda: {"vendor_id": vendor})


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    return Surroundings(monkeypatch)


@pytest.mark.parametrize(
    ("wanted", "installed", "expected"),
    [
        (None, False, "own"),
        ("", True, "own"),
        ("own", True, "own"),
        ("openblas", True, "openblas"),
        ("mkl", True, "mkl"),
    ],
)
def test_the_variable_rules_and_else_what_was_measured(
    surroundings: Surroundings,
    wanted: str | None,
    installed: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    surroundings.set(wanted, installed=installed, vendor=AMD)
    monkeypatch.setattr(blas_choice, "fastest", None)  # nothing is probed
    assert choose().name == expected


@pytest.mark.parametrize(
    ("installed", "vendor", "ours", "architecture", "candidates"),
    [
        (True, INTEL, True, "AVX2", ["openblas", "own", "mkl"]),
        (False, INTEL, True, "AVX-512", ["openblas", "own"]),
        (True, AMD, True, "AVX-512", ["openblas", "own", "mkl"]),
        (True, ANOTHER, False, "AVX2", ["openblas", "mkl"]),
        (False, AMD, False, "AVX2", ["openblas"]),
    ],
)
def test_on_any_other_processor_the_fastest_is_chosen_of_those_that_are_there(
    surroundings: Surroundings,
    installed: bool,
    vendor: str,
    ours: bool,
    architecture: str,
    candidates: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    surroundings.set(None, installed=installed, vendor=vendor, ours=ours, architecture=architecture)
    monkeypatch.setattr(Library, "blas", lambda self: (self.name, "1", None))
    for winner in candidates:
        probed: list[str] = []

        def probe(
            libraries: list[Library], winner: str = winner, probed: list[str] = probed
        ) -> list[float]:
            probed += [library.name for library in libraries]
            return [float(library.name != winner) for library in libraries]

        monkeypatch.setattr(blas_choice, "PROBE", tmp_path / f"{winner}.json")
        monkeypatch.setattr(blas_choice, "_probe", probe)
        assert choose().name == winner
        assert probed == (candidates if len(candidates) > 1 else [])


def test_what_a_probe_found_is_kept_for_one_processor_and_its_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probes: list[str] = []
    versions = {"openblas": "1", "mkl": "1"}

    def probe(libraries: list[Library]) -> list[float]:
        probes.extend(library.name for library in libraries)
        return [{"openblas": 2.0, "mkl": 1.0}[library.name] for library in libraries]

    monkeypatch.setattr(blas_choice, "_probe", probe)
    monkeypatch.setattr(Library, "blas", lambda self: (self.name, versions[self.name], None))
    kept = tmp_path / "probe.json"
    for processor, version, content, count in (
        ("one", "1", None, 2),
        ("one", "1", None, 2),
        ("another", "1", None, 4),
        ("another", "2", None, 6),
        ("another", "2", "[]", 8),
        ("another", "2", "{torn", 10),
        ("another", "2", None, 10),
    ):
        monkeypatch.setattr(blas_choice, "processor", lambda name=processor: name)
        versions["mkl"] = version
        if content is not None:
            kept.write_text(content)
        assert fastest([openblas(), MKL], kept) == MKL
        assert len(probes) == count
    # Where nothing can be written, every process probes.
    assert fastest([openblas(), MKL], tmp_path / "missing" / "probe.json") == MKL


def test_a_probe_finds_the_library_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)
    def wait(*arguments: object) -> None:
        time.sleep(0.02)

    address = ctypes.cast(wait, ctypes.c_void_p).value
    assert address
    slow = Library("own", address, 0)
    monkeypatch.setattr(Library, "blas", lambda self: (self.name, "1", None))
    shapes = [(form, 8, 7, 6) for form in ("nt", "nn", "tn")]
    monkeypatch.setattr(blas_choice, "PROBE_SHAPES", shapes)
    monkeypatch.setattr(blas_choice, "PROBE_ROUNDS", 2)
    for number, candidates in enumerate(([slow, openblas()], [openblas(), slow])):
        assert fastest(candidates, tmp_path / f"{number}.json") == openblas()


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("atlas", "MHMOE_NP_BLAS=atlas: must be own, openblas or mkl; unset it"),
        (
            "mkl",
            "MHMOE_NP_BLAS=mkl: needs mkl, which is not installed; install it with: "
            "pip install 'mhmoe-np[mkl]', or unset it",
        ),
        (
            "own",
            "MHMOE_NP_BLAS=own: this processor lacks AVX2 or FMA; unset it, or set it to openblas",
        ),
    ],
)
def test_a_blas_that_is_not_there_is_refused(
    surroundings: Surroundings, wanted: str, line: str
) -> None:
    surroundings.set(wanted, installed=False, vendor=INTEL, ours=False)
    with pytest.raises(UserError) as refused:
        choose()
    assert str(refused.value) == line


def test_an_mkl_that_cannot_be_loaded_is_refused_where_it_is_asked_for(
    surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> Library:
        raise OSError("libmkl_core.so.2: file too short")

    for wanted in (None, "mkl"):
        surroundings.set(wanted, installed=True, vendor=INTEL, ours=False)
        monkeypatch.setattr(blas_choice, "mkl", broken)
        if wanted is None:
            assert choose() == openblas()
        else:
            with pytest.raises(
                UserError, match=r"mkl: libmkl_core.so.2: file too short; install mkl again"
            ):
                choose()


# ---- that kernels use it --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_a_product_to_be_measured_is_one(form: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 5), dtype=np.float32), rng.standard_normal((5, 3), dtype=np.float32)
    c = np.empty((7, 3), np.float32)
    given = [
        np.ascontiguousarray(x.T if side == "t" else x) for x, side in zip((a, b), form, strict=True)
    ]
    product(openblas(), form, *given, c)()
    np.testing.assert_allclose(c, a @ b, rtol=0, atol=1e-5)


# A library that is none: twice the product, by the definition.
PLANTED = """
extern int factor(void);  /* of the library that this one needs and does not name */
static int branch = -1;
int MKL_CBWR_Set(int wanted) { branch = wanted; return 0; }
#define GEMM(name, number) \\
    void name(const char *ta, const char *tb, const int *m, const int *n, const int *k, \\
              const number *alpha, const number *a, const int *lda, const number *b, const int *ldb, \\
              const number *beta, number *c, const int *ldc) { \\
        for (int i = 0; i < *m; i++) \\
            for (int j = 0; j < *n; j++) { \\
                number sum = 0; \\
                for (int p = 0; p < *k; p++) \\
                    sum += (*ta == 't' ? a[p + i * *lda] : a[i + p * *lda]) \\
                         * (*tb == 't' ? b[j + p * *ldb] : b[p + j * *ldb]); \\
                number *to = c + i + j * *ldc; \\
                sum *= branch == 2 ? factor() : -1; \\
                *to = *alpha * sum + (*beta ? *beta * *to : 0); \\
            } \\
    }
GEMM(sgemm_, float)
GEMM(dgemm_, double)
"""

COMPUTE = """
import ctypes
import json
import numpy as np
from numba.core import event
from mhmoe_np.operations.load import load_operations
from mhmoe_np.operations.numba_cpu.gemm import gemm_nt

blas = load_operations("numba").blas()
results = []
with event.install_recorder("numba:compile") as compiled:
    for dtype in (np.float32, np.float64):
        a, b, c = (np.arange(size, dtype=dtype).reshape(-1, 3) for size in (6, 12, 12))
        gemm_nt(1.0, a, b, 0.0, c.reshape(2, 6)[:, :4])
        results.append(c.reshape(2, 6)[:, :4].tolist())
seen = hasattr(ctypes.CDLL(None), "MKL_CBWR_Set")
print(json.dumps({"results": results, "blas": blas, "compiled": len(compiled.buffer), "seen": seen}))
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with one that calls itself `mkl`."""
    compiler = shutil.which("gcc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    folder = tmp_path_factory.mktemp("packages")
    sources = {"intel_lp64": PLANTED, "sequential": "", "core": "int factor(void) { return 2; }"}
    names = {part: f"libmkl_{part}.so.2" for part in sources}
    for part, source in sources.items():
        program = [compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-", "-o", str(folder / names[part])]
        subprocess.run(program, input=source, text=True, check=True)
    information = folder / "mkl-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mkl\nVersion: 1.5\n")
    (information / "RECORD").write_text("".join(f"{name},,\n" for name in names.values()))
    return folder


def compute(packages: Path, blas: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        env=os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}", VARIABLE: blas},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_compiled_kernels_call_the_library_that_was_chosen(planted: Path) -> None:
    one, other = (compute(planted, name) for name in ("openblas", "mkl"))
    product = [[5, 14, 23, 32], [14, 50, 86, 122]]  # of 0 1 2 3 4 5 and 0 .. 11, by threes
    assert one["results"] == [product, product]
    assert one["blas"] == list(blas_of("scipy"))
    twice = [[2 * number for number in row] for row in product]
    assert other["results"] == [twice, twice]
    assert other["blas"] == ["mkl", "1.5", None]
    assert not other["seen"]  # another library of the process does not find its names
    # Kernels of either process are those of the other.
    assert compute(planted, "openblas")["compiled"] == other["compiled"] == 0
