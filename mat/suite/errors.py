"""The errors a user can meet: a request that cannot be served, and a run that had to stop."""


class UserError(Exception):
    """Something the user can mend. The message is one sentence naming the key or path and the
    remedy.
    """


class Damaged(UserError):
    """A file does not hold what was written to it."""


class RunFailed(Exception):
    """Training had to stop at numbers that are not finite. The message is one sentence; the run
    folder keeps it.
    """


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""
