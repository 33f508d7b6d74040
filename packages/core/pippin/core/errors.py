"""The errors that a user can cause. Each says what is wrong, what was got, the rule, and the remedy."""


class PippinError(ValueError):
    """Something that the user can put right. Programs print its text, without a stack trace."""


class ConfigError(PippinError):
    """A config tree that cannot be composed, overridden or built."""


class ShardingError(PippinError):
    """Logical axes that do not fit the mesh, or a mesh that does not fit the devices."""


class CheckpointError(PippinError):
    """A checkpoint or bundle that is damaged, incomplete, or of another model."""


class QuantizationError(PippinError):
    """Weights that cannot be compressed so, or compressed weights that make no sense."""


class DataError(PippinError):
    """Input text that cannot be read or used."""
