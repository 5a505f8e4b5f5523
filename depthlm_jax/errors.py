"""The one exception that a user of the command line is meant to read."""


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, what was found, what was expected and what to do."""

    def __init__(self, what: str, *, found: object, expected: object, fix: str):
        super().__init__(f"{what}\n  found:    {found}\n  expected: {expected}\n  fix:      {fix}")
