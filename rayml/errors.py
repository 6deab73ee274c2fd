"""What rayml raises when the user can put it right. All picklable: they cross Ray processes."""


class RaymlError(Exception):
    """Root of the errors below. The message says what, where, what was expected, what to do."""


class ConfigError(RaymlError, ValueError):
    """A key, a value, or a combination of them that cannot be run."""


class DataError(RaymlError, ValueError):
    """Tasks that cannot be read, or that no episode can be drawn from."""


class RunError(RaymlError, RuntimeError):
    """A run folder, checkpoint or adapter that cannot be used."""


class TrainingError(RaymlError, RuntimeError):
    """Training that must not go on, such as a loss that is not finite."""


class StorageError(RaymlError, OSError):
    """Storage by URI that does not answer, or refuses."""
