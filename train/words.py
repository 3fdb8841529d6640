"""A command line taken apart: arguments, options and flags, nothing looked up yet."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Words:
    """The parts of a command line.

    Fields:
      options: what was given by name; None where the value is missing.
      rest: what comes behind `launch` and its options: a command line of its own.
    """

    arguments: list[str] = field(default_factory=list)
    options: dict[str, str | None] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    help: bool = False
    version: bool = False
    traceback: bool = False


def take_apart(argv: list[str], words: Words) -> None:
    """Sort a command line into arguments, `--option value` pairs and flags, in any order.

    Dashes in option names become underscores.
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
                is_missing = not waiting or waiting[-1].startswith("--")
                words.options[name.replace("-", "_")] = None if is_missing else waiting.pop()
            else:
                words.options[name.replace("-", "_")] = value
