"""Every kernel compiles for every architecture, within its budget: compiled, not run on a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mhmoe_np.operations.cuda.sources import kernel_files, source_of
from tests.cuda import toolchain
from tests.cuda.toolchain import ARCHITECTURES, SOURCES, Source, compiled, float_atomics, kernels_of

pytestmark = pytest.mark.skipif(not toolchain.IS_HERE, reason="no wheels of the compilers")
of_each_source = pytest.mark.parametrize("source", SOURCES, ids="-".join)


def of_each(architectures: dict[str, tuple[int, ...]]) -> Any:
    """Every source, on each architecture of its type."""
    cases = [(source, arch) for source in SOURCES for arch in architectures[source[1]]]
    ids = [f"{file}-{dtype}-{arch}" for (file, dtype), arch in cases]
    return pytest.mark.parametrize(("source", "architecture"), cases, ids=ids)


@of_each_source
def test_cuda_13_compiles_it_without_a_warning(source: Source) -> None:
    assert compiled()[source].log == ""


# Of these CUDA 12 spills up to 18 registers on sm_90, which CUDA 13 does not.
SPILL_WITH_CUDA_12 = {"attention_256", "cached_attention_256", "gate_up_few"}
SPILL = re.compile(r"ptxas warning : Registers are spilled to local memory in function '(\w+)', .*")


@of_each(toolchain.NVRTC12_ARCHITECTURES)
def test_cuda_12_compiles_it(source: Source, architecture: int) -> None:
    log = toolchain.compiled_by_nvrtc12()[source, architecture]
    assert set(SPILL.findall(log)) <= SPILL_WITH_CUDA_12
    assert SPILL.sub("", log).strip() == ""


@of_each_source
def test_no_kernel_has_local_memory(source: Source) -> None:
    resources = compiled()[source].resources
    assert set(resources) == set(ARCHITECTURES[source[1]])
    for architecture, kernels in resources.items():
        assert set(kernels) == set(kernels_of(source[0]))
        for name, taken in kernels.items():
            assert (taken.stack_bytes, taken.local_bytes) == (0, 0), (name, architecture)


def test_every_kernel_keeps_its_budget() -> None:
    """One that takes more may run fewer threads at once; --write where that is meant."""
    budget, found = toolchain.read_budget(), toolchain.measured()
    assert {f: set(kernels) for f, kernels in budget.items()} == {f: set(k) for f, k in found.items()}
    for file, kernels in found.items():
        for name, by_type in kernels.items():
            for dtype, (registers, shared_bytes) in by_type.items():
                most_registers, most_bytes = budget[file][name][dtype]
                assert registers <= most_registers, (file, name, dtype)
                assert shared_bytes <= most_bytes, (file, name, dtype)


@pytest.mark.parametrize("file", kernel_files())
def test_every_kernel_says_how_many_threads_it_is_launched_with(file: str) -> None:
    """Else a compiler may give it more registers than so many threads can have."""
    for kernel in toolchain.KERNEL.finditer(source_of(file)):
        assert kernel["bounds"], kernel["name"]


@of_each_source
def test_no_floats_are_added_atomically(source: Source) -> None:
    read = compiled()[source].instructions
    assert tuple(read) == tuple(toolchain.disassembled(source))
    for kernels in read.values():
        assert set(kernels) == set(kernels_of(source[0]))
        for name, instructions in kernels.items():
            assert instructions
            assert float_atomics(instructions) == [], name


# What a source asks for: the instruction that it must become, and from which architecture on.
INSTRUCTIONS = {
    r"__dp4a|dp4a\.": ("IDP.4A", 75),
    r"mma\.sync\S*\.s8": ("IMMA.", 80),
    r"mma\.sync\S*\.tf32": ("HMMA.1688.F32.TF32", 80),
}


ASKING = [
    pytest.param((file, dtype), architecture, wanted, id=f"{file}-{dtype}-{architecture}-{wanted}")
    for asked, (wanted, first) in INSTRUCTIONS.items()
    for file, dtype in SOURCES
    for architecture in ARCHITECTURES[dtype]
    if re.search(asked, source_of(file)) and architecture >= first
    if not ("tf32" in asked and dtype == "float64")  # no such thing
]


@pytest.mark.parametrize(("source", "architecture", "wanted"), ASKING)
def test_what_asks_for_a_fast_instruction_gets_it(
    source: Source, architecture: int, wanted: str
) -> None:
    kernels = compiled()[source].instructions[architecture]
    assert any(wanted in instruction for body in kernels.values() for instruction in body)


def test_every_fast_instruction_is_asked_for() -> None:
    assert {case.values[2] for case in ASKING} == {wanted for wanted, _ in INSTRUCTIONS.values()}
