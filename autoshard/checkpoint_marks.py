"""Numbers for the calls of ``torch.utils.checkpoint`` that a capture meets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.fx import traceback

from autoshard.analysis import CHECKPOINT


class Marks:
    """Nodes that are traced inside a call have its number.

    Of nested calls the outermost counts: its recomputation covers the inner ones.
    """

    def __init__(self) -> None:
        self.current: int | None = None
        self.count = 0

    def take(self, calls: int) -> int:
        """The first of so many new numbers."""
        self.count += calls
        return self.count - calls

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Around a call."""
        if self.current is not None:
            yield
            return
        self.current = self.take(1)
        try:
            with traceback.preserve_node_meta(), traceback.annotate({CHECKPOINT: self.current}):
                yield
        finally:
            self.current = None
