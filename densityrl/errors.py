"""Errors a user can act on: one sentence that says what is wrong and what to do."""


class DensityRLError(Exception):
    """Base of every error the command line prints as one line instead of a traceback."""


class CheckpointError(DensityRLError):
    """A generator or reward file cannot be read, or is not what it claims to be."""


class PreferenceError(DensityRLError):
    """A preference table is unusable; the message names the file and the line."""


class RunError(DensityRLError):
    """A run directory cannot be started, resumed or written."""


class NonFiniteError(RunError):
    """Training met NaN or infinity and stopped; the last good state is kept."""
