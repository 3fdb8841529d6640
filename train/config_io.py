"""Where a run's config comes from (Python file, shipped name, YAML of an earlier run) and how it is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import yaml

import train
from train.checkpoint_files import checkpoint_steps
from train.config import TrainConfig
from train.errors import ConfigError
from train.fields import build, flatten, nearest, shown
from train.paths import with_home
from train.reading import beside, reading, reason, regular
from train.versions import version_of
from train.writing import replace_text

# `configs` lies beside `train`, in a checkout as in an installed wheel. Asking the import system for the name
# would find a user's own `configs` folder first.
SHIPPED = pathlib.Path(train.__file__).resolve().parent.parent / "configs"

# An entry of a saved config that is no field: the version of moejax that wrote it.
VERSION = "moejax"
# Another one: where the run was when its paths were written, so that they are found again beside it.
RUN_DIRECTORY = "run_directory"

# Fields that may hold a path; `data.tokenizer` may also hold a name. The content decides, see `train.inputs`.
PATHS = ("data.path", "data.validation_path", "data.tokenizer")

# What may differ when a run is resumed; an entry that ends in a dot is a whole group.
MAY_CHANGE = (
    "steps",
    "workdir",
    *PATHS,
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
    path = pathlib.Path(with_home(argument))
    if path.suffix in (".py", ".yaml", ".yml") and os.path.isfile(path):
        if path.suffix == ".py":
            return load_python(path), path.stem
        return load_config(path), path.resolve().parent.name if path.stem == "config" else path.stem
    if argument in shipped_names():
        return load_python(SHIPPED / f"{argument}.py"), argument
    raise ConfigError("CONFIG", shown(argument), _why_not_found(path))


def shipped_names() -> list[str]:
    """Names of the files in `configs/`."""
    return sorted(path.stem for path in SHIPPED.glob("*.py") if not path.stem.startswith(("_", ".")))


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
    also says which version of moejax wrote it, and in which folder.
    """
    path = pathlib.Path(path)
    config = dataclasses.replace(config, workdir=None)
    # ASCII only: PyYAML writes some Unicode line ends (U+0085) such that they come back as spaces.
    values = {
        VERSION: version_of("moejax"),
        **dataclasses.asdict(config),
        RUN_DIRECTORY: os.path.abspath(path.parent),
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=1_000_000)
    replace_text(path, text)


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a YAML config; fields that it leaves out have their defaults.

    Raises:
      ConfigError: the file cannot be read or is no YAML, has an unknown field (names the nearest) or a value
        of the wrong type. Where another version of moejax wrote the file, the error names both versions.
    """
    path = pathlib.Path(path)
    values = _read_values(path)
    values.pop(RUN_DIRECTORY, None)
    with naming_versions(values.pop(VERSION, None), path):
        return build(TrainConfig, values)


def run_directory_in(path: pathlib.Path) -> str | None:
    """Where the run was when its `config.yaml` was written; None where the file does not say so.

    Raises:
      ConfigError: the file cannot be read or is no YAML.
    """
    written = _read_values(path).get(RUN_DIRECTORY)
    return written if isinstance(written, str) else None


def _read_values(path: pathlib.Path) -> dict[Any, Any]:
    with reading("CONFIG", path, "valid YAML"):
        values = yaml.load(pathlib.Path(regular(path)).read_text(encoding="utf-8"), Loader=_PlainLoader)
    if not isinstance(values, dict):
        raise ConfigError("CONFIG", path, "must be a YAML mapping of config fields")
    return values


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


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, for a few lines of them make gigabytes, and without a key that is there twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"an alias in line {mark.line + 1}; write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(
                f"{twice[0]} is there twice, in line {node.start_mark.line + 1} and after it"
            )
        return super().construct_mapping(node, deep)


def earlier_config(workdir: pathlib.Path) -> TrainConfig | None:
    """The config of the run that `workdir` holds, None where there is no run.

    Raises:
      ConfigError: it has checkpoints, but nothing says any more with which config they were made.
    """
    path = workdir / "config.yaml"
    if os.path.isfile(path):  # anything else is in the way, and the workdir says so
        return load_config(path)
    if checkpoint_steps(workdir / "checkpoints"):
        rule = "has checkpoints, but not the config.yaml that they were made with; choose another workdir"
        raise ConfigError("workdir", workdir, rule)
    return None


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
    rule = "must be a .py file, a .yaml file, or the name of a shipped config"
    if os.path.isfile(path):
        return rule
    if os.path.isdir(path):
        return f"is a folder; {rule}"
    if os.path.lexists(path):
        return f"cannot be read: {_why_no_file(path)}; {rule}"
    files = beside(path, "*.py", "*.yaml", "*.yml")
    known = shipped_names() + [
        other for other in files if not pathlib.Path(other).stem.startswith(("_", "."))
    ]
    return f"no such config file{nearest(str(path), known)}"


def _why_no_file(path: pathlib.Path) -> str:
    try:
        regular(path)
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which is not there"
    except OSError as error:
        return reason(error)
    raise AssertionError(path)


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
        known = flatten(TrainConfig())
        is_there = f"; {argument[1]} is a field of TrainConfig itself"
        message += is_there if argument[1] in known else nearest(argument[1], known)
    return f"raised {type(error).__name__}{where}: {message}"
