"""The one exception that means: something the user can put right."""


class DoRAError(ValueError):
    """Bad input, told in one line: what, what was expected, what came, how to fix it.

    The command line prints the message alone and exits with code 1. Mistakes in calling
    code raise `TypeError` instead, and the operating system's `OSError` passes through.
    """
