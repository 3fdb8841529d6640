"""The command `moejax`: words of the command line in, one of the commands run, an exit code out.

Nothing here imports jax until a command needs it, so that help and errors of input come at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.config import TrainConfig
from train.errors import ConfigError, RunError, TrainingFailed
from train.fields import convert, leaf_types, nearest, override, shown, unknown_field
from train.logs import logged_to

MAX_CPU_DEVICES = 4096


@dataclass(frozen=True)
class NoOptions:
    """A command without options of its own."""


@dataclass(frozen=True)
class GenerateOptions:
    """What `moejax generate` writes."""

    prompt: str = ""
    """Text to continue; required."""
    max_tokens: int = 256
    """Tokens to write after the prompt."""
    temperature: float = 0.8
    """Below 1: likelier tokens more often; 0: always the likeliest."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens only. Unset: from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that make up this share of probability only. Unset: from all."""
    seed: int = 0
    """Seed of the drawing."""


@dataclass(frozen=True)
class ReportOptions:
    """Where `moejax report` writes."""

    output: str | None = None
    """Folder of the report. Unset: `report` in the first run's directory."""


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes `moejax launch` starts."""

    processes: int = 1
    """Processes of the run, all on this machine."""
    devices_per_process: int | None = None
    """CPU devices of each process. Unset: what each one finds; for GPUs set CUDA_VISIBLE_DEVICES by a scheduler."""


@dataclass
class Words:
    """A command line taken apart, nothing looked up yet.

    Fields:
      rest: what comes behind `launch` and its options: a command line of its own.
    """

    arguments: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False
    traceback: bool = False


@dataclass(frozen=True)
class Command:
    """One command: `run(argument, options)` gives the exit code; the argument is a list where it takes many.

    `flags` are options beside those of the dataclass `options`, which no config holds.
    """

    summary: str
    argument: str | None
    argument_help: str
    options: type
    run: Callable[..., int]
    takes_many: bool = False
    flags: tuple[str, ...] = ()


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 bad input, 3 failed in training, 128 + signal."""
    words = Words()
    try:
        take_apart(sys.argv[1:] if argv is None else argv, words)
        with _warnings_shown():
            code = _run(words)
        sys.stdout.flush()
        return code
    except RunError as error:
        if words.traceback:
            traceback.print_exc()
        line = " ".join(str(error).split())
        # Bytes of the command line that are no UTF-8 are shown as escapes.
        print("error:", line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if words.traceback:
            traceback.print_exc()
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has gone (`moejax generate … | head`). Without this the interpreter would fail
        # once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError) as error:
        if words.traceback:
            traceback.print_exc()
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return TrainingFailed.exit_code


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Where no run's monitor shows them, warnings are lines such as `warning: ...` on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    with logged_to([handler]):
        yield


def take_apart(argv: list[str], words: Words) -> None:
    """Sort a command line into arguments, `--option value` pairs and flags, in any order.

    Dashes in option names become underscores. `words` is filled as far as the line is sound.

    Raises:
      ConfigError: an option without its value.
    """
    words.traceback = "--traceback" in argv
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        if word in ("-h", "--help"):
            words.help = True
        elif word in ("--version", "--traceback"):
            setattr(words, word[2:], True)
        elif not word.startswith("--"):
            if words.arguments == ["launch"]:
                words.rest = [word, *reversed(waiting)]
                return
            words.arguments.append(word)
        else:
            name, equals, value = word[2:].partition("=")
            if not equals:
                if not waiting or waiting[-1].startswith("--"):
                    rule = f"needs a value; write --{name}=VALUE if the value begins with --"
                    raise ConfigError(f"--{name}", "(nothing)", rule)
                value = waiting.pop()
            words.options[name.replace("-", "_")] = value


def _run(words: Words) -> int:
    if words.version:
        import importlib.metadata

        print("moejax", importlib.metadata.version("moejax"))
        return 0
    if not words.arguments:
        if words.help:
            print(_overview())
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
        return _help(name, command, arguments)
    if command.argument and not arguments:
        raise ConfigError(command.argument, "(nothing)", f"must be given: {command.argument_help}")
    if not command.takes_many and (surplus := arguments[1 if command.argument else 0 :]):
        rule = f"one argument too many: moejax {name} takes {command.argument or 'none'}"
        raise ConfigError("argument", shown(surplus[0]), rule)
    options = dict(words.options)
    known = [*leaf_types(command.options), *command.flags, "cpu_devices", "traceback"]
    for option, value in options.items():
        if option not in known:
            raise unknown_field(option, value, known)
    if (cpu_devices := options.pop("cpu_devices", None)) is not None:
        _use_cpu_devices(cpu_devices)
    return command.run(arguments if command.takes_many else "".join(arguments), options)


def _train(argument: str, options: Mapping[str, str]) -> int:
    from train.config_io import find_config
    from train.memory import keep_freed_memory

    config, name = find_config(argument)
    config = override(config, {option: value for option, value in options.items() if option not in _PLACE})
    if _steps_run_on_cpu():
        keep_freed_memory()

    import jax

    from train import processes
    from train.loop import train

    processes.join(options)
    try:
        train(config, name)
    except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise TrainingFailed(str(error).partition("\n")[0] or type(error).__name__) from error
    return 0


def _steps_run_on_cpu() -> bool:
    """Whether steps will run on CPU, as far as can be told before jax is started."""
    has_gpu_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return not has_gpu_plugin or os.environ.get("JAX_PLATFORMS") == "cpu"


def _eval(argument: str, options: Mapping[str, str]) -> int:
    _check_run_directory(argument)

    from train.evaluate import evaluate_run
    from train.memory import keep_freed_memory

    if _steps_run_on_cpu():
        keep_freed_memory()
    loss, tokens = evaluate_run(argument)
    print(f"eval/loss {loss:.4f} nats per token over {tokens:,} tokens")
    return 0


def _generate(argument: str, options: Mapping[str, str]) -> int:
    chosen = override(GenerateOptions(), options, prefix="--")
    rules: list[tuple[str, bool, str]] = [
        ("prompt", bool(chosen.prompt), "must be given and not empty"),
        ("prompt", _is_unicode(chosen.prompt), "must be valid UTF-8"),
        ("max_tokens", 1 <= chosen.max_tokens < 2**31, "must be between 1 and 2147483647"),
        ("temperature", 0 <= chosen.temperature < float("inf"), "must be a finite number of at least 0"),
        ("top_k", chosen.top_k is None or chosen.top_k >= 1, "must be at least 1"),
        ("top_p", chosen.top_p is None or 0 < chosen.top_p <= 1, "must be above 0 and at most 1"),
        ("seed", 0 <= chosen.seed < 2**32, "must be between 0 and 4294967295"),
    ]
    for name, is_kept, rule in rules:
        if not is_kept:
            raise ConfigError(f"--{name}", shown(getattr(chosen, name)), rule)
    _check_run_directory(argument)

    from train.generate import generate_run

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character must not end the text
    pieces = generate_run(
        argument,
        chosen.prompt,
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        seed=chosen.seed,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    return 0


def _report(arguments: Sequence[str], options: Mapping[str, str]) -> int:
    chosen = override(ReportOptions(), options, prefix="--")
    for argument in arguments:
        _check_run_directory(argument)

    from train.report import write_report

    print(write_report(arguments, chosen.output))
    return 0


def _launch(words: Sequence[str], options: Mapping[str, str]) -> int:
    from train.launch import launch

    chosen = override(LaunchOptions(), options, prefix="--")
    for name, value in (("processes", chosen.processes), ("devices_per_process", chosen.devices_per_process)):
        if value is not None and not 1 <= value <= MAX_CPU_DEVICES:
            raise ConfigError(f"--{name}", value, f"must be between 1 and {MAX_CPU_DEVICES}")
    if words[0] != "train":
        raise ConfigError("COMMAND...", shown(words[0]), "must be a command line that begins with train")
    return launch(words, chosen.processes, chosen.devices_per_process)


def _doctor(argument: str, options: Mapping[str, str]) -> int:
    from train.doctor import doctor

    return 0 if doctor() else 1


# This process's place among several, where neither `moejax launch` nor a scheduler says it.
_PLACE = ("coordinator", "processes", "process_id")
_RUN = "the directory of a run, as made by moejax train"
COMMANDS = {
    "train": Command(
        "Train a model, or go on with a run that was stopped.",
        "CONFIG",
        "a Python file with config() -> TrainConfig, the name of a shipped config, or a config.yaml",
        TrainConfig,
        _train,
        flags=_PLACE,
    ),
    "eval": Command("Print a run's loss on its whole validation split.", "RUN", _RUN, NoOptions, _eval),
    "generate": Command("Continue a prompt with a run's model.", "RUN", _RUN, GenerateOptions, _generate),
    "report": Command(
        "Write an HTML report of a run, or of several side by side.",
        "RUN...",
        "directories of runs, as made by moejax train",
        ReportOptions,
        _report,
        takes_many=True,
    ),
    "launch": Command(
        "Run a command in several processes on this machine.",
        "COMMAND...",
        "train and what goes with it",
        LaunchOptions,
        _launch,
        takes_many=True,
    ),
    "doctor": Command("Show and check what this machine offers.", None, "", NoOptions, _doctor),
}


def _check_run_directory(argument: str) -> None:
    if os.path.isfile(os.path.join(argument, "config.yaml")):
        return
    runs = [str(path.parent) for path in pathlib.Path(argument).parent.glob("*/config.yaml")]
    rule = "no such run directory"
    if os.path.isdir(argument):
        rule = "is not a run directory, for it has no config.yaml"
    raise ConfigError("RUN", shown(argument), rule + nearest(argument, runs))


def _use_cpu_devices(text: str) -> None:
    count = convert("--cpu-devices", text, int)
    if not 1 <= count <= MAX_CPU_DEVICES:
        raise ConfigError("--cpu-devices", count, f"must be between 1 and {MAX_CPU_DEVICES}")

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def _is_unicode(text: str) -> bool:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _overview() -> str:
    width = max(len(f"{name} {command.argument or ''}") for name, command in COMMANDS.items())
    lines = [
        f"  moejax {f'{name} {command.argument or str()}':{width}}  {command.summary}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "moejax: Mixture-of-Experts training for JAX.",
            "",
            *lines,
            "",
            "  --cpu-devices N   run on N CPU devices",
            "  --coordinator HOST:PORT --processes N --process-id I",
            "                    this is process I of N; Slurm, Open MPI and moejax launch say so themselves",
            "  --traceback       show where an error of input was found",
            "  --version         show the version",
            "  --help            after a command: its options",
        ]
    )


def _help(name: str, command: Command, arguments: list[str]) -> int:
    """Print a command's options; for `train CONFIG` with that config's values as defaults.

    tyro writes the help only: its errors are boxes of many lines, ours are one line that names the dotted field.
    """
    import tyro

    defaults: Any = command.options()
    if name == "train" and arguments:
        from train.config_io import find_config

        defaults = find_config(arguments[0])[0]
    description = command.summary
    if command.argument:
        description += f" {command.argument}: {command.argument_help}."
    try:
        tyro.cli(
            command.options,
            default=defaults,
            prog=f"moejax {name} {command.argument or ''}".strip(),
            description=f"{description} Everywhere: --cpu-devices N, --traceback.",
            args=["--help"],
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0
