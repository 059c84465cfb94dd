"""Errors that several rooms raise."""


class BrokenSample(Exception):
    """Raised by a dataset whose files cannot be read; every message, one line, names a file and the reason."""

    def __init__(self, *messages: str):
        super().__init__("\n".join(" ".join(message.split()) for message in messages))
