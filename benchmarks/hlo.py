"""Collectives in the text of a compiled module."""

import re
from collections import Counter

COLLECTIVE = (
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = r"(\w+)\[([\d,]*)\]"
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}


def lines_with_collectives(text: str) -> list[tuple[str, str]]:
    """``(kind, line)`` of each, in the text of a compiled module."""
    found = ((re.search(COLLECTIVE, line), line) for line in text.splitlines())
    return [(match[2], line) for match, line in found if match]


def collectives(text: str) -> "Counter[str]":
    """Operations and bytes of their results on a device, in the text of a compiled module."""
    found: Counter[str] = Counter()
    for shapes, _ in re.findall(COLLECTIVE, text):
        found["operations"] += 1
        for kind, sizes in re.findall(ARRAY, shapes):
            length = 1
            for size in filter(None, sizes.split(",")):
                length *= int(size)
            found["bytes"] += BYTES[kind] * length
    return found


def arrays(line: str) -> int:
    """How many arrays the collective in a line gives."""
    match = re.search(COLLECTIVE, line)
    return len(re.findall(ARRAY, match[1])) if match else 0
