"""The ways a command ends without finishing: input it cannot use, a failed run, or a run that was asked to stop."""


class UserError(Exception):
    """Bad input or an impossible request. The message names the file, line or key, what was expected, and what to do.

    `pctrain.cli.main` prints it without a traceback and exits with status 2.
    """


class RunFault(RuntimeError):
    """A run that cannot continue. The message names rank, phase, cause and the folder of the stacks. Exit status 1.

    `speaker` is true on the rank that prints the message: the lowest of those that still answer.
    """

    def __init__(self, message: str, speaker: bool = True) -> None:
        super().__init__(message)
        self.speaker = speaker


class ToBeContinued(Exception):
    """The run was asked to stop (SIGTERM, SIGUSR1), saved a checkpoint and ends. Exit status 0."""
