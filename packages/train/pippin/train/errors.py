"""What ends a run, beside the errors of `pippin.core.errors`."""


class Preempted(Exception):
    """The run was asked to stop, and has saved its state: the same command goes on with it."""


class Unavailable(Exception):
    """A device or another process was lost: the same command goes on from the last checkpoint."""
