"""Damage to valid files: blind (bits, cuts, splices) and, for JSON and YAML, of their structure."""

import contextlib
import copy
import json
import random

import yaml

# What readers trip over, put in anywhere.
TOKENS = [
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r\n",
        b"\n\n",
        b"\x85",
        b"\xe2\x80\xa8",
        b'"',
        b"\\u",
    ),
    *(b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"-1", b"null", b"true", b"[]", b"{}", b"0x" + b"f" * 6000),
    *(
        b"9" * 5000,
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"- " * 3000,
        b"{a: " * 3000,
        b"\xff\xfe",
        b"%s",
        b"A" * 70_000,
    ),
    *(
        b"&a ",
        b"*a",
        b"!!python/object:os.system {}",
        b"!!binary ",
        b"!!set ",
        b"!!timestamp 2020-99-99",
        b"? ",
        b"<<: ",
    ),
    *(
        b"1:30",
        b"2020-13-45",
        b".inf",
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n",
        b"#",
        b"\t",
        b"../../x",
        b"/dev/zero",
    ),
]
BOMB = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("l"))
)
NUMBERS = [0, 1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        2**24 - 2,
        2**31 - 2,
        2**31,
        2**63,
        -(2**64),
        10**400,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "\0",
        "\ud800",
        "x" * 5000,
        "~nosuchuser",
        "[UNK]",
        [],
        {},
        [[]],
        {"": None},
        [1, "a", None],
        {"type": "BPE"},
    ),
]


def mutate(rng: random.Random, seeds: list[bytes], structure: str | None) -> bytes:
    """One damaged file, made of one of the valid ones.

    Args:
      structure: `json`, `jsonl` or `yaml`, where the files have one.
    """
    content = rng.choice(seeds)
    structural = structure is not None and rng.random() < 0.6
    if structural:
        content = _STRUCTURAL[structure](rng, content)
    for _ in range(rng.choice([0, 0, 1]) if structural else rng.choice([1, 1, 2, 4, 16])):
        content = rng.choice(_BLIND)(rng, content, seeds)
    if structure == "yaml" and rng.random() < 0.02:
        content += BOMB
    return content


def _place(rng: random.Random, content: bytes) -> int:
    return rng.randrange(len(content) + 1)


def _flip(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    if not content:
        return content
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def _overwrite(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    place, width = _place(rng, content), rng.choice([1, 2, 4, 8])
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(["little", "big"]))
    return content[:place] + number + content[place + width :]


def _cut(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    return content[: _place(rng, content)]


def _remove(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    begin, end = sorted((_place(rng, content), _place(rng, content)))
    return content[:begin] + content[min(end, begin + rng.choice([1, 4, 64, 4096])) :]


def _repeat(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    begin, end = sorted((_place(rng, content), _place(rng, content)))
    return content[:end] + content[begin:end] * rng.choice([1, 2, 5]) + content[end:]


def _splice(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    other = rng.choice(seeds)
    return content[: _place(rng, content)] + other[_place(rng, other) :]


def _insert(rng: random.Random, content: bytes, seeds: list[bytes]) -> bytes:
    place = _place(rng, content)
    return content[:place] + rng.choice(TOKENS) + content[place:]


_BLIND = [_flip, _flip, _overwrite, _cut, _remove, _repeat, _splice, _insert]


def _change_tree(rng: random.Random, tree):
    """The tree with one to three of its nodes replaced, removed, doubled, wrapped or exchanged."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return _value(rng)
        holder, key = rng.choice(places)
        action = rng.randrange(6)
        if action <= 1:
            holder[key] = _value(rng)
        elif action == 2:
            del holder[key]
        elif action == 3:
            for _ in range(rng.choice([1, 30, 150])):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"type": holder[key]}
        elif action == 4:
            other, at = rng.choice(places)
            holder[key] = (
                json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
            )
        elif isinstance(holder, dict):
            holder[rng.choice(["", "type", str(key) + "x", "text"])] = holder.pop(key)
        else:
            holder.insert(key, _value(rng))
    return tree


def _value(rng: random.Random):
    return copy.deepcopy(rng.choice(VALUES))


def _places(tree):
    """(holder, key) of every node."""
    entries = list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    )
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def _json(rng: random.Random, content: bytes) -> bytes:
    text = json.dumps(_change_tree(rng, json.loads(content)), ensure_ascii=rng.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def _jsonl(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _json(rng, lines[number])
    return b"\n".join(lines) + rng.choice([b"\n", b""])


def _yaml(rng: random.Random, content: bytes) -> bytes:
    tree = _change_tree(rng, yaml.safe_load(content))
    with contextlib.suppress(RecursionError):  # PyYAML cannot write what is nested so deeply
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=rng.random() < 0.2).encode(
            "utf-8", "replace"
        )
    return content


_STRUCTURAL = {"json": _json, "jsonl": _jsonl, "yaml": _yaml}
