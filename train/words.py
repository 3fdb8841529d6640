"""A command line taken apart: arguments, options and flags, nothing looked up yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from train.errors import ConfigError


@dataclass
class Words:
    """The parts of a command line.

    Fields:
      rest: what comes behind `launch` and its options: a command line of its own.
    """

    arguments: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False
    traceback: bool = False


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
