"""The exceptions of this package; each message names the value, the limit and the remedy."""


class OpenCharacterError(Exception):
    """Base of all errors that a user can act on; the command line prints them in one line."""


def one_line_message(error: OpenCharacterError) -> str:
    """What an error says; to one from an actor Ray adds lines, and keeps it as the cause."""
    cause = getattr(error, "cause", None)
    return str(cause).splitlines()[0] if cause else str(error)


class UserError(OpenCharacterError):
    """Bad input: found before anything is written. Exit code 2."""


class StaleError(UserError):
    """A stored dataset was made from another recipe than the one asked for. Exit code 2."""


class StageFailed(OpenCharacterError):
    """A stage ran and its result may not be used. Exit code 1."""


class RowFailed(OpenCharacterError):
    """One conversation cannot be had; its row is kept with this reason and nothing else stops.

    Args:
        reason: the row's `drop_reason`, a short snake_case word.
        detail: what happened, for the row's `error` column.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both as args: exceptions cross processes by pickle
        self.reason = reason
        self.detail = detail
