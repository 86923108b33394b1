"""Damage bytes as disks, networks and people do, and worse: the same damage for the same seed."""

from __future__ import annotations

import os
import random
import struct

TIMES = int(os.environ.get("NBFEAT_TEST_EXAMPLES", "1"))  # as many examples as usual
LENGTHS = (-1, 0, 1, 255, 65_535, 1 << 30, (1 << 31) - 1)  # numbers that lie about sizes


def mutated(data: bytes, chance: random.Random, head: int = 64) -> bytes:
    """Return other bytes than `data`: a few changed, cut out, put in, doubled or moved, half of them in the `head`."""
    changed = bytearray(data)
    while changed == data:
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            changed = _mutated_once(changed or bytearray(1), chance, head)
    return bytes(changed)


def _mutated_once(data: bytearray, chance: random.Random, head: int) -> bytearray:
    at = chance.randrange(min(len(data), head) if chance.random() < 0.5 else len(data))
    many = chance.choice((1, 2, 4, 16, 100, 1000))
    match chance.randrange(9):
        case 0:
            data[at] = chance.randrange(256)
        case 1:
            data[at] ^= 1 << chance.randrange(8)
        case 2:
            data[at : at + many] = chance.randbytes(len(data[at : at + many]))
        case 3:
            del data[at : at + many]
        case 4:
            data[at:at] = chance.randbytes(many)
        case 5:
            data[at:at] = data[at : at + many]
        case 6:
            there = chance.randrange(len(data))
            data[at : at + many] = data[there : there + len(data[at : at + many])]
        case 7:
            order = chance.choice("<>")
            data[at : at + 4] = struct.pack(f"{order}i", chance.choice(LENGTHS))
        case _ if chance.random() < 0.3:
            del data[at:]
        case _:
            data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    return data
