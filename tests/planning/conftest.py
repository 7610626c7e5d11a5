"""What every measurement of memory here needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Garbage collections, of which every measurement has some, leave what was there before alone."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
