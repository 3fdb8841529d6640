"""What an evaluation says of the experts.

Shapes: M MoE layers, E experts, W watched tokens: the first of the validation split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.metrics import LAYERS, of_existing

# Tokens whose first choices are kept from one evaluation to the next, with the run's state.
WATCHED_TOKENS = 4096
# Its value before the first evaluation.
NEVER = -2
# Pairs of experts that are named for each layer.
_PAIRS = 8
# Experts that meet more rarely may do so by chance.
_AT_LEAST = 32


@dataclass(frozen=True)
class ExpertView:
    """Sums over the batches of an evaluation, of every MoE layer.

    Fields:
      load_ME: choices per expert; E is that of the layer of most experts.
      dropped_M: choices that were not carried out.
      by_router_M: those of them that the router itself dropped, which `load_ME` does not count.
      first_MW: first choice of each watched token, -1 for none; where the evaluation left it, on the device.
      together_MEE: of the first batches, tokens that chose both experts; on the diagonal, those that chose the one.
      together_tokens: tokens of these batches.
      experts_of_layers: how many experts each layer has.
    """

    load_ME: np.ndarray
    dropped_M: np.ndarray
    by_router_M: np.ndarray
    first_MW: Any
    together_MEE: np.ndarray
    together_tokens: int
    experts_of_layers: Sequence[int]

    @classmethod
    def of(
        cls, batches: Sequence[dict[str, Any]], first_MW: Any, experts_of_layers: Sequence[int]
    ) -> ExpertView | None:
        """From what `make_eval_step` reports of each batch; None for a dense model."""
        if "load" not in batches[0]:
            return None
        total = lambda name: np.sum([np.asarray(b[name], np.int64) for b in batches if name in b], axis=0)  # noqa: E731
        tokens = sum(int(b["routed"]) for b in batches if "together" in b)
        return cls(
            total("load"),
            total("dropped"),
            total("by_router"),
            first_MW,
            total("together"),
            tokens,
            experts_of_layers,
        )

    def metrics(self, first_before_MW: np.ndarray) -> dict[str, Any]:
        """Scalars, and the numbers of each layer under `moe/layers/`.

        Args:
          first_before_MW: of the evaluation before; NEVER if there was none, which leaves the change out.
        """
        even_M = np.maximum(self.load_ME.sum(axis=1) / np.asarray(self.experts_of_layers), 1e-9)
        max_vio_M = self.load_ME.max(axis=1) / even_M - 1
        choices_M = np.maximum(self.load_ME.sum(axis=1) + self.by_router_M, 1)
        pairs = [best_pairs(together_EE, self.together_tokens) for together_EE in self.together_MEE]
        record = {
            "moe/max_vio": float(max_vio_M.max()),
            "moe/dropped_fraction": float(self.dropped_M.sum() / choices_M.sum()),
            LAYERS + "load": of_existing(self.load_ME, self.experts_of_layers),
            LAYERS + "max_vio": max_vio_M,
            LAYERS + "pairs": pairs,
        }
        if not (first_before_MW == NEVER).any():
            changed_M = changed_share(first_before_MW, np.asarray(self.first_MW))
            record |= {"moe/changed": float(changed_M.mean()), LAYERS + "changed": changed_M}
        return record


def changed_share(before_MW: np.ndarray, now_MW: np.ndarray) -> np.ndarray:
    """[M]: share of the tokens whose first choice is another one than before, of those that had or have one."""
    counted_MW = (before_MW >= 0) | (now_MW >= 0)
    changed_M = np.sum(counted_MW & (before_MW != now_MW), axis=1)
    return changed_M / np.maximum(np.sum(counted_MW, axis=1), 1)


def coactivation(together_EE: np.ndarray, tokens: int) -> np.ndarray:
    """[E, E]: tokens that chose both experts over tokens * P(one) * P(other); the diagonal is 0.

    Args:
      together_EE: tokens that chose both; on the diagonal, those that chose the one.
      tokens: number of tokens counted.
    """
    count_E = np.diag(together_EE)
    apart_EE = count_E[:, None] * count_E[None, :] / max(tokens, 1)
    return np.where(np.eye(len(count_E), dtype=bool), 0, together_EE / np.maximum(apart_EE, 1e-9))


def best_pairs(together_EE: np.ndarray, tokens: int) -> list[list[float]]:
    """The experts that most prefer each other, as [expert, expert, `coactivation`], the strongest first."""
    ratio_EE = np.where(together_EE >= _AT_LEAST, coactivation(together_EE, tokens), 0)
    rows, columns = np.triu_indices(len(ratio_EE), k=1)
    strongest = np.argsort(-ratio_EE[rows, columns], kind="stable")[:_PAIRS]
    named = [(int(rows[i]), int(columns[i])) for i in strongest]
    return [[i, j, float(ratio_EE[i, j])] for i, j in named if ratio_EE[i, j] > 1]
