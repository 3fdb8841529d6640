"""Every router restated in NumPy, f64, with loops: slow, obvious, and sharing no code.

Each takes logits [T, E] and its options, and returns ids [T, K] and the number of choices it dropped per token. Weights
are a function of logits and ids, so that their gradient can be taken numerically.
"""

import math

import jax
import numpy as np


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 0.5 * (1 + np.tanh(np.asarray(logits, np.float64) / 2))


def draws(sample, key, tokens, shape):
    """Token t's numbers are drawn with the key folded with t."""
    numbers = [sample(jax.random.fold_in(key, t), shape) for t in range(tokens)]
    return np.stack([np.asarray(n) for n in numbers])


def largest(values, k):
    """Indices of the k largest, the first among equals; -1 for what is -inf."""
    order = sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]
    return [e if values[e] > -np.inf else -1 for e in order]


def top_k(logits, valid, k):
    ids = [largest(row, k) if ok else [-1] * k for row, ok in zip(logits, valid, strict=True)]
    return np.array(ids), np.zeros(len(logits), int)


def softmax_of_chosen(logits, ids):
    """[T, E], 0 where an expert is none of the token's choices."""
    chosen = (ids[:, :, None] == np.arange(logits.shape[1])).any(axis=1)
    scores = np.zeros(logits.shape)
    for row, values, some in zip(scores, logits, chosen, strict=True):
        if some.any():
            row[some] = softmax(values[some])
    return scores


def combine(scores, ids, normalize):
    weights = np.where(ids >= 0, np.take_along_axis(scores, np.maximum(ids, 0), axis=1), 0.0)
    if normalize:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
    return weights


def grouped(fn, groups, *arrays):
    """Apply fn(group number, part of each array, ...) to each group of consecutive tokens, as many as there can be."""
    groups = math.gcd(groups, len(arrays[0]))
    results = [
        fn(g, *parts) for g, parts in enumerate(zip(*(np.split(a, groups) for a in arrays), strict=True))
    ]
    return [np.concatenate(columns) for columns in zip(*results, strict=True)]


def capacity(ids, priority, num_experts, factor, groups):
    def one(_, ids, priority):
        tokens = int((ids >= 0).any(axis=1).sum())
        limit = max(1, math.ceil(round(factor * ids.shape[1] * tokens / num_experts, 6)))
        kept = np.full_like(ids, -1)
        for expert in range(num_experts):
            queue = sorted((priority[t, k], k, t) for t, k in np.argwhere(ids == expert))
            for _, k, t in queue[:limit]:
                kept[t, k] = expert
        return kept, ((ids >= 0) & (kept < 0)).sum(axis=1)

    return grouped(one, groups, ids, priority)


def in_groups(scores, valid, k, expert_groups, limit_groups, best):
    """The k largest within the groups of experts whose `best` largest scores have the largest sum."""
    size = scores.shape[1] // expert_groups
    ids = []
    for row, ok in zip(scores, valid, strict=True):
        parts = row.reshape(expert_groups, size)
        open_groups = largest([sum(np.sort(part)[-best:]) for part in parts], limit_groups)
        row = [s if e // size in open_groups else -np.inf for e, s in enumerate(row)]
        ids.append(largest(row, k) if ok else [-1] * k)
    return np.array(ids), np.zeros(len(ids), int)


def sigmoid_choice(logits, bias, valid, k, expert_groups, limit_groups):
    """Over f32 scores, as ties among them are decided by position."""
    scores = np.asarray(jax.nn.sigmoid(logits)) + bias
    return in_groups(scores, valid, k, expert_groups, limit_groups, best=2)


def chance(clean, noisy, spread, k):
    """P(expert is among the k largest if only its own noise is drawn again), [T, E]."""
    chances = np.zeros(clean.shape)
    for t, e in np.ndindex(clean.shape):
        rival = np.sort(np.delete(noisy[t], e))[-k]
        chances[t, e] = 0.5 * math.erfc(-(clean[t, e] - rival) / spread[t, e] / math.sqrt(2))
    return chances


def _choices(takes, scores, most):
    ids = np.array([largest(np.where(row, s, -np.inf), most) for row, s in zip(takes, scores, strict=True)])
    return ids, takes.sum(axis=1) - (ids >= 0).sum(axis=1)


def expert_choice(logits, valid, k, most, factor, groups):
    def one(_, logits, valid):
        scores = np.asarray(jax.nn.softmax(logits, axis=-1))
        count, num_experts = int(valid.sum()), logits.shape[1]
        limit = min(count, max(1, math.ceil(round(factor * k * count / num_experts, 6))))
        takes = np.zeros(logits.shape, bool)
        for e in range(num_experts):
            queue = sorted(np.flatnonzero(valid), key=lambda t, e=e: (-scores[t, e], t))
            takes[queue[:limit], e] = True
        return _choices(takes, scores, most)

    return grouped(one, groups, logits, valid)


def rounded(logits, valid, k, tile, rounding, most, groups):
    wanted = top_k(logits, valid, k)[0]
    whole = {"down": math.floor, "up": math.ceil, "nearest": lambda x: math.floor(x + (tile // 2) / tile)}[
        rounding
    ]

    def one(_, logits, valid, wanted):
        scores = np.asarray(jax.nn.softmax(logits, axis=-1))
        takes = np.zeros(logits.shape, bool)
        chose = np.zeros(logits.shape, bool)
        for e in range(logits.shape[1]):
            chose[:, e] = (wanted == e).any(axis=1)
            target = whole(chose[:, e].sum() / tile) * tile
            queue = sorted(np.flatnonzero(valid), key=lambda t, e=e: (not chose[t, e], -scores[t, e], t))
            takes[queue[:target], e] = True
        ids, lost = _choices(takes, scores, most)
        return ids, lost + (chose & ~takes).sum(axis=1)

    return grouped(one, groups, logits, valid, wanted)


def sinkhorn(logits, valid, k, iterations, groups):
    def one(_, logits, valid):
        plan = np.exp(np.asarray(logits, np.float64) - logits.max(axis=1, keepdims=True)) * valid[:, None]
        for _ in range(iterations):
            plan = plan / np.where(valid, plan.sum(axis=1), 1)[:, None]
            plan = plan / plan.sum(axis=0)
        return top_k(plan, valid, k)

    return grouped(one, groups, logits, valid)


def hashed(token_ids, valid, k, num_experts, seed):
    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    values = [
        [mix((t * num_experts + e) % 2**32 ^ mix(seed)) for e in range(num_experts)]
        for t in token_ids.tolist()
    ]
    return top_k(np.array(values, np.float64), valid, k)


def swipe(logits, valid, k, devices, factor, groups):
    def one(_, logits, valid):
        num_tokens, num_experts = logits.shape
        size = num_experts // devices
        free = [math.ceil(round(k * factor * int(valid.sum()) / devices, 6))] * devices
        ids = np.full((num_tokens, k), -1)
        for c in range(k):
            homeless = []
            for t in np.flatnonzero(valid):
                left = [-np.inf if e in ids[t, :c] else logits[t, e] for e in range(num_experts)]
                want = largest(left, 1)[0]
                if want < 0:
                    continue
                if free[want // size] > 0:
                    free[want // size] -= 1
                    ids[t, c] = want
                else:
                    homeless.append((t, left))
            for t, left in homeless:
                there = next((d for d in range(devices) if free[d] > 0), None)
                if there is not None:
                    free[there] -= 1
                    ids[t, c] = largest(
                        [v if e // size == there else -np.inf for e, v in enumerate(left)], 1
                    )[0]
        wanted = top_k(logits, valid, k)[0]
        return ids, ((wanted >= 0) & (ids < 0)).sum(axis=1)

    return grouped(one, groups, logits, valid)


def topology(logits, valid, k, nodes, share, groups):
    wanted = top_k(logits, valid, k)[0]
    scores = np.asarray(jax.nn.softmax(logits, axis=-1))
    size = logits.shape[1] // nodes

    def one(group, logits, valid, wanted, scores):
        node = group % nodes
        off = [(t, c) for t, c in np.argwhere(wanted >= 0) if wanted[t, c] // size != node]
        leaving = [(-scores[t, wanted[t, c]], c, t) for t, c in off]
        limit = math.floor(round(share * int((wanted >= 0).sum()), 6))
        allowed = np.tile(np.arange(logits.shape[1]) // size == node, (len(logits), 1))
        for _, c, t in sorted(leaving)[:limit]:
            allowed[t, wanted[t, c]] = True
        return top_k(np.where(allowed, logits, -np.inf), valid, k)

    return grouped(one, groups, logits, valid, wanted, scores)


def numeric_gradient(fn, x, step=1e-6, rows=None):
    """Central differences of a scalar function, f64.

    Args:
      rows: of which of the leading indices; None: of all.
    """
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        if rows is not None and index[0] not in rows:
            continue
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (fn(up) - fn(down)) / (2 * step)
    return gradient
