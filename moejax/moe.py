"""The Mixture-of-Experts layer.

Shapes: T tokens (on one device inside `_local`), D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from custom_ops.checks import BadArgument, instance_of, one_of, require, require_shape
from custom_ops.target import target
from moejax.activations import ACTIVATIONS
from moejax.arguments import checked
from moejax.cost import Link
from moejax.delivery import OVERFLOWS, Options, deliver
from moejax.expert_list import ExpertList
from moejax.experts import Experts
from moejax.kept import RECEIVED, keeping
from moejax.levels import EXCHANGES, check_experts, check_links
from moejax.losses import (
    BatchLoad,
    balance_loss,
    expert_load,
    importance_loss,
    load_loss,
    orthogonality_loss,
    sequence_balance_loss,
    z_loss,
)
from moejax.mesh import (
    ambient_mesh,
    expert_axes,
    has_axis,
    make_varying,
    over_tokens,
    require_divisible,
    tensor_axes,
    token_axes,
)
from moejax.order import after, together
from moejax.own import check_own_experts, check_router, one_array, refuse_unknown
from moejax.routing import ROUTERS, Router, RouterState, Routing, make_router
from moejax.routing.check import check_routing
from moejax.routing.router import LinearRouter
from moejax.shadow import Shadow, replicate_module
from moejax.shared import beside, make_shared_experts
from moejax.statistics import Choices, RouterStats, chosen_together, router_stats
from moejax.wire import WIRES

# Of the running estimate of the experts' load, per step: half of it is of the last seven steps.
DEMAND_DECAY = 0.9

BALANCE_OVER = ("batch", "micro_batch", "sequence")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEStats:
    """What one layer did with the global batch; every field the same on all devices.

    Fields:
      aux_loss: weighted sum of the losses below, to be added to the model's loss.
      balance_loss, z_loss: unweighted.
      load_E: choices per expert, i32.
      invalid: choices whose expert id was out of range (-1, "none", is not), i32.
      dropped: valid choices that no expert carried out, i32.
      over_capacity: those of them that were beyond their expert's capacity, i32.
      at_sender: those of them that found a bucket full before it was sent, i32.
      at_receiver: the rest of them, which a receiver's full buffer refused, i32.
      rounds: times the layer ran until every choice was carried out, i32; the most of any group of devices.
      fill_V: share of the row buffers in use in the first round, one per level, the experts' last; f32.
      router: what the router did.
      choices: more of them, where the layer was asked to `observe` them; the field that is not the same on all devices.
    """

    aux_loss: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    load_E: jax.Array
    invalid: jax.Array
    dropped: jax.Array
    over_capacity: jax.Array
    at_sender: jax.Array
    at_receiver: jax.Array
    rounds: jax.Array
    fill_V: jax.Array
    router: RouterStats
    choices: Choices | None = None

    def widened(self, num_experts: int) -> MoEStats:
        """As of a layer with so many experts; those beyond its own have no load."""
        add = num_experts - self.load_E.shape[0]
        if add == 0:
            return self
        wider = lambda array: jnp.pad(array, [(0, add)] * array.ndim)  # noqa: E731
        choices = self.choices
        return replace(
            self,
            load_E=wider(self.load_E),
            router=replace(self.router, counted_E=wider(self.router.counted_E)),
            choices=choices and replace(choices, together_EE=wider(choices.together_EE)),
        )


class MoE(nnx.Module):
    """A sparse FFN: a router sends each token to K of E experts and sums what they return.

    `y, stats = layer(x)`. Uses the ambient mesh (`jax.set_mesh`): tokens are split over all its token axes, experts
    over `expert_node` and `expert`, their hidden width over `tensor`. Without a mesh it runs on one device. Value and
    gradients are the same on every layout.

    `nnx.Sequential` hands a tuple on as several arguments: there `lambda y, stats: y` follows the layer.

    Args:
      d_model: D.
      d_hidden: F, the hidden width of one expert.
      num_experts: E, over all devices.
      top_k: K; None takes the router's own. A router that is a module must have the same one.
      router: name in `ROUTERS`, or a module `router(x_TD, token_mask_T=, token_ids_T=, key=) -> Routing`.
      router_options: further arguments of the named router.
      experts: activation of the expert FFNs, name in `ACTIVATIONS`, or a module
        `experts(x_TD, plan, weights_TK) -> y_TD` whose parameters are stacked over the axis "experts", or a list of
        E different modules, see `ExpertList`.
      exchange: how rows travel between devices, name in `EXCHANGES`.
      overflow: what becomes of choices beyond the static buffers, name in `OVERFLOWS`: "rounds" carries them out in
        further rounds, "drop" drops and counts them.
      buffer_factor: size of the buffers, under "drop" also of every expert's capacity, in units of what balanced
        choices need; None takes the policy's own (with rounds 1.15 on GPUs; on CPU room for whatever may arrive).
      chunks: pieces in which the tokens go through the layer, so that one travels while another is computed.
      shadow: number of experts that are copied to every device of the expert axes, so that their tokens do not
        travel: those in most demand by the running estimate that `follow` keeps, without one in each batch.
      keep_demand: keep that estimate also without shadows, so that their number may be chosen by it.
      links: what devices reach along the expert axes, by name, for the exchange "auto"; None takes constants of
        NVLink and network, see `moejax.cost`.
      wire: compression of rows between devices, name in `WIRES`.
      received: what becomes of rows received from other devices between forward and backward, name in `RECEIVED`:
        "keep" holds them, "resend" lets backward send them again (on CPU not where there is a loop of rounds, beside
        which nothing could be sent; `moejax.order`).
      expert_bias: give the experts biases; see `Experts`.
      shared_experts: so many experts' width of dense FFN is added for every token (DeepSeekMoE).
      shared_hidden: the hidden width of that FFN, if it is not `shared_experts * d_hidden` (Qwen2-MoE).
      shared_gate: multiply its result by a learned sigmoid of the token (Qwen2-MoE).
      balance_weight, z_weight, importance_weight, load_weight: weights of the losses in `stats.aux_loss`; None takes
        the router's own.
      orthogonality_weight: likewise, of the router's matrix; for routers with a linear layer.
      balance_over: what the balance loss is taken over: "batch" and "micro_batch" are the tokens of this call over all
        devices, unless "batch" is told of a larger one (`batch_load`); "sequence" is each sequence by itself.

    Raises:
      ValueError: an unknown name, a number out of range, or (when called) arrays of another shape or kind, or experts
        that the mesh's expert axes do not divide; names the argument.
    """

    @checked(
        exchange=one_of(EXCHANGES),
        overflow=one_of(OVERFLOWS),
        wire=one_of(WIRES),
        received=one_of(RECEIVED),
        balance_over=one_of(BALANCE_OVER),
    )
    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        router: str | nnx.Module = "topk",
        experts: str | nnx.Module | Sequence[nnx.Module] = "swiglu",
        exchange: str = "all_to_all",
        expert_bias: bool = False,
        overflow: str = "rounds",
        buffer_factor: float | None = None,
        chunks: int = 1,
        shadow: int = 0,
        keep_demand: bool = False,
        links: Mapping[str, Link] | None = None,
        wire: str = "none",
        received: str = "keep",
        shared_experts: int = 0,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        balance_weight: float | None = None,
        balance_over: str = "batch",
        z_weight: float | None = None,
        importance_weight: float | None = None,
        load_weight: float | None = None,
        orthogonality_weight: float | None = None,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
        **router_options: Any,
    ):
        check_links(links, ())
        require(shadow <= num_experts, "shadow", shadow, f"must be at most num_experts ({num_experts})")
        if isinstance(router, str):
            refuse_unknown(router, router_options, MoE)
            router = make_router(router, d_model, num_experts, top_k=top_k, rngs=rngs, **router_options)
        else:
            for option, value in router_options.items():
                raise BadArgument(
                    option, value, "is an option of a router by name; router is a module itself"
                )
            check_router(router, d_model, num_experts)
            if top_k is not None and top_k != getattr(router, "top_k", None):
                allowed = f"the router's own ({router.top_k}) or None" if hasattr(router, "top_k") else "None"
                raise BadArgument("top_k", top_k, f"must be {allowed} where router is a module")
        ffn = {"out_scale": out_scale, "dtype": dtype, "rngs": rngs}
        activation = experts if isinstance(experts, str) else "swiglu"
        if isinstance(experts, str):
            one_of(ACTIVATIONS)("experts", experts)
            experts = Experts(num_experts, d_model, d_hidden, activation=experts, bias=expert_bias, **ffn)
        elif expert_bias:
            raise BadArgument(
                "expert_bias", expert_bias, "is for experts by name; experts is a module itself"
            )
        elif isinstance(experts, nnx.Module) and not isinstance(experts, nnx.List):
            check_own_experts(experts, num_experts)
        else:
            experts = ExpertList(experts, num_experts)
        self.d_model = d_model
        self.router = router
        self.experts = experts
        self.num_experts = num_experts
        self.shadow = shadow
        self.received = received
        keeps = shadow or keep_demand
        self.demand_E = RouterState(jnp.zeros(num_experts), axes=("router",)) if keeps else None
        paired_links = None if links is None else tuple(links.items())
        self.delivery = Options(exchange, overflow, buffer_factor, chunks, wire, paired_links)
        self.shared = make_shared_experts(
            d_model, d_hidden, shared_experts, shared_hidden, shared_gate, activation=activation, **ffn
        )
        own = getattr(router, "default_losses", Router.default_losses)
        weight = lambda name, given: own.get(name, 0.0) if given is None else given  # noqa: E731
        self.balance_weight, self.balance_over = weight("balance", balance_weight), balance_over
        self.z_weight = weight("z", z_weight)
        self.importance_weight = weight("importance", importance_weight)
        self.load_weight = weight("load", load_weight)
        self.orthogonality_weight = weight("orthogonality", orthogonality_weight)
        if self.orthogonality_weight and not isinstance(router, LinearRouter):
            rule = f"needs a router with a linear layer, not {type(router).__name__}"
            raise BadArgument("orthogonality_weight", orthogonality_weight, rule)
        if self.load_weight and type(router) in ROUTERS.values() and "load" not in own:
            rule = f"only router noisy knows the chances of its choices, not {type(router).__name__}"
            raise BadArgument("load_weight", load_weight, rule)

    @checked(x=one_array, batch_load=instance_of(BatchLoad, "a BatchLoad"))
    def __call__(
        self,
        x: jax.Array,
        *,
        token_mask: jax.Array | None = None,
        token_ids: jax.Array | None = None,
        key: jax.Array | None = None,
        batch_load: BatchLoad | None = None,
        observe: bool = False,
    ) -> tuple[jax.Array, MoEStats]:
        """Apply the layer to [..., D].

        Args:
          token_mask: [...] bool, False for tokens that go nowhere and count nowhere (their output is 0).
          token_ids: [...] i32, for routers that look at the token itself.
          key: random key; means training to the routers, see `Router`.
          batch_load: of the whole batch when x is a part of it; for the balance loss and the z-loss.
          observe: fill `stats.choices`.
        """
        self._check_arguments(x, token_mask, token_ids)
        if batch_load is not None:
            batch_load.check(self.num_experts)
        check_experts(self.num_experts, {axis: ambient_mesh().shape[axis] for axis in expert_axes()})
        flat = lambda a: None if a is None else a.reshape(-1)  # noqa: E731
        graphdef, params = nnx.split((self.router, self.experts, self.shared))

        sequence_length = x.shape[-2] if x.ndim > 2 else None
        if not x.size:
            token_mask = jnp.zeros(x.shape[:-1], bool)  # `over_tokens` adds tokens, which must count nowhere
            sequence_length = None if sequence_length is None else 1

        def run(params, replicated, *tokens):
            return over_tokens(
                partial(self._local, graphdef, sequence_length, observe),
                params,
                *tokens,
                replicated=replicated,
                out_specs=lambda tokens: (tokens, P(), P(), tokens),
            )

        # The policy goes around `shard_map`: what is kept of the parameters is then what the caller holds anyway.
        tokens = (x.reshape(-1, x.shape[-1]), flat(token_mask), flat(token_ids))
        replicated = (key, batch_load, None if self.demand_E is None else self.demand_E[...])
        y_TD, stats, together_EE, first_T = keeping(run, self._kept())(params, replicated, *tokens)
        if self.orthogonality_weight:
            # Of parameters alone, so not among what is summed over the tokens of all devices.
            assert isinstance(self.router, LinearRouter)
            of_router = self.orthogonality_weight * orthogonality_loss(self.router.w_DE[...])
            stats = replace(stats, aux_loss=stats.aux_loss + of_router)
        y = y_TD.reshape(x.shape)
        return y, replace(stats, choices=Choices(together_EE, first_T)) if observe else stats

    def _kept(self) -> str:
        may_loop = self.delivery.overflow == "rounds" and self.delivery.capacity_factor is not None
        return "keep" if may_loop and target().platform == "cpu" else self.received

    def _check_arguments(self, x, token_mask, token_ids) -> None:
        rule = f"must be [..., d_model], with the layer's d_model ({self.d_model}) last"
        require(x.shape[-1] == self.d_model, "x", x, rule)
        require_divisible("x", x, math.prod(x.shape[:-1]), "tokens")
        for argument, value in (("token_mask", token_mask), ("token_ids", token_ids)):
            if value is not None:
                require_shape(argument, value, x.shape[:-1], "one for each token of x")
        if self.balance_over == "sequence":
            require(x.ndim > 2, "x", x, "must be [B, S, D] under balance_over 'sequence', to have sequences")
            require_divisible("x", x, math.prod(x.shape[:-2]), "sequences")

    @checked()
    def follow(self, load_E: jax.Array) -> None:
        """Take a step's choices per expert, [E] or stacked over layers, into the estimate by which shadows are chosen.

        A mean that forgets with `DEMAND_DECAY`.
        """
        layers = load_E.shape[:-1] if self.demand_E is None else self.demand_E.shape[:-1]
        require_shape("load_E", load_E, (*layers, self.num_experts), "choices of each of the layer's experts")
        if self.demand_E is not None:
            load_E = load_E.astype(jnp.float32)
            self.demand_E[...] = DEMAND_DECAY * self.demand_E[...] + (1 - DEMAND_DECAY) * load_E

    def _local(self, graphdef, sequence_length, observe, params, replicated, x_TD, mask_T, token_ids_T):
        """One device's tokens; collectives go along the token axes of the mesh, if there are any."""
        key, batch_load, demand_E = replicated
        router, experts, shared = nnx.merge(graphdef, params)
        axes = token_axes()
        if mask_T is not None:
            # In backward, 0 times the NaN of a masked token would be NaN.
            x_TD = jnp.where(mask_T[:, None], x_TD, 0)
        routing = router(x_TD, token_mask_T=mask_T, token_ids_T=token_ids_T, key=key)
        check_routing(routing, x_TD.shape[0], self.num_experts)
        # A router may answer with constants, which are the same on all devices; what follows differs.
        routing = make_varying(routing, axes)
        in_range_TK = (routing.ids_TK >= 0) & (routing.ids_TK < self.num_experts)
        ids_TK = jnp.where(in_range_TK, routing.ids_TK, -1)
        shadow = None
        if self.shadow and expert_axes():
            copy = lambda hot_S: replicate_module(experts, hot_S, expert_axes())  # noqa: E731
            shadow = Shadow(self.shadow, copy, demand_E)
        # Each device along the tensor axis computes a part of every hidden width: its results are summed once, here,
        # and in backward the gradients of what goes in. Experts that have no such width are whole on every device.
        are_split = has_axis(experts, "hidden")
        parts = tensor_axes() if are_split or shared is not None else ()
        own_TD, own_ids_TK, own_weights_TK = make_varying((x_TD, ids_TK, routing.weights_TK), parts)
        if shared is not None:
            own_TD, shared = beside(own_TD, shared)
        part_TD, account = deliver(
            own_TD,
            own_ids_TK,
            own_weights_TK,
            experts,
            num_experts=self.num_experts,
            axes=expert_axes(),
            token_axes=axes,
            shadow=shadow,
            **self.delivery.arguments(),
        )
        if parts and not are_split:
            part_TD = jnp.where(jax.lax.axis_index(parts) == 0, part_TD, 0)
        if shared is not None:
            # A masked token is 0 by now and, without biases, leaves as 0.
            part_TD += shared(own_TD).astype(part_TD.dtype)
        y_TD = jax.lax.psum(part_TD, parts) if parts else part_TD
        account = make_varying(jax.lax.stop_gradient(account), (*axes, *parts))
        if axes:
            # The sums of the statistics come after the loop of rounds,
            y_TD, routing, ids_TK, in_range_TK = together((y_TD, routing, ids_TK, in_range_TK))
        same = lambda number: jax.lax.pmax(number, parts) if parts else number  # noqa: E731
        count = lambda choices_TK: jax.lax.psum(jnp.sum(choices_TK, dtype=jnp.int32), axes)  # noqa: E731
        losses = self._losses(routing, axes, sequence_length, batch_load)
        dropped = same(count(in_range_TK & ~account.served_TK))
        causes_2 = jnp.stack(make_varying((account.over_capacity, account.at_sender), axes))
        over_capacity, at_sender = same(jax.lax.psum(causes_2, axes))
        stats = MoEStats(
            aux_loss=losses["aux_loss"],
            balance_loss=losses["balance_loss"],
            z_loss=losses["z_loss"],
            load_E=expert_load(ids_TK, self.num_experts, axes),
            invalid=count(~in_range_TK & (routing.ids_TK != -1)),
            dropped=dropped,
            over_capacity=over_capacity,
            at_sender=at_sender,
            at_receiver=dropped - over_capacity - at_sender,
            rounds=same(jax.lax.pmax(account.rounds, axes)),
            fill_V=same(jax.lax.pmean(account.fill_V, axes)),
            router=router_stats(routing, axes),
        )
        y_TD, pairs_EE, first_T = y_TD.astype(x_TD.dtype), None, None
        if observe:
            pairs_EE, first_T = chosen_together(ids_TK, self.num_experts, axes), ids_TK[:, 0]
        if axes:
            y_TD = after(y_TD, (stats, pairs_EE))  # and what follows, here and in backward, comes after them.
        return y_TD, stats, pairs_EE, first_T

    def _losses(self, routing: Routing, axes, sequence_length, batch_load) -> dict[str, jax.Array]:
        """The auxiliary losses as fields of `MoEStats`; importance and load only where they have a weight."""
        if self.balance_over == "sequence":
            assert sequence_length is not None
            balance = sequence_balance_loss(routing, axes, sequence_length=sequence_length)
        else:
            balance = balance_loss(routing, axes, batch=batch_load if self.balance_over == "batch" else None)
        z = z_loss(routing, axes, batch=batch_load)
        aux_loss = self.balance_weight * balance + self.z_weight * z
        if self.importance_weight:
            aux_loss += self.importance_weight * importance_loss(routing, axes)
        if self.load_weight:
            aux_loss += self.load_weight * load_loss(routing, axes)
        return {"aux_loss": aux_loss, "balance_loss": balance, "z_loss": z}
