"""Errors that the user can fix. All can be pickled, since they cross Ray processes."""


class RaymlError(Exception):
    """Base of all errors. The message says what is wrong, where, what was expected, and what to do."""


class ConfigError(RaymlError, ValueError):
    """A key, a value, or a combination of them that cannot be run."""


class DataError(RaymlError, ValueError):
    """Tasks that cannot be read, or that are too small for an episode."""


class RunError(RaymlError, RuntimeError):
    """A run folder, checkpoint or adapter that cannot be used."""


class TrainingError(RaymlError, RuntimeError):
    """Training that must not continue, for instance because a loss is not finite."""


class StorageError(RaymlError, OSError):
    """Storage at a URI that does not answer, or refuses access."""
