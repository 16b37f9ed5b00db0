"""The error that means: the user asked for something that cannot be done."""


class UserError(Exception):
    """A mistake in a recipe, a command or the data.

    The message is one line: what was wrong, what was expected, and the nearest fix. The command line prints it without
    a traceback and exits with code 2.
    """
