"""What each command of `moejax` takes and does.

Nothing here imports jax until a command needs it, so that help and errors of input come at once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from train.config import TrainConfig
from train.environment import MAX_CPU_DEVICES, load_jax, require_devices
from train.errors import ConfigError, OthersLost, TrainingFailed
from train.fields import convert, nearest, override, shown
from train.paths import expanded
from train.reading import beside

# How the runtime begins its error where a device's memory does not suffice.
_NO_MEMORY = "RESOURCE_EXHAUSTED"


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
class ExportOptions:
    """What `moejax export` writes."""

    layer: int | None = None
    """Layer from 0; required."""
    expert: int | None = None
    """Expert of it from 0. Unset: the whole layer."""
    output: str = ""
    """A new safetensors file; required."""


@dataclass(frozen=True)
class LaunchOptions:
    """How many processes `moejax launch` starts."""

    processes: int = 1
    """Processes of the run, all on this machine."""
    devices_per_process: int | None = None
    """CPU devices of each process. Unset: one GPU each, or what it finds where there are none."""


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


def _train(argument: str, options: Mapping[str, str]) -> int:
    from train.config_io import find_config
    from train.memory import keep_freed_memory

    config, name = find_config(argument)
    config = override(config, {option: value for option, value in options.items() if option not in _PLACE})
    if _steps_run_on_cpu():
        keep_freed_memory()
    load_jax()

    import jax

    from train.heartbeat import await_verdict
    from train.joining import join
    from train.loop import train

    join(options)
    require_devices()
    try:
        train(config, name)
    except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        is_own = not isinstance(error, jax.errors.JaxRuntimeError) or text.startswith(_NO_MEMORY)
        if is_own or jax.process_count() == 1:
            raise TrainingFailed(text) from error
        await_verdict(text)
        raise OthersLost(text) from error
    return 0


def _steps_run_on_cpu() -> bool:
    """Whether steps will run on CPU, as far as can be told before jax is started."""
    has_gpu_plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return not has_gpu_plugin or os.environ.get("JAX_PLATFORMS") == "cpu"


def _eval(argument: str, options: Mapping[str, str]) -> int:
    argument = _run_directory(argument)
    load_jax()

    from train.evaluate import evaluate_run
    from train.memory import keep_freed_memory

    require_devices()

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
            raise ConfigError(f"--{name.replace('_', '-')}", shown(getattr(chosen, name)), rule)
    argument = _run_directory(argument)
    load_jax()

    from train.generate import generate_run

    require_devices()

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
    output = None if chosen.output is None else str(expanded("--output", chosen.output))
    arguments = [_run_directory(argument) for argument in arguments]
    load_jax()
    os.environ["MPLBACKEND"] = "agg"  # pictures only; the one of a notebook or a screen need not exist here

    from train.report import write_report

    require_devices()
    print(write_report(arguments, output))
    return 0


def _export(argument: str, options: Mapping[str, str]) -> int:
    chosen = override(ExportOptions(), options, prefix="--")
    if chosen.layer is None:
        raise ConfigError("--layer", "(nothing)", "must be given: the number of a layer, from 0")
    if not chosen.output:
        raise ConfigError("--output", "(nothing)", "must be given: the file to write")
    output = str(expanded("--output", chosen.output))
    argument = _run_directory(argument)
    load_jax()

    from train.export import export_run

    require_devices()

    print(*export_run(argument, output, chosen.layer, chosen.expert), sep="\n")
    return 0


def _launch(words: Sequence[str], options: Mapping[str, str]) -> int:
    from train.launch import launch

    chosen = override(LaunchOptions(), options, prefix="--")
    for name, value in (("processes", chosen.processes), ("devices-per-process", chosen.devices_per_process)):
        if value is not None and not 1 <= value <= MAX_CPU_DEVICES:
            raise ConfigError(f"--{name}", value, f"must be between 1 and {MAX_CPU_DEVICES}")
    if words[0] != "train":
        raise ConfigError("COMMAND...", shown(words[0]), "must be a command line that begins with train")
    return launch(words, chosen.processes, chosen.devices_per_process)


def _doctor(argument: str, options: Mapping[str, str]) -> int:
    from train.doctor import doctor

    return 0 if doctor() else 1


def _run_directory(argument: str) -> str:
    """The path of a run directory, which must be one."""
    argument = str(expanded("RUN", argument))
    config = os.path.join(argument, "config.yaml")
    if os.path.isfile(config):
        return argument
    runs = [os.path.dirname(other) for other in beside(argument, "*/config.yaml")]
    rule = "no such run directory"
    if os.path.isdir(argument):
        fault = "for its config.yaml is no file" if os.path.lexists(config) else "for it has no config.yaml"
        rule = f"is not a run directory, {fault}"
    elif os.path.lexists(argument):
        rule = "must be the directory of a run, but is none"
    raise ConfigError("RUN", shown(argument), rule + nearest(argument, runs))


def _is_unicode(text: str) -> bool:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates.
    return not any("\ud800" <= character <= "\udfff" for character in text)


def use_cpu_devices(text: str) -> None:
    """Make so many CPU devices all that jax sees.

    Raises:
      ConfigError: `text` is no number in range.
    """
    count = convert("--cpu-devices", text, int)
    if not 1 <= count <= MAX_CPU_DEVICES:
        raise ConfigError("--cpu-devices", count, f"must be between 1 and {MAX_CPU_DEVICES}")

    load_jax()

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


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
    "export": Command(
        "Write a layer, or one expert of it, as a safetensors file.", "RUN", _RUN, ExportOptions, _export
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
