"""Every error that a person can cause or mend. The command line alone turns them into sentences and exit codes."""


class LayerwiseError(Exception):
    """What happened, with the value, and what to do; one or two sentences. Exit code 2."""

    exit_code = 2


class ConfigError(LayerwiseError):
    """An option has an impossible value, or does not fit the run that it is given to."""


class DataError(LayerwiseError):
    """The data set is missing, unreadable or too small."""


class BudgetError(LayerwiseError):
    """The device budget cannot hold what was asked for."""


class CacheError(LayerwiseError):
    """An activation cache is damaged, incomplete, of another version or of another run."""


class RunError(LayerwiseError):
    """The run directory cannot be used as asked."""


class TrainingError(LayerwiseError):
    """Training went astray, for example to a loss that is not a number."""


class Interrupted(LayerwiseError):
    """A signal asked for a stop; everything is saved, and the same command goes on. Exit code 75."""

    exit_code = 75
