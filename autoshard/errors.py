"""The errors that users see. Each message names the layer or parameter, both numbers, and the fix."""


class AutoshardError(Exception):
    """Base class of all errors of this package."""


class CaptureError(AutoshardError):
    """The model could not be captured as one graph."""


class PlanError(AutoshardError, ValueError):
    """A plan that does not fit the model, or a degree that a region cannot take."""


class UnknownOperatorError(AutoshardError):
    """An operator without a rule stands where an axis could be split (``strict=True``)."""


class UnsoundGraphError(AutoshardError):
    """The check of a rewritten graph failed: it is not provably the same function."""


class CheckpointError(AutoshardError):
    """A checkpoint that is missing, damaged, or of another model. Nothing was loaded."""


class RanksDifferError(AutoshardError):
    """Ranks that must hold the same values, or get the same inputs, do not. Raised on all of them."""


class CollectiveError(AutoshardError):
    """A collective of a step failed: a rank died, hangs, or does something else than the others.

    Attributes:
        missing: ranks of the world that did not answer.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class NonFiniteError(AutoshardError, ArithmeticError):
    """A value that is infinite or not a number. Raised on all ranks of the tensor parallel group."""
