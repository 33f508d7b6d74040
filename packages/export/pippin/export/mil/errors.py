"""What can be wrong with a package."""

from pippin.core.errors import PippinError


class PackageError(PippinError):
    """A package that is damaged, or that holds what the interpreter cannot run."""
