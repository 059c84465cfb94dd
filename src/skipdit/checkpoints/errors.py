"""Errors of checkpoints."""

from skipdit.utils.errors import UserError


class WeightsError(UserError):
    """A checkpoint that cannot be read, or that does not belong to the model."""
