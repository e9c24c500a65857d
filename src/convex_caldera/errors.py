"""What can go wrong, one class per way; each message says what, where, value and remedy.

Every class carries the exit code of the command line: 2 wrong usage or input, 3 infeasible
budget, 4 a check failed, 5 interrupted and resumable.
"""

from __future__ import annotations


class ConvexCalderaError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 2


class RecipeError(ConvexCalderaError):
    """A recipe, plan, option or configuration contradicts itself or names what does not exist."""


class ModelError(ConvexCalderaError):
    """A model cannot be read, or has no decoder blocks or linear layers to compress."""


class DataError(ConvexCalderaError):
    """A text or data set is missing, empty or shorter than asked for."""


class ShapeError(ConvexCalderaError):
    """Shapes do not fit together; the message gives all of them."""


class InfeasibleBudgetError(ConvexCalderaError):
    """No plan fits the budget; `least_bits` is the least feasible number of stored bits."""

    exit_code = 3

    def __init__(self, message: str, least_bits: int | None = None):
        super().__init__(message)
        self.least_bits = least_bits


class NumericalError(ConvexCalderaError):
    """NaN or infinite input, or a matrix that is not positive (semi)definite."""

    exit_code = 4


class FormatError(ConvexCalderaError):
    """A stored file is truncated, altered, inconsistent or not ours."""

    exit_code = 4


class CheckError(ConvexCalderaError):
    """A claim was recomputed and found false."""

    exit_code = 4


class InterruptedRunError(ConvexCalderaError):
    """Stopped with work kept: disk full, signal, or a run that can be resumed."""

    exit_code = 5


class ResumeError(ConvexCalderaError):
    """A partial run cannot be continued: model, text or recipe differ from its fingerprint."""
