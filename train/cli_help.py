"""The help of the command `moejax`."""

from __future__ import annotations

from typing import Any

from train.commands import COMMANDS, Command


def overview() -> str:
    """All commands, a line each."""
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


def show_help(name: str, command: Command, arguments: list[str]) -> int:
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
            use_underscores=name == "train",  # fields of a config are spelt as in Python
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0
