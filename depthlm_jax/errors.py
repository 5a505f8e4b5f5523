"""The one exception that a user of the command line is meant to read."""


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, what was found, what was expected and what to do."""

    def __init__(self, what: str, *, found: object, expected: object, fix: str):
        self.parts = what, found, expected, fix
        super().__init__(f"{what}\n  found:    {found}\n  expected: {expected}\n  fix:      {fix}")

    def of(self, record_id: str) -> "InputError":
        """Returns the same error with the name of what it is about in front."""
        what, found, expected, fix = self.parts
        return InputError(f"{record_id}: {what}", found=found, expected=expected, fix=fix)

    def __reduce__(self):
        what, found, expected, fix = self.parts  # as text: not every object goes to another process
        return _input_error, (what, str(found), str(expected), fix)


def _input_error(what: str, found: str, expected: str, fix: str) -> InputError:
    return InputError(what, found=found, expected=expected, fix=fix)
