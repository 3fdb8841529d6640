"""The files that a run reads: found from any folder, and known again by their content when it goes on.

A path says where a file was; the hash in the checkpoints says what it was. So data and tokenizer may move, alone or
with the run, as long as their content is the same.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train.checkpoint_files import RECORD, checkpoint_steps, read_record
from train.config import TOKENIZER_NAMES, TrainConfig
from train.config_io import PATHS, run_directory_in, version_in
from train.data import Corpus, Tokenizer, build_tokenizer, content_hash, load_corpus
from train.data.tokenizer import TOKENIZER_FILE
from train.errors import ConfigError
from train.fields import get, override
from train.integrity import has_its_hash
from train.paths import with_home


@dataclass(frozen=True)
class Began:
    """The files that a run began with, as the run describes them.

    Fields:
      content_hash: of the data.
      tokenizer_hash: of the tokenizer.
      tokens: of the training split; None where an older version wrote the checkpoint.
      validation_tokens: of the validation split; None likewise.
      run_directory: where the run was when its paths were written; None where nothing says so.
      encoding_rules: of the tokenizer; 1 where an older version wrote the checkpoint.
      version: of moejax that wrote the config; None where nothing says so.
    """

    content_hash: str
    tokenizer_hash: str
    tokens: int | None
    validation_tokens: int | None
    run_directory: str | None
    encoding_rules: int
    version: str | None


@dataclass(frozen=True)
class Inputs:
    """The files of a run, read.

    Fields:
      config: its paths are those of the files that were read.
      tokenizer: that of the run.
      corpus: its data.
      moved: a line for each file that is no longer where the run had it.
      warnings: lines on what may differ from what the run began with.
    """

    config: TrainConfig
    tokenizer: Tokenizer
    corpus: Corpus
    moved: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def marks(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of a checkpoint's `extra` that `read_began` reads."""
    return {
        "content_hash": corpus.content_hash,
        "tokens": corpus.train.num_tokens,
        "validation_tokens": corpus.validation.num_tokens,
        "encoding_rules": tokenizer.encoding_rules,
    }


def read_began(workdir: pathlib.Path) -> Began | None:
    """The files that a run began with, by its newest sound record; None where it has no checkpoint.

    The run's folder comes from its config.yaml, which has the paths; from the record where the config has none.
    """
    checkpoints = workdir / "checkpoints"
    run_directory = version = None
    with contextlib.suppress(ConfigError, OSError):  # whoever reads the config says so
        run_directory = run_directory_in(workdir / "config.yaml")
        version = version_in(workdir / "config.yaml")
    for step in reversed(checkpoint_steps(checkpoints)):
        if not has_its_hash(checkpoints / str(step), RECORD):
            continue
        with contextlib.suppress(Exception):  # damaged, or removed by a running training: restoring says so
            record = read_record(checkpoints, step)
            extra, data_state = record["extra"], record["data_state"]
            return Began(
                str(extra["content_hash"]),
                str(data_state["tokenizer_hash"]),
                extra.get("tokens"),
                extra.get("validation_tokens"),
                run_directory or extra.get("run_directory"),
                int(extra.get("encoding_rules", 1)),
                version,
            )
    return None


def read_inputs(
    config: TrainConfig,
    workdir: pathlib.Path,
    earlier: TrainConfig | None,
    began: Began | None,
    tokenizer: Tokenizer | None = None,
) -> Inputs:
    """Read what `config` names; where the run goes on, from the first place that has the content it began with.

    Args:
      earlier: the config of the run that goes on.
      began: what its checkpoints say.
      tokenizer: that of the run, where its own copy is to be used.

    Raises:
      ConfigError: a file cannot be used, or has another content than the run began with; the model has room for
        fewer ids than the tokenizer makes.
    """
    places = {name: _places(name, config, earlier, began, workdir) for name in PATHS}
    there = _choose_data(config, places["data.path"], places["data.validation_path"], began)
    if tokenizer is None:
        there, tokenizer = _choose_tokenizer(there, places["data.tokenizer"], began)
    _check_vocabulary(there, tokenizer)
    corpus = load_corpus(there.data, tokenizer)
    _refuse_other_content(there, earlier, began, corpus)
    moved = () if earlier is None or began is None else tuple(_moves(earlier, there))
    return Inputs(there, tokenizer, corpus, moved, tuple(_other_rules(began, tokenizer)))


def _choose_data(
    config: TrainConfig, paths: list[str | None], held_out: list[str | None], began: Began | None
) -> TrainConfig:
    """The config with the first places whose content the run began with; with the very first where none has it."""
    choices = [
        _with_places(config, {"data.path": path, "data.validation_path": other})
        for path, other in itertools.product(paths, held_out)
    ]
    if began is not None and len(choices) > 1:
        for there in choices:
            with contextlib.suppress(ConfigError):  # of the first place it is raised when it is loaded
                if content_hash(there.data) == began.content_hash:
                    return there
    return choices[0]


def _choose_tokenizer(
    config: TrainConfig, places: list[str | None], began: Began | None
) -> tuple[TrainConfig, Tokenizer]:
    """As `_choose_data`, and the tokenizer from there."""
    choices = [_with_places(config, {"data.tokenizer": place}) for place in places]
    if began is not None and len(choices) > 1:
        for there in choices:
            with contextlib.suppress(ConfigError):
                tokenizer = build_tokenizer(there.data)
                if tokenizer.fingerprint() == began.tokenizer_hash:
                    return there, tokenizer
    return choices[0], build_tokenizer(choices[0].data)


def _with_places(config: TrainConfig, places: dict[str, str | None]) -> TrainConfig:
    return override(config, {name: place for name, place in places.items() if place is not None})


def _check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    size = config.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        rule = f"must be at least the tokenizer's vocabulary ({tokenizer.vocab_size})"
        raise ConfigError("model.vocab_size", size, rule)


def _places(
    name: str,
    config: TrainConfig,
    earlier: TrainConfig | None,
    began: Began | None,
    workdir: pathlib.Path,
) -> list[str | None]:
    """Where the file of a field may lie, likeliest first; as it was typed where nothing is.

    A path that is the end of the earlier one, or all of it, means that file: the same command goes on with the same
    run from whatever folder it is given, and wherever run and data have been moved together.
    """
    typed = get(config, name)
    before = typed if earlier is None else get(earlier, name)
    if not _is_path(name, typed):
        return [typed]
    absolute = os.path.abspath(with_home(typed))
    places: list[str] = [absolute]
    if earlier is not None and _is_path(name, before) and (absolute == before or _is_end_of(typed, before)):
        places = [before, absolute]
        if began is not None and began.run_directory is not None:
            relative = os.path.relpath(before, began.run_directory)
            places.append(os.path.abspath(os.path.join(workdir, relative)))
        if name == "data.tokenizer" and not any(map(_is_there, places)):
            places = [os.path.abspath(workdir / TOKENIZER_FILE)]  # the run's own copy
    return [place for place in dict.fromkeys(places) if _is_there(place)] or [typed]


def _is_path(name: str, value: str | None) -> bool:
    return value is not None and not (name == "data.tokenizer" and value in TOKENIZER_NAMES)


def _is_end_of(typed: str, path: str) -> bool:
    end, whole = pathlib.Path(os.path.normpath(typed)).parts, pathlib.Path(path).parts
    return not os.path.isabs(typed) and whole[-len(end) :] == end


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))
    except ValueError:  # no path at all: it has a NUL
        return False


def _refuse_other_content(
    config: TrainConfig, earlier: TrainConfig | None, began: Began | None, corpus: Corpus
) -> None:
    """Refuse files whose content is not what the run began with; names the field, and both paths where they differ."""
    if earlier is None or began is None:
        return
    field = "data.path"
    if config.data.path == earlier.data.path and config.data.validation_path != earlier.data.validation_path:
        field = "data.validation_path"
    _refuse(field, config, earlier, began.content_hash, corpus.content_hash)
    held_out = "data.path" if config.data.validation_path is None else "data.validation_path"
    for name, split, then, stream in (
        (field, "training", began.tokens, corpus.train),
        (held_out, "validation", began.validation_tokens, corpus.validation),
    ):
        if then not in (None, stream.num_tokens):
            rule = f"gives {stream.num_tokens} {split} tokens, but the run began with {then}"
            raise ConfigError(name, get(config, name), f"{rule}; name the same file with the same ending")
    _refuse("data.tokenizer", config, earlier, began.tokenizer_hash, corpus.tokenizer_hash)


def _refuse(field: str, config: TrainConfig, earlier: TrainConfig, then: str, now: str) -> None:
    if then == now:
        return
    path, before = get(config, field), get(earlier, field)
    content = (
        "its content has changed since"
        if path == before
        else f"its content is not that of {before}, with which"
    )
    rule = (
        f"{content} the run began (sha256 {then[:12]} then, {now[:12]} now); the run needs the same content"
    )
    raise ConfigError(field, "(unset)" if path is None else path, rule)


def _other_rules(began: Began | None, tokenizer: Tokenizer) -> Iterator[str]:
    if began is None or began.encoding_rules == tokenizer.encoding_rules:
        return
    writer = f"data.tokenizer: the run began with moejax {began.version or '(version unknown)'}, which"
    changes = [
        change for number, change in tokenizer.encoding_changes.items() if number > began.encoding_rules
    ]
    if changes:
        yield f"{writer} gave other ids to {', and to '.join(changes)}"
    else:
        yield f"{writer} has newer rules of encoding ({began.encoding_rules}): some text may get other ids here"


def _moves(earlier: TrainConfig, config: TrainConfig) -> Iterator[str]:
    for name in PATHS:
        before, now = get(earlier, name), get(config, name)
        if before != now:
            yield f"{name}: {before} is now {now}, with the same content"
