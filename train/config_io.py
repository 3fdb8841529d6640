"""Where a run's config comes from (Python file, shipped name, YAML of an earlier run) and how it is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import yaml

import train
from train.config import TOKENIZER_NAMES, TrainConfig
from train.errors import ConfigError
from train.fields import build, flatten, get, nearest, override, shown
from train.versions import version_of

# `configs` lies beside `train`, in a checkout as in an installed wheel. Asking the import system for the name
# would find a user's own `configs` folder first.
SHIPPED = pathlib.Path(train.__file__).resolve().parent.parent / "configs"

# The entry of a saved config that is no field: the version of moejax that wrote it.
VERSION = "moejax"

# Fields that may hold a path; `data.tokenizer` may also hold a name.
PATHS = ("data.path", "data.validation_path", "data.tokenizer")

# What may differ when a run is resumed; an entry that ends in a dot is a whole group.
MAY_CHANGE = (
    "steps",
    "workdir",
    "log.",
    "eval.",
    "checkpoint.",
    "mesh.",
    "model.moe.exchange",
    "model.moe.chunks",
    "model.moe.received",
    "model.moe.shadow",
)


def find_config(argument: str) -> tuple[TrainConfig, str]:
    """The config that CONFIG on the command line means, and its name.

    Args:
      argument: path of a `.py` file with `config() -> TrainConfig`, path of a YAML file, or the bare name of
        a file in `configs/`.

    Returns:
      The config, types checked, and a name for the default run directory: the file's stem, or for a
      `config.yaml` the name of the folder that it lies in.

    Raises:
      ConfigError: there is no such file (names the nearest), or it does not give a config.
    """
    path = pathlib.Path(os.path.expanduser(argument))
    if path.suffix in (".py", ".yaml", ".yml") and os.path.isfile(path):
        if path.suffix == ".py":
            return load_python(path), path.stem
        return load_config(path), path.resolve().parent.name if path.stem == "config" else path.stem
    if argument in shipped_names():
        return load_python(SHIPPED / f"{argument}.py"), argument
    raise ConfigError("CONFIG", shown(argument), _why_not_found(path))


def shipped_names() -> list[str]:
    """Names of the files in `configs/`."""
    return sorted(path.stem for path in SHIPPED.glob("*.py") if not path.stem.startswith("_"))


def load_python(path: str | os.PathLike[str]) -> TrainConfig:
    """Run a Python file and return what its `config()` gives, types checked.

    Raises:
      ConfigError: the file raises, has no `config()`, or gives something else; a wrong field is named.
    """
    path = pathlib.Path(path).absolute()  # as its frames name it
    module_name = f"_moejax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles of the file look their module up
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "config", None)):
            raise ConfigError("CONFIG", path, "has no function `config() -> TrainConfig`")
        result = module.config()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError("CONFIG", path, _why_raised(path, error)) from error
    finally:
        del sys.modules[module_name]
    if not isinstance(result, TrainConfig):
        raise ConfigError("CONFIG", path, f"config() must return a TrainConfig, not {type(result).__name__}")
    return build(TrainConfig, result)


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write every field as YAML, such that `load_config` gives the same config back; the file is replaced.

    All but `workdir`: a run directory may be moved, and a config that comes from it begins a run of its own. The file
    also says which version of moejax wrote it.
    """
    path = pathlib.Path(path)
    config = dataclasses.replace(config, workdir=None)
    # ASCII only: PyYAML writes some Unicode line ends (U+0085) such that they come back as spaces.
    values = {VERSION: version_of("moejax"), **dataclasses.asdict(config)}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=1_000_000)
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="ascii")
    scratch.replace(path)


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a YAML config; fields that it leaves out have their defaults.

    Raises:
      ConfigError: the file cannot be read or is no YAML, has an unknown field (names the nearest) or a value
        of the wrong type. Where another version of moejax wrote the file, the error names both versions.
    """
    path = pathlib.Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("CONFIG", path, f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("CONFIG", path, f"is not valid YAML: {shown(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError("CONFIG", path, "must be a YAML mapping of config fields")
    with naming_versions(values.pop(VERSION, None), path):
        return build(TrainConfig, values)


@contextlib.contextmanager
def naming_versions(writer: object, path: pathlib.Path) -> Iterator[None]:
    """An error of input in the block names the version that wrote the file, where that is another one.

    Args:
      writer: the version, as the file says; None where it does not.
    """
    try:
        yield
    except ConfigError as error:
        ours = version_of("moejax")
        if writer is None or writer == ours:
            raise
        rule = (
            f"{error.rule}; moejax {shown(writer)} wrote {path}, here is moejax {ours}: use that version, or correct "
            "the file"
        )
        raise ConfigError(error.field, error.value, rule) from error


def version_in(path: pathlib.Path) -> str | None:
    """The version of moejax that wrote a `config.yaml`; None where nothing says so."""
    written = re.match(rf"{VERSION}: '?([^'\n]+)", path.read_text(encoding="utf-8", errors="replace"))
    return written[1] if written else None


def earlier_config(workdir: pathlib.Path) -> TrainConfig | None:
    """The config of the run that `workdir` holds, None where there is no run.

    Raises:
      ConfigError: it has checkpoints, but nothing says any more with which config they were made.
    """
    path = workdir / "config.yaml"
    if path.exists():
        return load_config(path)
    if any(workdir.glob("checkpoints/*")):
        rule = "has checkpoints, but not the config.yaml that they were made with; choose another workdir"
        raise ConfigError("workdir", workdir, rule)
    return None


def with_absolute_paths(config: TrainConfig, earlier: TrainConfig | None = None) -> TrainConfig:
    """The config with its data found from any folder; a path where nothing is stays as it was typed.

    Args:
      earlier: the config of the run that is resumed. A relative path that is the end of its path means that one: the
        same command goes on with the same run from whatever folder it is given.
    """
    absolute: dict[str, str] = {}
    for name in PATHS:
        typed, before = get(config, name), get(earlier or config, name)
        if typed is None or (name == "data.tokenizer" and typed in TOKENIZER_NAMES):
            continue
        path = os.path.abspath(os.path.expanduser(typed))
        if earlier is not None and before is not None and _is_end_of(typed, before):
            absolute[name] = before
        elif os.path.exists(path) or glob.glob(path, recursive=True):
            absolute[name] = path
    return override(config, absolute)


def _is_end_of(typed: str, path: str) -> bool:
    end, whole = pathlib.Path(os.path.normpath(typed)).parts, pathlib.Path(path).parts
    return not os.path.isabs(typed) and whole[-len(end) :] == end


def differing_fields(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[object, object]]:
    """Fields that differ although they must not when a run is resumed: dotted name → (old, new) value.

    `MAY_CHANGE` lists what may.
    """
    before, after = flatten(old), flatten(new)
    return {
        name: (before[name], after[name])
        for name in before
        if before[name] != after[name] and not _may_change(name)
    }


def refuse_other_run(workdir: str | os.PathLike[str], old: TrainConfig, new: TrainConfig) -> None:
    """Refuse to resume the run of `workdir`, whose config is `old`, with a config that makes it another run.

    Raises:
      ConfigError: names every field that differs and may not, with both values.
    """
    if differing := differing_fields(old, new):
        listed = [f"{name} ({shown(was)} there, {shown(now)} now)" for name, (was, now) in differing.items()]
        rule = f"holds another run: {', '.join(listed)}; choose another workdir"
        raise ConfigError("workdir", workdir, rule)


def _may_change(name: str) -> bool:
    return any(name.startswith(entry) if entry.endswith(".") else name == entry for entry in MAY_CHANGE)


def _why_not_found(path: pathlib.Path) -> str:
    if os.path.isfile(path / "config.yaml"):
        return f"is a run directory; its config is {path / 'config.yaml'}"
    if os.path.isfile(path):
        return "must be a .py file, a .yaml file, or the name of a shipped config"
    if os.path.isdir(path):
        return "is a folder; must be a .py file, a .yaml file, or the name of a shipped config"
    folder = path.parent
    beside = [str(other) for pattern in ("*.py", "*.yaml", "*.yml") for other in folder.glob(pattern)]
    known = shipped_names() + [other for other in beside if not pathlib.Path(other).stem.startswith("_")]
    return f"no such config file{nearest(str(path), known)}"


def _why_raised(path: pathlib.Path, error: BaseException) -> str:
    line = error.lineno if isinstance(error, SyntaxError) else None
    frame = error.__traceback__
    while frame is not None:
        if pathlib.Path(frame.tb_frame.f_code.co_filename) == path:
            line = frame.tb_lineno
        frame = frame.tb_next
    where = f" in line {line}" if line else ""
    message = shown(error.msg if isinstance(error, SyntaxError) else error)
    if argument := re.search(r"unexpected keyword argument '(\w+)'", message):
        message += nearest(argument[1], flatten(TrainConfig()))
    return f"raised {type(error).__name__}{where}: {message}"
