"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input or an impossible request, told in one message: the file, the line or key, what was expected, what to do.

    `pctrain.cli` prints it without a traceback and exits with status 2.
    """
