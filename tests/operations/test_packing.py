"""The layouts of packed weights: nothing is lost, and the bytes are what they are said to be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_np.operations.packing import (
    FORMATS,
    PANEL,
    FormatName,
    PackedMatrices,
    code_shape,
    empty_code,
    pack,
    unpack,
)
from tests.operations.cases import BACKENDS, DTYPES, SEEDS, VALUES, always, quick

of_each_format = pytest.mark.parametrize("format", FORMATS)


@of_each_format
@always([{"E": 1, "O": o, "I": i, "seed": 1} for o in (1, 15, 16, 17) for i in (1, 19, 20, 21, 32, 33)])
@given(E=st.integers(1, 3), O=st.integers(1, 40), I=st.integers(1, 80), seed=SEEDS)
@quick(40)
def test_unpacking_gives_back_what_was_packed(
    format: FormatName, E: int, O: int, I: int, seed: int
) -> None:
    q = np.random.default_rng(seed).choice(VALUES[format], (E, O, I))
    for dtype in (np.int8, np.float32):
        packed = pack(q.astype(dtype), format)
        assert packed.code.shape == (E, *code_shape(O, I, format))
        assert packed.code.ctypes.data % 64 == 0
        np.testing.assert_array_equal(unpack(packed), q)
        np.testing.assert_array_equal(unpack(packed.matrix(E - 1)), q[-1:])


@of_each_format
@always([{"E": 2, "O": o, "I": i, "seed": 2} for o in (1, 15, 16, 17) for i in (1, 15, 16, 19, 20, 33)])
@given(E=st.integers(1, 3), O=st.integers(1, 40), I=st.integers(1, 80), seed=SEEDS)
@quick(40)
def test_a_backend_packs_as_defined(format: FormatName, E: int, O: int, I: int, seed: int) -> None:
    for dtype in DTYPES:
        q = np.random.default_rng(seed).choice(VALUES[format], (E, O, I)).astype(dtype)
        expected = pack(q, format)
        for ops in BACKENDS.values():
            packed = PackedMatrices(empty_code(E, O, I, format), O, I, format)
            packed.code[...] = 255
            ops.pack_in_place(q, packed)
            np.testing.assert_array_equal(packed.code, expected.code)


@of_each_format
@pytest.mark.parametrize("value", [2, -2, 0.5, np.nan])
def test_other_values_are_refused(format: FormatName, value: float) -> None:
    q = np.ones((1, 3, 5))
    q[0, 2, 4] = value
    with pytest.raises(ValueError, match=format):
        pack(q, format)


def test_sign_has_no_zero() -> None:
    with pytest.raises(ValueError, match="sign-1bit"):
        pack(np.zeros((1, 1, 1)), "sign-1bit")


@of_each_format
def test_every_combination_of_values_has_a_byte_of_its_own(format: FormatName) -> None:
    # Output 0; block b of a byte is input 4 b of its group, so each combination is a group.
    depth, base = FORMATS[format].depth, FORMATS[format].base
    combinations = np.array(list(itertools.product(VALUES[format], repeat=depth)))
    q = np.full((1, 1, len(combinations), depth, 4), -1)
    q[..., 0] = combinations
    packed = pack(q.reshape(1, 1, -1), format)
    assert len(np.unique(packed.code[0, 0, :, 0])) == base**depth
    np.testing.assert_array_equal(unpack(packed).reshape(q.shape), q)


@of_each_format
@pytest.mark.parametrize(("O", "more"), [(1, 1), (15, 3), (17, 1), (33, 19)])
def test_padding_is_code_zero(format: FormatName, O: int, more: int) -> None:
    # Whatever memory held before, or files of one model would differ: read the padding as weights.
    I = FORMATS[format].group + more
    packed = pack(np.ones((2, O, I)), format)
    panels, groups, _ = code_shape(O, I, format)
    whole = packed._replace(outputs=panels * PANEL, inputs=groups * FORMATS[format].group)
    values = unpack(whole)
    assert (values[:, :O, :I] == 1).all()
    values[:, :O, :I] = -1
    assert (values == -1).all()


# Written out by hand from the layout's description: one group of a single output, so byte k of the 64
# holds input k (k < 4) of each block.
GOLDEN: list[tuple[FormatName, list[int], list[int]]] = [
    # inputs 0, 4, 8, 12 = 1, 0, -1, 1: codes 2, 1, 0, 2 = 2 + 1*4 + 0*16 + 2*64; input 1 = 0 is code 1
    ("ternary-2bit", [1, 0, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1, 1, -1, -1, -1], [134, 1, 0, 0]),
    # inputs 0, 4, 8, 12, 16 = 1, 0, -1, 1, 0: 2*81 + 1*27 + 0*9 + 2*3 + 1 = 196, and
    # ceil(196 * 256/243) = 207; inputs 1, 5, ... = 1: 242, and ceil(242 * 256/243) = 255
    (
        "ternary-base3",
        [1, 1, -1, -1, 0, 1, -1, -1, -1, 1, -1, -1, 1, 1, -1, -1, 0, 1, -1, -1],
        [207, 255, 0, 0],
    ),
    # inputs 0, 4, ..., 28 = 1, -1, 1, 1, -1, -1, -1, 1: bits 0, 2, 3, 7
    (
        "sign-1bit",
        [value for first in (1, -1, 1, 1, -1, -1, -1, 1) for value in (first, -1, 1, -1)],
        [141, 0, 255, 0],
    ),
]


@pytest.mark.parametrize(("format", "row", "first_bytes"), GOLDEN)
def test_the_bytes_are_those_of_the_description(
    format: FormatName, row: list[int], first_bytes: list[int]
) -> None:
    # [spec 5 packed weights]
    assert len(row) == FORMATS[format].group
    code = pack(np.array(row)[None, None], format).code
    assert code.shape == (1, 1, 1, 64)
    assert code[0, 0, 0, :4].tolist() == first_bytes
    # The same row as output 3 of a second expert's second panel stands at byte 4 * 3 there.
    lowest: Any = np.full((2, 2 * PANEL, len(row)), -1)
    lowest[1, PANEL + 3] = row
    code = pack(lowest, format).code
    assert code[1, 1, 0, 12:16].tolist() == first_bytes
    assert np.count_nonzero(code) == np.count_nonzero(first_bytes)


@pytest.mark.parametrize(
    ("format", "bits"), [("ternary-2bit", 2.0), ("ternary-base3", 1.6), ("sign-1bit", 1.0)]
)
def test_a_weight_costs_as_many_bits_as_the_format_says(format: FormatName, bits: float) -> None:
    panels, groups, width = code_shape(1600, 1600, format)
    assert 8 * panels * groups * width / 1600**2 == bits
