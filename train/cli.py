"""The command `moejax`: words of the command line in, one of the commands run, an exit code out."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator

from train.cli_help import overview, show_help
from train.commands import COMMANDS, use_cpu_devices
from train.config import TrainConfig
from train.ending import leave, part
from train.errors import ConfigError, RunError, SaveStuck, TrainingFailed
from train.fields import leaf_types, nearest, shown, unknown_field
from train.logs import logged_to
from train.streams import drop_unread, mend_streams, output_named, say
from train.versions import version_of
from train.words import Words, take_apart


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 bad input, 3 failed in training, 128 + signal.

    One process of several does not return from an error of its own: it tells the others, and waits for nobody.
    """
    words = Words()
    mend_streams()
    try:
        take_apart(sys.argv[1:] if argv is None else argv, words)
        with output_named(), _warnings_shown():
            code = _run(words)
            sys.stdout.flush()
        part()
        return code
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure_by(error)
        if failure is None and not _has_joined():
            raise
        if words.traceback or failure is None:
            traceback.print_exc()
        failure = failure or RunError(f"{type(error).__name__}: {error}")
        if line := " ".join(str(failure).split()):
            # Bytes of the command line that are no UTF-8 are shown as escapes.
            say(f"error: {line.encode('utf-8', 'backslashreplace').decode()}")
        if failure.is_everybodys:
            part()
        elif isinstance(failure, SaveStuck) or _has_joined():
            leave(failure)
        return failure.exit_code
    finally:
        drop_unread()


def _failure_by(error: BaseException) -> RunError | None:
    """What is said of an exception; None: it is a bug, of which Python says it all."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):
        # The second: who read our output has gone (`moejax generate … | head`).
        told, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("", 141)
        failure = RunError(told)
        failure.exit_code = code
        return failure
    if isinstance(error, Warning) and sys.warnoptions:
        line = " ".join(str(error).split())
        rule = f"makes an error of a warning: {line}; unset it, or see --traceback"
        return ConfigError("PYTHONWARNINGS", shown(",".join(sys.warnoptions)), rule)
    if isinstance(error, OSError | MemoryError):
        return TrainingFailed(" ".join(str(error).split()) or type(error).__name__)
    return None


def _has_joined() -> bool:
    """Whether this is one of several processes, which end in order only together."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Where no run's monitor shows them, warnings are lines such as `warning: ...` on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    with logged_to([handler]):
        yield


def _run(words: Words) -> int:
    if words.version:
        print("moejax", version_of("moejax"))
        return 0
    if not words.arguments:
        if words.help:
            print(overview())
            return 0
        raise ConfigError("command", "(nothing)", f"must be one of {', '.join(COMMANDS)}; see moejax --help")
    name, *arguments = words.arguments
    if name not in COMMANDS:
        rule = f"must be one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}"
        raise ConfigError("command", shown(name), rule)
    command = COMMANDS[name]
    if name == "launch":
        arguments = words.rest
    if words.help:
        return show_help(name, command, arguments)
    known = [*leaf_types(command.options), *command.flags, "cpu_devices", "traceback"]
    if single := [word for word in words.arguments if word.startswith("-") and len(word) > 1]:
        rule = f"options begin with two dashes{nearest(single[0].lstrip('-'), known)}"
        raise ConfigError("argument", shown(single[0]), rule)
    if command.argument and not arguments:
        raise ConfigError(command.argument, "(nothing)", f"must be given: {command.argument_help}")
    if not command.takes_many and (surplus := arguments[1 if command.argument else 0 :]):
        rule = f"one argument too many: moejax {name} takes {command.argument or 'none'}"
        raise ConfigError("argument", shown(surplus[0]), rule)
    options = {}
    for option, value in words.options.items():
        if option not in known:
            raise unknown_field(option, "(nothing)" if value is None else value, known)
        if value is None:
            flag = f"--{option}" if command.options is TrainConfig else f"--{option.replace('_', '-')}"
            raise ConfigError(flag, "(nothing)", f"needs a value; write {flag}=VALUE if it begins with --")
        options[option] = value
    if (cpu_devices := options.pop("cpu_devices", None)) is not None:
        if name == "launch":
            rule = "has no meaning for launch; write --devices-per-process, how many CPU devices each process has"
            raise ConfigError("--cpu-devices", shown(cpu_devices), rule)
        use_cpu_devices(cpu_devices)
    return command.run(arguments if command.takes_many else "".join(arguments), options)
