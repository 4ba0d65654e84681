"""The two errors a user can meet: a request that cannot be served, and a run that had to stop."""


class UserError(Exception):
    """Something the user can mend. The message is one sentence naming the key or path and the remedy."""


class RunFailed(Exception):
    """Training had to stop (divergence, NaN). The message is one sentence; the run folder keeps it."""
