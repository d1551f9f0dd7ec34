"""Errors of the model library. Each message names what was wrong and what was expected."""


class ModelsError(Exception):
    """Base of every error that this library raises on purpose."""


class InvalidObservationError(ModelsError):
    """An observation, or an option of its request, cannot be used.

    Attributes:
        field: path of the offending entry, e.g. ``images/cam_high`` or ``num_steps``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class PolicyConfigError(ModelsError):
    """A policy configuration is unknown or malformed."""


class CheckpointError(ModelsError):
    """A checkpoint is missing, incomplete, of an unknown kind, or does not fit the configuration."""


class DownloadError(ModelsError):
    """A remote checkpoint or asset could not be fetched."""
