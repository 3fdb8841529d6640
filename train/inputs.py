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

from train.checkpoint_files import checkpoint_steps, read_record
from train.config import TOKENIZER_NAMES, TrainConfig
from train.config_io import PATHS
from train.data import Corpus, Tokenizer, build_tokenizer, load_corpus
from train.data.tokenizer import TOKENIZER_FILE
from train.errors import ConfigError
from train.fields import get, override


@dataclass(frozen=True)
class Began:
    """The files that a run began with, as its checkpoints describe them.

    Fields:
      content_hash: of the data.
      tokenizer_hash: of the tokenizer.
      tokens: of the training split; None where an older version wrote the checkpoint.
      run_directory: where the run was; None where an older version wrote the checkpoint.
    """

    content_hash: str
    tokenizer_hash: str
    tokens: int | None
    run_directory: str | None


@dataclass(frozen=True)
class Inputs:
    """The files of a run, read.

    Fields:
      config: its paths are those of the files that were read.
      tokenizer: that of the run.
      corpus: its data.
      moved: a line for each file that is no longer where the run had it.
    """

    config: TrainConfig
    tokenizer: Tokenizer
    corpus: Corpus
    moved: tuple[str, ...] = ()


def marks(corpus: Corpus, workdir: pathlib.Path) -> dict[str, Any]:
    """The entries of a checkpoint's `extra` that `read_began` reads."""
    run_directory = os.path.abspath(workdir)
    return {
        "content_hash": corpus.content_hash,
        "tokens": corpus.train.num_tokens,
        "run_directory": run_directory,
    }


def read_began(workdir: pathlib.Path) -> Began | None:
    """The files that a run began with, by its newest readable record; None where it has no checkpoint."""
    checkpoints = workdir / "checkpoints"
    for step in reversed(checkpoint_steps(checkpoints)):
        with contextlib.suppress(Exception):  # damaged, or removed by a running training: restoring says so
            record = read_record(checkpoints, step)
            extra, data_state = record["extra"], record["data_state"]
            return Began(
                str(extra["content_hash"]),
                str(data_state["tokenizer_hash"]),
                extra.get("tokens"),
                extra.get("run_directory"),
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
      ConfigError: a file cannot be used, or has another content than the run began with.
    """
    places = {name: _places(name, config, earlier, began, workdir) for name in PATHS}
    if tokenizer is not None:
        places["data.tokenizer"] = [config.data.tokenizer]
    refusal: ConfigError | None = None
    for chosen in itertools.product(*places.values()):
        there = override(
            config, {name: path for name, path in zip(places, chosen, strict=True) if path is not None}
        )
        try:
            used = tokenizer or build_tokenizer(there.data)
            corpus = load_corpus(there.data, used)
            _refuse_other_content(there, earlier, began, corpus)
        except ConfigError as error:
            refusal = refusal or error
            continue
        moved = () if earlier is None or began is None else tuple(_moves(earlier, there))
        return Inputs(there, used, corpus, moved)
    assert refusal is not None
    raise refusal


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
    absolute = os.path.abspath(os.path.expanduser(typed))
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
    if began.tokens not in (None, corpus.train.num_tokens):
        rule = f"gives {corpus.train.num_tokens} training tokens, but the run began with {began.tokens}"
        raise ConfigError(field, get(config, field), f"{rule}; name the same file with the same ending")
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


def _moves(earlier: TrainConfig, config: TrainConfig) -> Iterator[str]:
    for name in PATHS:
        before, now = get(earlier, name), get(config, name)
        if before != now:
            yield f"{name}: {before} is now {now}, with the same content"
