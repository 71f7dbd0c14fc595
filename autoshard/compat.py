"""The one place for private parts of PyTorch: why each is needed, and where it was tried.

- ``_disable_current_modes`` (torch 2.11, 2.13): a dispatch mode of the caller (``CommDebugMode``, a
  FLOP counter) would be traced into the captured graph. There is no public way to step outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Outside all torch dispatch modes of the caller."""
    with _disable_current_modes():
        yield
