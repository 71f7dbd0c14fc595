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
