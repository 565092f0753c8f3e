"""The one exception that a user of a command sees as a sentence instead of a traceback."""


class UserError(ValueError):
    """Input that somebody must mend: its text says what was got, what was wanted and what to do."""
