"""The one place for private parts of PyTorch: why each is needed, and where it was tried.

- ``_disable_current_modes`` (torch 2.11, 2.13): a dispatch mode of the caller (``CommDebugMode``, a
  FLOP counter) would be traced into the captured graph. There is no public way to step outside.
- ``torch.autograd.function._is_setup_context_defined`` (torch 2.11, 2.13): every ``Function.apply``
  calls it. Replacing ``apply`` itself would miss ``f = MyFunction.apply`` stored before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.autograd.function as autograd_function
from torch.utils._python_dispatch import _disable_current_modes


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Outside all torch dispatch modes of the caller."""
    with _disable_current_modes():
        yield


@contextlib.contextmanager
def autograd_functions_applied(
    notice: Callable[[Any, tuple[Any, ...]], None],
) -> Iterator[None]:
    """Call ``notice(class, arguments)`` for every ``autograd.Function`` that is applied inside."""
    module: Any = autograd_function
    original = module._is_setup_context_defined

    def hook(setup_context: Any) -> Any:
        inside_apply = sys._getframe(1).f_locals
        if "cls" in inside_apply:
            notice(inside_apply["cls"], tuple(inside_apply.get("args", ())))
        return original(setup_context)

    module._is_setup_context_defined = hook
    try:
        yield
    finally:
        module._is_setup_context_defined = original
