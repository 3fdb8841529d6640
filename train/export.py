"""One layer, or one expert of it, out of a run's newest sound checkpoint into a safetensors file.

The file holds numbers and names only; reading it executes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.config_io import load_config
from train.data import load_tokenizer
from train.errors import ConfigError
from train.evaluate import restore_params
from train.leaves import named_leaves
from train.model import ModelSpec


def export_run(run_dir: str, output: str, layer: int, expert: int | None = None) -> list[str]:
    """Write the parameters of a layer by their dotted names in it, such as `ffn.experts.w_in` [E, D, F].

    Args:
      run_dir: of a run with a checkpoint.
      output: the file; it must not be there yet.
      layer: from 0.
      expert: only this one, from 0; its arrays have no axis of experts.

    Returns:
      Name, dtype and shape of each array, in words.

    Raises:
      ConfigError: no such layer or expert, no sound checkpoint, `output` is there or cannot be written.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ConfigError(
            "command", "export", "needs the package safetensors: pip install safetensors"
        ) from error
    directory, path = Path(run_dir), Path(output)
    config = load_config(directory / "config.yaml")
    spec = ModelSpec.from_config(config, load_tokenizer(directory).vocab_size)
    layers = config.model.num_layers
    if not 0 <= layer < layers:
        raise ConfigError("--layer", layer, f"must be between 0 and {layers - 1}")
    if path.exists():
        raise ConfigError("--output", path, "must be a new file")
    step, params, _ = restore_params(directory, config, spec.abstract_params(None))
    arrays = _of_layer(params, spec.logical_axes(), layer)
    if expert is not None:
        arrays = {name: _of_expert(*entry, expert) for name, entry in arrays.items() if "experts" in entry[1]}
        if not arrays:
            raise ConfigError("--expert", expert, f"layer {layer} has no experts")
    plain = {name: np.ascontiguousarray(array) for name, (array, _) in arrays.items()}
    about = {"moejax.step": str(step), "moejax.layer": str(layer)}
    if expert is not None:
        about["moejax.expert"] = str(expert)
    try:
        save_file(plain, path, about)
    except Exception as error:  # safetensors has errors of its own for a full disk and a missing folder
        raise ConfigError("--output", path, f"cannot be written: {error}") from error
    return [f"{name} {array.dtype}{list(array.shape)}" for name, array in plain.items()]


Named = tuple[np.ndarray, tuple[str, ...]]
"""An array and the logical names of its axes."""


def _of_layer(params: dict[str, Any], axes: dict[str, Any], layer: int) -> dict[str, Named]:
    """The parameters of one layer: layers at the same place in the model's period are stacked."""
    period = len(params["blocks"])
    repetition, block = divmod(layer, period)
    key = next(key for key in params["blocks"] if int(key) == block)
    is_leaf = lambda leaf: hasattr(leaf, "names")  # noqa: E731
    names = [leaf.names for leaf in jax.tree.leaves(axes["blocks"][key], is_leaf=is_leaf)]
    leaves = named_leaves(params["blocks"][key])
    found = {}
    for (name, leaf), axis_names in zip(leaves.items(), names, strict=True):
        array = np.asarray(leaf)
        if axis_names[0] == "layers":
            array, axis_names = array[repetition], axis_names[1:]
        found[name] = array, axis_names
    return found


def _of_expert(array: np.ndarray, axis_names: tuple[str, ...], expert: int) -> Named:
    axis = axis_names.index("experts")
    if not 0 <= expert < array.shape[axis]:
        raise ConfigError("--expert", expert, f"must be between 0 and {array.shape[axis] - 1}")
    return array.take(expert, axis), axis_names[:axis] + axis_names[axis + 1 :]
