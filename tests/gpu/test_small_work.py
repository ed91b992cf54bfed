"""What the sanitizers watch on a GPU runs here as well, emulated."""

from __future__ import annotations

import pytest

from tests.cuda.emulator import has_gpu
from tests.gpu.small_work import main
from tests.gpu.test_device import WORK


@pytest.mark.skipif(has_gpu(), reason="there the sanitizers run it")
@pytest.mark.parametrize(("kind", "matmul"), WORK)
def test_the_small_work_is_done(kind: str, matmul: str) -> None:
    main(kind, matmul)
