"""The errors that the command line says in one line, without a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a command or the data.

    The message is one line: what was wrong, what was expected, and the nearest fix. The command line prints it without
    a traceback and exits with code 2. It is a ValueError, which is what Python code expects of a wrong value: whoever
    catches ValueErrors of others must let this one pass.
    """


class Failure(Exception):
    """What was asked for could be begun, but not be ended: training has diverged.

    The message is one line: what happened, what is left, and what to try. The command line prints it without a
    traceback and exits with code 1.
    """
