"""What the config says of single layers: which are MoE, with which router and how many experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from train.config import ModelConfig
from train.errors import ConfigError
from train.fields import nearest, shown

T = TypeVar("T")

_MOST_EXPERTS = 2**20


@dataclass(frozen=True)
class MoELayer:
    """What may differ between the MoE layers of a model.

    Fields:
      router: name.
      num_experts: E of this layer.
    """

    router: str
    num_experts: int

    def experts_per_token(self, model: ModelConfig) -> int:
        """`model.moe.top_k`, or the router's own number where it is unset."""
        from moejax.routing import ROUTERS

        return ROUTERS[self.router].default_top_k if model.moe.top_k is None else model.moe.top_k


def moe_layers_of(model: ModelConfig) -> dict[int, MoELayer]:
    """Every MoE layer by its number, ascending.

    Raises:
      ConfigError: a field that names single layers is no list of MoE layers and what they have.
    """
    from moejax.routing import ROUTERS

    def a_router(name: str) -> str | None:
        return name if name in ROUTERS else None

    def a_count(text: str) -> int | None:
        return int(text) if text.isdecimal() and 1 <= int(text) <= _MOST_EXPERTS else None

    routers = _by_layer(
        model,
        "layer_routers",
        "0:hash,3:switch",
        a_router,
        lambda name: f"must name routers of {', '.join(ROUTERS)}{nearest(name, ROUTERS)}",
    )
    counts = _by_layer(
        model,
        "layer_experts",
        "0:4,3:16",
        a_count,
        lambda text: f"must give numbers of experts between 1 and {_MOST_EXPERTS}, got {shown(text)}",
    )
    moe = model.moe
    return {
        layer: MoELayer(routers.get(layer, moe.router), counts.get(layer, moe.num_experts))
        for layer in moe_layer_numbers(model.moe_layers, model.num_layers)
    }


def _by_layer(
    model: ModelConfig,
    name: str,
    example: str,
    read: Callable[[str], T | None],
    refusal: Callable[[str], str],
) -> dict[int, T]:
    """A field of `model.moe` such as `0:hash,3:switch`, as what each layer that it names has.

    Args:
      read: from a word to a value, None for one that is none.
      refusal: of such a word, what is allowed.
    """
    field, text = f"model.moe.{name}", getattr(model.moe, name)
    layers = moe_layer_numbers(model.moe_layers, model.num_layers)
    values: dict[int, T] = {}
    for part in text.split(",") if text is not None else ():
        layer, _, word = (word.strip() for word in part.partition(":"))
        if not (layer.isdecimal() and int(layer) in layers):
            rule = f"must be a list such as {example}, of the MoE layers {', '.join(map(str, layers))}"
            raise ConfigError(field, shown(text), rule)
        if int(layer) in values:
            raise ConfigError(field, shown(text), f"must name layer {layer} once")
        value = read(word)
        if value is None:
            raise ConfigError(field, shown(text), refusal(word))
        values[int(layer)] = value
    return values


def moe_layer_numbers(moe_layers: str, num_layers: int) -> tuple[int, ...]:
    """The numbers of the MoE layers that `model.moe_layers` names, ascending, from 0.

    Raises:
      ConfigError: it is none of `all`, `none`, `odd`, `even` and not a list of layer numbers.
    """
    every = range(num_layers)
    words = {"all": every, "none": (), "even": every[::2], "odd": every[1::2]}
    if moe_layers in words:
        return tuple(words[moe_layers])
    allowed = f"must be all, none, odd, even, or a list of layer numbers from 0 to {num_layers - 1}"
    try:
        numbers = [int(number) for number in moe_layers.split(",")]
    except ValueError:
        raise ConfigError("model.moe_layers", shown(moe_layers), allowed) from None
    if outside := [number for number in numbers if number not in every]:
        raise ConfigError("model.moe_layers", moe_layers, f"{allowed}; there is no layer {outside[0]}")
    if len(set(numbers)) < len(numbers):
        raise ConfigError("model.moe_layers", moe_layers, f"{allowed}, each once")
    return tuple(sorted(numbers))


def shared_width(model: ModelConfig) -> int:
    """Hidden width of the FFN that every token passes beside its experts; 0 where there is none."""
    return model.moe.shared_hidden or model.moe.shared_experts * hidden_widths(model)[1]


def hidden_widths(model: ModelConfig) -> tuple[int, int]:
    """Hidden width of a dense FFN and of an expert, where unset in multiples of 8."""
    from moejax.routing import ROUTERS

    top_k = model.moe.top_k or ROUTERS[model.moe.router].default_top_k
    dense = model.d_hidden or math.ceil(8 * model.d_model / 3 / 8) * 8
    return dense, model.moe.d_hidden or math.ceil(dense / top_k / 8) * 8
