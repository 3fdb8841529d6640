"""Which collectives of a compiled CPU program may run at the same time as those of a loop, see `moejax/order.py`."""

import re

COLLECTIVES = (
    "all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
)
NESTED = ("while", "call", "conditional")


def side_by_side(text: str) -> list[tuple[str, str]]:
    """Pairs (loop, collective or other loop) of a computation of which neither needs the other's results.

    Args:
      text: a compiled program.
    """
    computations = _parse(text)
    communicates: dict[str, bool] = {}

    def has_collectives(computation: str) -> bool:
        if computation not in communicates:
            communicates[computation] = any(
                opcode in COLLECTIVES or (opcode in NESTED and any(map(has_collectives, called)))
                for _, opcode, _, called in computations[computation]
            )
        return communicates[computation]

    found = []
    for instructions in computations.values():
        needs: dict[str, set[str]] = {}
        loops: list[str] = []
        others: list[str] = []
        for name, opcode, operands, called in instructions:
            needs[name] = set(operands).union(*(needs.get(operand, set()) for operand in operands))
            is_loop = opcode in NESTED and any(map(has_collectives, called))
            if is_loop or opcode in COLLECTIVES:
                found += [(loop, name) for loop in loops if loop not in needs[name]]
            if is_loop:
                found += [(name, other) for other in others if other not in needs[name]]
                loops.append(name)
            elif opcode in COLLECTIVES:
                others.append(name)
    return found


def loops_with_collectives(text: str) -> int:
    """Number of `while` loops whose body or condition, or what they call, communicates."""
    computations = _parse(text)

    def communicates(computation: str) -> bool:
        return any(
            opcode in COLLECTIVES or (opcode in NESTED and any(map(communicates, called)))
            for _, opcode, _, called in computations[computation]
        )

    return sum(
        opcode == "while" and any(map(communicates, called))
        for instructions in computations.values()
        for _, opcode, _, called in instructions
    )


def _parse(text: str) -> dict[str, list[tuple[str, str, list[str], list[str]]]]:
    """(name, opcode, operands, computations called) of every instruction, in order, by computation."""
    computations: dict[str, list[tuple[str, str, list[str], list[str]]]] = {}
    current: list[tuple[str, str, list[str], list[str]]] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations.setdefault(head[1], [])
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            name, rest = instruction.groups()
            if rest.startswith("("):
                rest = rest[_closing(rest) + 1 :]
            opcode, rest = re.match(r"[^(]*?([\w\-]+)(\(.*)$", rest).groups()
            end = _closing(rest)
            operands = re.findall(r"%([\w.\-]+)", rest[:end])
            attributes = rest[end:]
            called = re.findall(r"(?:condition|body|to_apply|calls)=%?([\w.\-]+)", attributes)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
                called += re.findall(r"[\w.\-]+", branches[1])
            current.append((name, opcode, operands, called))
    return computations


def _closing(text: str) -> int:
    """Where the parenthesis that the text begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    raise ValueError(f"no end of {text!r}")
