"""Mixture-of-Experts layers for JAX: exact on every layout, no token dropped silently.

`functional` works on arrays, `MoE` is the layer, `Transformer` a language model built on it.
"""

from moejax import functional as functional
from moejax import partitioner
from moejax.attention import Attention as Attention
from moejax.attention import KVCache as KVCache
from moejax.experts import Experts as Experts
from moejax.layers import FeedForward as FeedForward
from moejax.layers import RMSNorm as RMSNorm
from moejax.losses import BatchLoad as BatchLoad
from moejax.mesh import make_mesh as make_mesh
from moejax.moe import MoE as MoE
from moejax.moe import MoEStats as MoEStats
from moejax.routing import ROUTERS as ROUTERS
from moejax.routing import Router as Router
from moejax.routing import RouterState as RouterState
from moejax.routing import Routing as Routing
from moejax.routing import TopK as TopK
from moejax.routing import make_router as make_router
from moejax.statistics import Choices as Choices
from moejax.statistics import RouterStats as RouterStats
from moejax.transformer import Transformer as Transformer

partitioner.avoid_shardy_where_it_dies()
