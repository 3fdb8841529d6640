"""Where a model's parameters, or their gradients, are not finite: which parameter, of which layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.model import ModelSpec

_LAYERS = "blocks"


class FiniteCheck:
    """Looks at a tree of parameters part by part.

    A part is a parameter of one layer: the layers of one place in the model's period are stacked, so each repetition
    is a part of its own. Parameters outside of the layers are parts as they are.
    """

    def __init__(self, spec: ModelSpec):
        axes = jax.tree_util.tree_leaves_with_path(spec.logical_axes())
        leaves = jax.tree.leaves(spec.abstract_params(None))
        period = len(spec.abstract_params(None)[_LAYERS])
        self._stacked = [name.names[0] == "layers" for _, name in axes]
        self._parts: list[tuple[int | None, str]] = []
        for (path, _), leaf, is_stacked in zip(axes, leaves, self._stacked, strict=True):
            keys = [str(getattr(key, "key", key)) for key in path]
            if is_stacked:
                block, name = int(keys[1]), ".".join(keys[2:])
                self._parts += [(repetition * period + block, name) for repetition in range(leaf.shape[0])]
            else:
                self._parts.append((None, ".".join(keys)))

    def __call__(self, params: Any) -> jax.Array:
        """[parts] bool, on the device: whether each part is finite; also for use under `jit`."""
        whole = lambda leaf, stacked: tuple(range(int(stacked), leaf.ndim))  # noqa: E731
        return jnp.concatenate(
            [
                jnp.all(jnp.isfinite(leaf), axis=whole(leaf, stacked)).reshape(-1)
                for leaf, stacked in zip(jax.tree.leaves(params), self._stacked, strict=True)
            ]
        )

    def origin_of_gradient(self, finite: np.ndarray) -> str | None:
        """The parameter at which a gradient began not to be finite; None if all parts are.

        Backward goes from the last layer to the first, in each through the FFN before attention, and takes a NaN
        along to the embedding.
        """
        bad = self._bad(finite)
        after_layers = [part for part in bad if part[0] is None and part[1] != "embedding"]
        in_layers = [(layer, name) for layer, name in bad if layer is not None]
        in_layers.sort(key=lambda part: (part[0], part[1].startswith("ffn")), reverse=True)
        return _shown([*after_layers, *in_layers, *bad])

    def first(self, finite: np.ndarray) -> str | None:
        """The parameter of the lowest layer that is not finite; None if all parts are."""
        outside = len(self._parts)
        layer = lambda part: outside if part[0] is None else part[0]  # noqa: E731
        return _shown(sorted(self._bad(finite), key=layer))

    def _bad(self, finite: np.ndarray) -> list[tuple[int | None, str]]:
        return [self._parts[index] for index in np.flatnonzero(~finite)]


def _shown(parts: list[tuple[int | None, str]]) -> str | None:
    if not parts:
        return None
    layer, name = parts[0]
    return name if layer is None else f"{name} in layer {layer}"
