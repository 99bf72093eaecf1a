"""Exceptions whose message is for the user: one sentence, and no traceback."""


class InputError(ValueError):
    """A mistake in a file, a configuration or a command, told in one sentence.

    The message says what was expected, what came, where, and what to do. The command line prints
    it alone and exits with status 2.
    """


class Stopped(RuntimeError):  # noqa: N818
    """Work that ended early for a reason; what was done is kept, and the message says how to go on.

    The command line prints the message alone and exits with status 1.
    """
