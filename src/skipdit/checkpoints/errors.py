"""Errors of checkpoints."""


class WeightsError(ValueError):
    """A checkpoint that cannot be read, or that does not belong to the model."""
