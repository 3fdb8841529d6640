"""The errors that end a run, each with its exit code."""

import signal

_LONGEST = 300  # characters of a value: a path in an error should be whole, a file's content should not


def one_line(value: object, limit: int) -> str:
    """A value as it is shown in an error: one line, empty text visible, the end of a long one cut off."""
    try:
        text = " ".join(str(value).split()) or repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        text = f"({type(value).__name__})"
    return text if len(text) <= limit else text[:limit] + "…"


class RunError(Exception):
    """Base: the message is one line.

    Fields:
      exit_code: what the process ends with.
      is_everybodys: every process of the run ends by this error, so that none needs to tell the others.
    """

    exit_code = 1
    is_everybodys = False


class ConfigError(RunError):
    """Bad input, found before anything was written.

    Args:
      field: dotted config spelling, such as `model.moe.top_k`, or a command-line argument.
      value: what the user gave.
      rule: what is allowed, and how to mend it.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, rule: str):
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field} = {one_line(value, _LONGEST)}: {rule}")


class TrainingFailed(RunError):
    """Training failed after it began (NaN, disk full); the last good checkpoint is intact."""

    exit_code = 3


class SaveStuck(TrainingFailed):
    """A checkpoint is no longer being written. Its threads may wait for ever, so the process must not wait for them.

    Args:
      step: that of the checkpoint.
      seconds: for how long its files have not grown.
    """

    def __init__(self, step: int, seconds: float):
        super().__init__(
            f"the checkpoint of step {step} could not be written: its files have not grown for {seconds:.0f} s; look "
            "at the disk of the workdir; the same command goes on from the checkpoint before it"
        )


class FailedTogether(TrainingFailed):
    """The same, in every process of the run: they end in order, each with this error's code."""

    is_everybodys = True


class NotFinite(FailedTogether):
    """A step gave NaN or Inf.

    Args:
      step: the one whose batch it was.

    Fields:
      next_batch: number of the batch after that one, once it is known.
      stopping: a signal had asked the run to stop.
    """

    def __init__(self, step: int, message: str):
        self.step = step
        self.next_batch = 0
        self.stopping = False
        super().__init__(message)


class OthersLost(TrainingFailed):
    """The devices of several processes no longer work together: most likely another process has ended.

    The exit code is that of jax's own runtime where it finds this out first, so that whoever started the processes can
    tell the victims from the cause.
    """

    exit_code = 128 + signal.SIGABRT


class Interrupted(RunError):
    """A signal stopped the run after a checkpoint; the exit code is 128 + the signal's number."""

    is_everybodys = True

    def __init__(self, signal_number: int, step: int):
        self.exit_code = 128 + signal_number
        super().__init__(
            f"stopped by signal {signal_number} after step {step}; the same command goes on from there"
        )
