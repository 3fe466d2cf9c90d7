"""How a command ends other than by finishing: an input that cannot be used, a run that failed, a run that was asked to stop."""


class UserError(Exception):
    """Bad input or an impossible request, told in one message: the file, the line or key, what was expected, what to do.

    `pctrain.cli.main` prints it without a traceback and exits with status 2.
    """


class RunFault(RuntimeError):
    """A run that cannot go on: the message names rank, phase and cause, and where the stacks lie. Exit status 1.

    `speaker`: whether this rank is the one that tells the user (the lowest of those that still answer).
    """

    def __init__(self, message: str, speaker: bool = True):
        super().__init__(message)
        self.speaker = speaker


class ToBeContinued(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1), has saved a checkpoint, and leaves. Exit status 0."""
