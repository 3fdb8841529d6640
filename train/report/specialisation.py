"""Which tokens each expert prefers, and which experts go together, measured on evaluation text.

Shapes: T tokens, M MoE layers, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig
from train.data import load_tokenizer, validation_batches
from train.errors import ConfigError
from train.evaluate import restore_params
from train.inputs import read_began, read_inputs
from train.model import ModelSpec, product_precision
from train.observe import coactivation
from train.report.runs import Run

_TOKENS = 16_384
_SHOWN = 8
# Rarer tokens say little of an expert.
_AT_LEAST = 8


@dataclass(frozen=True)
class Preference:
    """A token that an expert gets more often than its share.

    Fields:
      text: of the token.
      share: of the token's places in the text at which it goes to this expert.
    """

    text: str
    share: float


@dataclass(frozen=True)
class Specialisation:
    """What the experts of a checkpoint are there for.

    Fields:
      step: of the checkpoint.
      tokens: looked at.
      loads: of each MoE layer, its experts' shares of all choices, [E].
      preferences: for each MoE layer and expert, the tokens that it prefers most.
      pairs: of each MoE layer, choices of two experts by one token over what independent choices would give, [E, E].
    """

    step: int
    tokens: int
    loads: list[np.ndarray]
    preferences: list[list[list[Preference]]]
    pairs: list[np.ndarray]


def specialisation(run: Run) -> Specialisation | None:
    """Look at the newest checkpoint of a run with some of its validation text; None for a dense model.

    Raises:
      ConfigError: no sound checkpoint, or the data has gone or has other content.
    """
    config = run.config
    tokenizer = load_tokenizer(run.directory)
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    if not spec.num_moe_layers:
        return None
    inputs = read_inputs(config, run.directory, config, read_began(run.directory), tokenizer)
    step, params, _ = restore_params(run.directory, config, spec.abstract_params(None))
    model = spec.merge(params)

    @jax.jit
    def ids_of(tokens_BS, segments_BS, positions_BS):
        with product_precision(config):
            found = model.routings(tokens_BS, segments_BS=segments_BS, positions_BS=positions_BS)
        return [routing.ids_TK for routing in found]

    tokens_T: list[np.ndarray] = []
    ids: list[list[np.ndarray]] = []  # of each batch and layer: layers may choose differently many experts
    for batch in _some_batches(inputs.corpus, config):
        arrays = (jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions"))
        tokens_T.append(batch["tokens"].reshape(-1))
        ids.append(jax.device_get(ids_of(*arrays)))
    all_tokens_T = np.concatenate(tokens_T)
    layers = list(zip(map(np.concatenate, zip(*ids, strict=True)), spec.experts_of_layers, strict=True))
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    loads, liked = [], []
    for ids_TK, num_experts in layers:
        counts_VE = count_choices(all_tokens_T, ids_TK, len(texts), num_experts)
        places_V = np.bincount(all_tokens_T[np.any(ids_TK >= 0, axis=1)], minlength=len(texts))
        loads.append(counts_VE.sum(axis=0) / max(counts_VE.sum(), 1))
        liked.append(preferences(counts_VE, places_V, texts))
    return Specialisation(
        step, len(all_tokens_T), loads, liked, [pairs(ids_TK, num_experts) for ids_TK, num_experts in layers]
    )


def _some_batches(corpus, config: TrainConfig):
    length = config.data.sequence_length
    rows = max(1, min(16, _TOKENS // length))
    return validation_batches(corpus, rows, length, max(1, _TOKENS // (rows * length)))


def count_choices(tokens_T: np.ndarray, ids_TK: np.ndarray, vocabulary: int, num_experts: int) -> np.ndarray:
    """How often each token chose each expert, [V, E]."""
    counts_VE = np.zeros((vocabulary, num_experts), np.int64)
    chosen_TK = ids_TK >= 0
    of_T = np.broadcast_to(tokens_T[:, None], ids_TK.shape)
    np.add.at(counts_VE, (of_T[chosen_TK], ids_TK[chosen_TK]), 1)
    return counts_VE


def preferences(counts_VE: np.ndarray, places_V: np.ndarray, texts: list[str]) -> list[list[Preference]]:
    """For each expert the tokens that go there at most of their places, the more frequent of equal ones first.

    Args:
      counts_VE: how often each token chose each expert.
      places_V: at how many places each token occurs.
    """
    share_VE = counts_VE / np.maximum(places_V, 1)[:, None]
    overall_E = counts_VE.sum(axis=0) / max(places_V.sum(), 1)
    often_V = places_V >= _AT_LEAST
    result = []
    for expert in range(counts_VE.shape[1]):
        liked = np.flatnonzero(often_V & (share_VE[:, expert] > overall_E[expert]))
        best = liked[np.lexsort((-places_V[liked], -share_VE[liked, expert]))][:_SHOWN]
        result.append([Preference(texts[token], float(share_VE[token, expert])) for token in best])
    return result


def pairs(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, E]: `coactivation` of the experts that these tokens chose."""
    chosen_TE = np.zeros((len(ids_TK), num_experts))
    rows, columns = np.nonzero(ids_TK >= 0)
    chosen_TE[rows, ids_TK[rows, columns]] = 1
    return coactivation(chosen_TE.T @ chosen_TE, len(ids_TK))


def try_specialisation(run: Run) -> tuple[Specialisation | None, str]:
    """As `specialisation`, and why there is none: a report without it is still a report."""
    try:
        return specialisation(run), "The model has no MoE layers."
    except ConfigError as error:
        return None, str(error)
