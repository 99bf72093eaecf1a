"""The one exception for what a user can cause."""


class InputError(ValueError):
    """A mistake in a file, a configuration or a command, told in one sentence.

    The message says what was expected, what came, where, and what to do. The command line prints
    it alone and exits with status 2.
    """
