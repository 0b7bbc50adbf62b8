"""Errors that are the user's to mend.

Each is one line that names the thing (file, tensor, recipe key) and says what to do; the command
line prints it without a traceback and exits with code 2.  Anything else that is raised is a defect
of this package and keeps its traceback.
"""


class UserError(Exception):
    """Base of all errors whose message is meant for the user; one line, no trailing full stop."""


class CheckpointError(UserError):
    """A model directory is missing something, is damaged, or is of a kind that cannot be read."""


class RecipeError(UserError):
    """A recipe asks for something unknown, impossible or contradictory."""


class CalibrationError(UserError):
    """A calibration or evaluation text cannot be used."""


class ResourceError(UserError):
    """Not enough disk, host memory or device memory for what was asked."""


class DeviceFull(ResourceError):
    """The device's memory ran out in the middle of a job."""


class OutputError(UserError):
    """The output or work directory is not ours to write, or does not match the recipe."""


class HubError(UserError):
    """The Hub cannot be reached, refuses something, or holds something else than expected."""


class NumericalError(UserError):
    """NaN or Inf was found in a weight, an activation or a statistic; the message names it."""
