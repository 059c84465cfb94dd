"""Errors that several rooms raise."""


class UserError(ValueError):
    """What the user of a command or of the library can mend: a setting, a file, a checkpoint.

    Its message names it and the fix. A command ends with that one line; any other ValueError is a defect.
    """


class BrokenSample(Exception):
    """Raised by a dataset whose files cannot be read; every message, one line, names a file and the reason."""

    def __init__(self, *messages: str):
        super().__init__("\n".join(" ".join(message.split()) for message in messages))
