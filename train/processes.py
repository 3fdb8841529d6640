"""The processes of one run tell each other texts, through the coordinator, and do some things together."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from train.clock import now
from train.errors import ConfigError, FailedTogether, TrainingFailed
from train.fields import shown
from train.versions import version_of

COMPILE_SECONDS = 1800
"""How long a process waits for the others to compile."""
PIECE_SECONDS = 60
"""Longest single wait for the coordinator's answer."""

Number = TypeVar("Number", bool, int)

_meetings = itertools.count()


def versions() -> str:
    """The versions that must be alike in all processes, or their programs differ."""
    return ", ".join(f"{name} {version_of(name)}" for name in ("moejax", "jax", "jaxlib", "flax", "optax"))


def is_first() -> bool:
    """Whether this is the process that writes the run's files and shows its progress."""
    return jax.process_index() == 0


def from_first(value: Number) -> Number:
    """Process 0's `value`, in every process; all must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return type(value)(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def compile_together(function: Any, *arguments: Any) -> Callable[..., Any]:
    """The jitted `function`, compiled for these arguments (or their shapes) in every process before any goes on.

    On CPU a process that compiles half a minute longer than another is otherwise taken for lost: Gloo, which carries
    the collectives there, waits for no longer.
    """
    return function if jax.process_count() == 1 else compile_now(function, *arguments)


def compile_now(function: Any, *arguments: Any) -> Callable[..., Any]:
    """As `compile_together`, but here and now also where there is only one process."""
    compiled = function.lower(*arguments).compile()
    if jax.process_count() > 1:
        topic = new_topic("compiled")
        exchange_texts("", topic)
        tell_all("", topic)
    return compiled


def exchange_texts(mine: str, topic: str, seconds: float = COMPILE_SECONDS) -> list[str] | None:
    """Process 0 gets the text of every process, by number; the others get None. All must call, each topic once.

    Through the coordinator, not through devices: no collective can time out while one process is late, and processes
    whose programs differ can still say so. Also for use beside the main thread.
    """
    client, (me, count, _) = _client(), identity()
    if me:
        client.key_value_set(f"moejax/{topic}/{me}", mine)
        return None
    deadline = now() + seconds
    texts = [mine]
    for other in range(1, count):
        texts.append(_wait_for(f"moejax/{topic}/{other}", deadline))
        client.key_value_delete(f"moejax/{topic}/{other}")
    return texts


def tell_all(text: str, topic: str, seconds: float = COMPILE_SECONDS) -> str:
    """Process 0's text, in every process; all must call, with the same topic, once."""
    if identity()[0] == 0:
        _client().key_value_set(f"moejax/{topic}", text)
        return text
    return _wait_for(f"moejax/{topic}", now() + seconds)


def _wait_for(key: str, deadline: float) -> str:
    """The text of another process. Waits in pieces: a single wait would go on while this process is suspended."""
    while True:
        left = min(deadline - now(), PIECE_SECONDS)
        try:
            return _client().blocking_key_value_get(key, max(1, int(1000 * left)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or now() >= deadline:
                raise


def put(topic: str, text: str) -> None:
    """Leave a text of this process where all can read it; a later one replaces it."""
    _client().key_value_set(f"moejax/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def look(topic: str) -> dict[int, str]:
    """The texts that `put` has left under a topic, by process."""
    found = _client().key_value_dir_get(f"moejax/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


def identity() -> tuple[int, int, str]:
    """Number of this process, count of all, and host:port of the coordinator; known before jax has its devices."""
    state = _state()
    return state.process_id, state.num_processes, state.coordinator_address


def _client() -> Any:
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # jax has no public name for the coordinator's store

    return distributed.global_state


def new_topic(name: str) -> str:
    """A topic that has not been used; all processes must ask for the same ones in the same order."""
    return f"{name}/{next(_meetings)}"


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block in which one process alone may find bad input, or fail: then all end by its error. All must enter it.

    Of several processes that have an error, the one of the lowest number says how all of them end. Nothing in the block
    may wait for other processes.

    Raises:
      ConfigError: that process has refused its input.
      FailedTogether: it could not go on.
    """
    mine: ConfigError | TrainingFailed | OSError | None = None
    try:
        yield
    except (ConfigError, TrainingFailed, OSError) as error:
        if jax.process_count() == 1:
            raise
        mine = error
    if jax.process_count() == 1:
        return
    topic = new_topic("refusal")
    parts = [mine.field, str(mine.value), mine.rule] if isinstance(mine, ConfigError) else [str(mine)]
    everyone = exchange_texts(json.dumps(parts if mine else None), topic)
    refusals = [(number, json.loads(text)) for number, text in enumerate(everyone or [])]
    number, first = json.loads(
        tell_all(json.dumps(next((one for one in refusals if one[1]), (0, None))), topic)
    )
    if first is None:
        return
    is_mine = number == jax.process_index()
    if len(first) == 1:
        raise FailedTogether(first[0] if is_mine else f"process {number}: {first[0]}") from mine
    field, value, rule = first
    raise _everybodys(field, value, rule if is_mine else f"{rule} (seen by process {number})") from mine


def _everybodys(field: str, value: object, rule: str) -> ConfigError:
    error = ConfigError(field, value, rule)
    error.is_everybodys = True
    return error


def require_agreement(texts: Mapping[str, str]) -> None:
    """Compare what all processes must have alike; all must call.

    Args:
      texts: what is compared, by the name that an error gives it.

    Raises:
      ConfigError: in every process, naming the processes that differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    topic = new_topic("agreement")
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    everyone = exchange_texts(json.dumps(digests), topic)
    verdict = json.dumps(_differing([json.loads(one) for one in everyone]) if everyone else None)
    differing: dict[str, list[int]] = json.loads(tell_all(verdict, topic))
    for name, numbers in differing.items():
        mine = texts.get(name, "(no such field)")
        listed = ", ".join(map(str, numbers[:8])) + (" and more" if len(numbers) > 8 else "")
        rule = f"must be the same in every process, but that of process {listed} is not that of process 0"
        raise _everybodys(name, shown(f"{mine} in process {jax.process_index()}"), rule)


def _differing(everyone: list[dict[str, str]]) -> dict[str, list[int]]:
    """Name -> the processes whose entry is not that of process 0, for the names that have any.

    Processes of different releases may have different names.
    """
    names = dict.fromkeys(name for one in everyone for name in one)
    numbers = {
        name: [number for number, one in enumerate(everyone) if one.get(name) != everyone[0].get(name)]
        for name in names
    }
    return {name: found for name, found in numbers.items() if found}
