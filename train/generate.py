"""Text from a trained run: a key-value cache, and sampling with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.config_io import load_config
from train.data import load_tokenizer
from train.errors import ConfigError
from train.evaluate import restore_params
from train.fields import shown
from train.model import ModelSpec, product_precision
from train.reading import reading

_SHORTEST = 16  # tokens for which the first program is compiled


def sample(
    logits_V: jax.Array, key: jax.Array, *, temperature: float, top_k: int | None, top_p: float | None
) -> jax.Array:
    """Draw one token id.

    Args:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely tokens; None for all.
      top_p: only the smallest set of most likely tokens whose probabilities sum to at least this; None for all.
    """
    if temperature == 0:
        return jnp.argmax(logits_V)
    sorted_V, ids_V = jax.lax.top_k(logits_V / temperature, logits_V.shape[0] if top_k is None else top_k)
    if top_p is None:
        return ids_V[jax.random.categorical(key, sorted_V)]
    probabilities_V = jax.nn.softmax(sorted_V)
    # A token stays while those before it have not reached top_p; the first always stays.
    before_V = jnp.cumsum(probabilities_V) - probabilities_V
    kept_V = jnp.where((before_V < top_p) | (jnp.arange(ids_V.shape[0]) == 0), sorted_V, -jnp.inf)
    return ids_V[jax.random.categorical(key, kept_V)]


def generate_run(
    run_dir: str,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the prompt, then its continuation piece by piece, up to `max_tokens` or the end of the document.

    Attention goes to the last `data.sequence_length` tokens, so the text may be longer than that.

    Raises:
      ConfigError: not a run directory, no sound checkpoint, or an option out of range.
    """
    directory = Path(run_dir)
    config = load_config(directory / "config.yaml")
    tokenizer = load_tokenizer(directory)
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    if top_k is not None and not 1 <= top_k <= tokenizer.vocab_size:
        raise ConfigError("--top-k", top_k, f"must be between 1 and the vocabulary ({tokenizer.vocab_size})")
    _, params, _ = restore_params(directory, config, spec.abstract_params(None))
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)

    @partial(jax.jit, donate_argnums=1)
    def advance(params, cache, tokens_S, start, count, key):
        """Take in the first `count` tokens and draw the next; the others are padding.

        Padding writes into the cache at positions yet to come, which are overwritten before they are seen.
        """
        place = jnp.arange(tokens_S.shape[0], dtype=jnp.int32)
        segments = (place < count).astype(jnp.int32)
        with product_precision(config):
            model = spec.merge(params)
            hidden, _, _, cache = model(
                tokens_S[None], segments_BS=segments[None], positions_BS=(start + place)[None], cache=cache
            )
            last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
            # Rows of the embedding beyond the tokenizer's vocabulary stand for nothing.
            logits_V = model.logits(last)[0, 0, : tokenizer.vocab_size]
        return draw(logits_V, key), cache

    window = config.data.sequence_length
    # As in training: a document begins without a separator, which belongs to the end of the one before.
    with reading("--prompt", shown(prompt), "text for the run's tokenizer"):
        context = np.asarray(tokenizer.encode(prompt), np.int32)[-window:]
    if not len(context):
        raise ConfigError("--prompt", shown(prompt), "has no token in the run's tokenizer")
    cache = spec.merge(params).init_cache(1, window)
    decoder = tokenizer.decoder()
    yield prompt
    key = jax.random.key(seed)
    # Few different lengths, so that the program of an earlier prompt can be used again.
    padded = np.zeros(min(max(_SHORTEST, 1 << (len(context) - 1).bit_length()), window), np.int32)
    padded[: len(context)] = context
    token, cache = advance(params, cache, jnp.asarray(padded), 0, len(context), key)
    end = len(context) + max_tokens - 1
    for position in range(len(context), end + 1):
        if int(token) == tokenizer.separator:
            break
        yield decoder.push(int(token))
        if position < end:
            key = jax.random.fold_in(key, position)
            token, cache = advance(params, cache, token[None].astype(jnp.int32), position, 1, key)
    yield decoder.finish()
