"""Every error that a user can cause. One line: what is wrong, where, what to do."""

from __future__ import annotations


class GraftError(ValueError):
    """Base of all errors that Graft raises on purpose; the CLI prints it in one line and exits with 2."""


class ConfigError(GraftError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class BusyError(ConfigError):
    """Another process works in the folder."""


class SiteError(GraftError):
    """A method asks for a place that the model does not have, or cannot take there."""


class RouteError(GraftError):
    """Rows, segments or slots do not fit the batch, or the route asks for what cannot be mixed."""


class AdapterFileError(GraftError):
    """An adapter folder is broken, incomplete, made for another base, or holds what we do not honour."""


class MergeError(GraftError):
    """A merge is impossible or would silently change more than it says."""


class DataError(GraftError):
    """A data source or a row cannot be used as the run asks."""


class TrainingError(GraftError):
    """Training cannot go on, for example because the loss is not finite."""
