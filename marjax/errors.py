"""The exceptions that the command line prints as one line, without a traceback."""


class UserError(ValueError):
    """Says what was given, what was expected and what to do, in one sentence or two."""


class TrainingError(RuntimeError):
    """A run that cannot go on through no slip of the user's; the command line prints it as one line too."""
