"""The exceptions of this package. Each message names the value, the limit and the remedy."""


class OpenCharacterError(Exception):
    """Base of all errors that a user can act on; the command line prints them in one line."""


def one_line_message(error: OpenCharacterError) -> str:
    """Return an error's message without the lines that Ray adds to an error from an actor."""
    cause = getattr(error, "cause", None)  # Ray keeps the original error here
    return str(cause).splitlines()[0] if cause else str(error)


class UserError(OpenCharacterError):
    """Invalid input, detected before anything is written. Exit code 2."""


class StaleError(UserError):
    """A stored dataset does not match what was asked for. Exit code 2."""


class StageFailed(OpenCharacterError):
    """A stage ran and its result must not be used. Exit code 1."""


class RowFailed(OpenCharacterError):
    """One conversation failed. Its row is stored as dropped, and the stage continues.

    Args:
        reason: the row's `drop_reason`, a short word in snake_case.
        detail: what happened, for the row's `error` column.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both are arguments so that the exception can be pickled
        self.reason = reason
        self.detail = detail
