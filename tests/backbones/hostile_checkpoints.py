"""What an attacker would write into a checkpoint; none of it may run, hang or take memory."""

from __future__ import annotations

import pickletools
import random
import struct
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.backbones.torch_files import (
    FORMATS,
    FOUR,
    MAGIC,
    ORDERED,
    REBUILD,
    START,
    Member,
    as_row,
    as_zip,
    call,
    listed,
    members,
    named,
    number,
    pickled,
    row,
    shape,
    state,
    storage,
    tensor,
    text,
    zipped,
)

GOOD = state({"w": tensor()})
PICKLE = pickled(GOOD)
MANY = 100_000
# A name to call, and what with; all but the last few would make the file called {canary}.
CALLS = (
    ("os", "system", "touch {canary}"),
    ("posix", "system", "touch {canary}"),
    ("subprocess", "getoutput", "touch {canary}"),
    ("builtins", "eval", "open({canary!r}, 'w')"),
    ("__builtin__", "eval", "open({canary!r}, 'w')"),
    ("builtins", "exec", "open({canary!r}, 'w')"),
    ("_io", "open", "{canary}"),
    ("timeit", "timeit", "open({canary!r}, 'w')"),
    ("pickle", "loads", "cos\nsystem\n(S'touch {canary}'\ntR."),
    ("torch.storage", "_load_from_bytes", "cos\nsystem\n(S'touch {canary}'\ntR."),
    ("builtins", "getattr", "system"),
    ("builtins", "__import__", "os"),
    ("importlib", "import_module", "os"),
    ("operator", "attrgetter", "system"),
    ("numpy._core.multiarray", "_reconstruct", "x"),
    ("torch", "load", "{canary}"),
    ("torch.hub", "load", "{canary}"),
    ("torch.nn.modules.linear", "Linear", "1"),
    ("collections", "OrderedDict.fromkeys", "x"),
    ("collections", "defaultdict", "x"),
    ("torch", "FloatStorage.__class__", "x"),
)


def calls(canary: Path) -> dict[str, bytes]:
    """Return values that call something, in each of the ways a pickle can, and where a state dict might have them."""
    found = dict[str, bytes]()
    for module, name, argument in CALLS:
        word = text(argument.format(canary=str(canary)))
        callee, line = named(module, name), f"{module}\n{name}\n".encode()
        found |= {
            f"{module}.{name} by GLOBAL": call(callee, word),
            f"{module}.{name} by STACK_GLOBAL": call(text(module) + text(name) + b"\x93", word),
            f"{module}.{name} by INST": b"(" + word + b"i" + line,
            f"{module}.{name} by OBJ": b"(" + callee + word + b"o",
            f"{module}.{name} by NEWOBJ": callee + row(word) + b"\x81",
            f"{module}.{name} by NEWOBJ_EX": callee + row(word) + b"}\x92",
            f"{module}.{name} as itself": callee,
        }
    system = call(named("os", "system"), text(f"touch {canary}"))
    return found | {
        "a call among hooks": state({"w": tensor(more=b"\x89" + system)}),
        "a call as metadata": GOOD + b"}" + text("_metadata") + system + b"sb",
        "a call as a key": call(ORDERED) + b"(" + system + tensor() + b"u",
        "a call as a storage": state({"w": tensor(storage(key=system))}),
        "a class's state": named("torch", "FloatStorage") + b"}" + text("__setstate__") + named("os", "system") + b"sb",
        "state of a class": named("torch", "FloatStorage") + b"}b",
        "state of a tensor": state({"w": tensor() + b"}b"}),
        "an extension": b"\x82\x01" + row(text("x")) + b"R",
        "a called text": call(text("os.system"), text(f"touch {canary}")),
        "a called storage": call(named("torch", "FloatStorage"), number(1)),
        "a called dict": call(ORDERED, listed(row(text("a"), text("b"), text("c")))),
        "a name of lists": b"]]\x93",
        "a persistent id in text": b"Pos.system\n.",
        "a module, as PyTorch 1 kept": row(text("module"), named("os", "system"), text("a"), text("b")) + b"Q",
    }


def sizes() -> dict[str, bytes]:
    """Return values that say they are huge."""
    most = b"\xff\xff\xff\x7f"
    return {
        "LONG4": b"\x8b" + most + b"1",
        "BINUNICODE": b"X" + b"\xff" * 4 + b"1",
        "BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f1",
        "BINBYTES": b"B" + b"\xff" * 4 + b"1",
        "BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f1",
        "BYTEARRAY8": b"\x96" + b"\xff" * 4 + b"\0" * 4 + b"1",
        "BINSTRING": b"T" + most + b"1",
        "BINSTRING below zero": b"T" + b"\xff" * 4 + b"1",
        "FRAME": b"\x95" + b"\xff" * 8 + b"]",
        "LONG of digits": b"L" + b"9" * 100_000 + b"L\n",
        "INT of digits": b"I" + b"9" * 100_000 + b"\n",
        "a line without end": b"c" + b"a" * 1_000_000,
        "LONG_BINPUT": b"]r" + most + b"j" + most + b"a",
        "LONG_BINPUTs": b"]" + b"".join(b"r" + struct.pack("<I", place << 12) for place in range(MANY)),
        "a memo that was never made": b"j" + most,
        "PUT in text": b"]p2147483647\n",
    }


def laughs() -> dict[str, bytes]:
    """Return values that grow when they are counted, hashed, compared, copied or printed."""
    tree = b")" + b"q\0h\0\x86" * 60  # a pair of a pair of a pair, each twice the same
    long = b"(" + b"K\1" * MANY + b"tq\0"
    long_call = b"(" + storage() + number(0) + shape(4) + shape(1) + b"N" * MANY + b"tq\0"
    pairs = b"](" + b"".join(listed(text(str(place)), b"N") for place in range(20_000)) + b"eq\0"
    same_hash = b"".join(number(place * ((1 << 61) - 1)) + b"N" for place in range(MANY))
    return {
        "POP": b"]]0",
        "a doubled tuple": tree,
        "a doubled tuple as a key": b"}" + tree + b"Ns",
        "a doubled tuple as a name": tree + tree + b"\x93",
        "a doubled tuple as pairs": ORDERED + b"](" + tree + tree + b"e\x85R",
        "a doubled tuple as a tensor": state({"w": tree}),
        "a doubled tuple as arguments": ORDERED + tree + b"R",
        "a doubled tuple as an axis": state({"w": tensor(size=row(tree))}),
        "a doubled tuple as an id": tree + b"Q",
        "a doubled tuple as hooks": state({"w": tensor(more=tree + tree + tree)}),
        "DUP": b"]" + b"2" * MANY + b"t",
        "marks": b"(" * MANY,
        "lists": b"]" * 490_000,
        "dicts that are remembered": b"}\x94" * 245_000,
        "ever more dicts": b"}" * (3 << 20),
        "lists in lists": b"]" * MANY + b"a" * (MANY - 1),
        "tuples in tuples": b")" + b"\x85" * MANY,
        "dicts in dicts": (b"}" + text("a")) * MANY + b"}" + b"s" * MANY,
        "a list in itself": b"]q\0h\0a",
        "a dict in itself": b"}q\0" + text("state_dict") + b"h\0s",
        "a dict in itself, as a tensor": state({"w": b"}q\0" + text("w") + b"h\0s"}),
        "one long tuple as shapes": b"(" + long + tensor(size=b"h\0", stride=b"h\0") * 1000 + b"t",
        "one long tuple as arguments": b"(" + long + (REBUILD + b"h\0R") * 1000 + b"t",
        "one long tuple as arguments that fit": b"(" + long_call + (REBUILD + b"h\0R") * 1000 + b"t",
        "one long tuple as ids": b"(" + long + b"h\0Q" * 1000 + b"t",
        "one list as many dicts": b"(" + pairs + (ORDERED + b"h\0\x85R") * 10_000 + b"t",
        "keys of one hash": b"}(" + same_hash + b"u",
        "one long key of storages": b"(" + text("1" * 1_000_000) + b"q\0" + tensor(storage(key=b"h\0")) * 1000 + b"t",
        "astral text": b"(" + text("\N{GRINNING FACE}" + "a" * 3_900_000) + b"t",
        "numbers of 255 bytes": b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 16_000 + b"t",
        "no end": b"]",
        "an empty stack": b"0",
        "pops below a mark": b"](a",
        "a mark left": b"](",
        "a mark never set": b"]e",
        "a dict of one": b"}(Nu",
        "items in a list": b"]" + text("a") + b"Ns",
        "values left": b"]]]",
        "text that is not UTF-8": b"U\1\xff",
        "keys of bytes": b"}(G\0\0\0\0\0\0\0\0Nu",
    }


def tensors() -> dict[str, bytes]:
    """Return state dicts whose tensors cannot be, or would be larger than their storages."""
    big = 1 << 62
    found = {
        "offset": tensor(offset=number(1)),
        "offset below zero": tensor(offset=number(-1)),
        "huge offset": tensor(offset=number(big << 8)),
        "too long": tensor(size=shape(5)),
        "below zero": tensor(size=shape(-4)),
        "two below zero": tensor(size=shape(-2, -2), stride=shape(2, 1)),
        "huge": tensor(size=shape(big)),
        "product of 2 ** 64": tensor(size=shape(1 << 32, 1 << 32), stride=shape(0, 0)),
        "empty and huge": tensor(size=shape(0, big, big), stride=shape(1, 1, 1)),
        "stride": tensor(stride=shape(2)),
        "stride below zero": tensor(offset=number(3), stride=shape(-1)),
        "huge stride": tensor(size=shape(2), stride=shape(big)),
        "stride of 2 ** 64": tensor(size=shape(2), stride=shape(1 << 64)),
        "expanded": tensor(size=shape(1 << 30), stride=shape(0)),
        "expanded a little": tensor(size=shape(2, 4), stride=shape(0, 1)),
        "axes": tensor(size=shape(*[1] * 65), stride=shape(*[1] * 65)),
        "axes and strides": tensor(stride=shape(1, 1)),
        "float axis": tensor(size=row(b"G" + struct.pack(">d", 4))),
        "bool axis": tensor(size=row(b"\x88")),
        "bool stride": tensor(stride=row(b"\x88")),
        "text axis": tensor(size=row(text("4"))),
        "list of axes": tensor(size=listed(number(4))),
        "no storage": call(REBUILD, text("0"), number(0), shape(4), shape(1), b"\x89", b"N"),
        "conjugated": tensor(more=b"\x89" + call(ORDERED) + b"}" + text("conj") + b"\x88s"),
        "few arguments": call(REBUILD, storage()),
        "another storage": tensor(storage(key=text("1"))),
        "a storage of no number": tensor(storage(key=text("../0"))),
        "another count": tensor(storage(count=number(5))),
        "count below zero": tensor(storage(count=number(-4))),
        "huge count": tensor(storage(count=number(big)), size=shape(big)),
        "another kind": tensor(storage("Double")),
        "unknown kind": tensor(storage("QInt8")),
        "a view of a storage": tensor(storage(more=row(text("1"), number(0), number(4)))),
        "a storage": storage(),
        "a storage by number": row(text("storage"), number(1), text("0"), text("cpu"), number(4)) + b"Q",
        "a number": number(1),
        "None": b"N",
        "a state dict in it": GOOD,
    }
    return {f"a tensor: {name}": state({"w": value}) for name, value in found.items()} | {
        "two kinds of one storage": state({"w": tensor(), "v": tensor(storage("Int"))}),
        "no tensors": state({}),
        "a list of tensors": listed(tensor()),
        "a tensor": tensor(),
        "a numbered tensor": state([(number(1), tensor())]),
        "a state dict beside a number": state({"epoch": number(1), "weights": GOOD}),
        "an odd name": state([(text("\x1b[31m\r\n" * 1000), number(1))]),
    }


def views(count: int = 3000) -> bytes:
    """Return a zip whose tensors are views of one storage, all but one byte of it, and together far larger."""
    data = b"\1" * 1_000_000
    stored = storage("Byte", count=number(len(data)))
    many = {f"w{start}": tensor(stored, number(start), shape(len(data) - count), shape(1)) for start in range(count)}
    return as_zip(state(many), data)


def zips() -> dict[str, bytes]:
    """Return zips that are not what they seem."""
    good = members(PICKLE, FOUR)
    first, second, third = good[:3]
    inner = Member("archive/data/1", FOUR)
    outer = Member("archive/data/0", FOUR * 8 + inner.header(0) + FOUR)
    inside = len(outer.header(0)) + len(FOUR) * 8
    bomb = zlib.compress(b"\0" * 50_000_000)[2:-4]
    name = "archive/data/0"
    paths = ("../data.pkl", "/data.pkl", "archive/../data.pkl", "..\\data.pkl", "archive/data/../../x", "archive/data/",
             "archive/\0/data/1", "archive/code/__torch__.py", "archive/constants.pkl", "other/data/1",
             "archive/data/1x", "archive//data.pkl", "c:\\x\\data.pkl", "archive/data/" + "1" * 60_000, "")  # fmt: skip

    def with_third(**odd: Any) -> bytes:
        return zipped(first, second, replace(third, **odd), *good[3:])

    return {f"a member called {path[:40]!r}": zipped(*good, Member(path, b"x")) for path in paths} | {
        "a compressed member": with_third(data=zlib.compress(FOUR)[2:-4], method=8, size_before=len(FOUR)),
        "a bomb": with_third(data=bomb, method=8, size_before=50_000_000),
        "a bomb that says it is stored": with_third(data=bomb, size_before=50_000_000),
        "a bomb in place of the pickle": zipped(replace(first, data=bomb, method=8, size_before=1 << 30), *good[1:]),
        "an encrypted member": with_third(flags=0x0809),
        "a masked member": with_third(flags=0x2808),
        "a larger member": with_third(size=len(FOUR) + 4),
        "a huge member": with_third(size=0xFFFF_FFF0),
        "a zip64 member": with_third(size=0xFFFF_FFFF),
        "a member beyond the end": with_third(start=0xFFFF_FF00),
        "a member in the table": with_third(start=len(zipped(*good)) - 200),
        "a member at the start": with_third(start=0),
        "another checksum": with_third(checksum=1),
        "another name inside": with_third(other_name="archive/data/1"),
        "a longer name inside": with_third(other_name="archive/data/archive/data/0"),
        "a member twice": zipped(*good, third),
        "a member in a member": zipped(outer, replace(inner, start=inside), first),
        "a member that is said to be another": zipped(*good, Member("archive/data/1", FOUR, start=0)),
        "nested members": zipped(replace(first, data=PICKLE + zipped(third)), *good[1:]),
        "many members of the same bytes": zipped(
            *good, *(Member(f"archive/data/{place}", FOUR, start=0) for place in range(1, 1000))
        ),
        "no pickle": zipped(*good[1:]),
        "no storage": zipped(*good[:2]),
        "no members": zipped(),
        "many members, said": zipped(*good, count=0xFFFF),
        "a table beyond the end": zipped(*good, start=0xFFFF_FFFF),
        "a table elsewhere": zipped(*good, start=4),
        "a comment": zipped(*good, comment=b"PK\5\6"),
        "bytes before it": b"PK\3\4" + zipped(*good),
        "big-endian numbers": zipped(*members(PICKLE, FOUR, byteorder=b"big")),
        "a huge order of bytes": zipped(*members(PICKLE, FOUR, byteorder=b"little" * 1_000_000)),
        "a huge pickle": zipped(*members(PICKLE + b"." * (5 << 20), FOUR)),
        "an empty pickle": zipped(*members(b"", FOUR)),
        "a long table": zipped(*good[1:], *(Member(f"archive/data/{place}", b"") for place in range(1, 10_000))),
        "a long storage": as_zip(GOOD, FOUR * 2),
        "a short storage": as_zip(GOOD, FOUR[:-1]),
        "views": views(),
        name: b"PK\3\4",
    }


def rows() -> dict[str, bytes]:
    """Return checkpoints from before PyTorch 1.6 that are not what they seem."""
    whole = as_row(GOOD, (4, FOUR))
    return {
        "another magic": whole.replace(MAGIC, pickled(number(1))),
        "another version": whole.replace(pickled(number(1001)), pickled(number(1000))),
        "a bomb as magic": b"\x80\x02" + b"(" * 100 + b".",
        "a call as magic": b"\x80\x02cos\nsystem\n.",
        "protocol 0": b"\x80\x00L119547037146038801333356L\n.",
        "big-endian": as_row(GOOD, (4, FOUR), little=b"\x89"),
        "endian as text": as_row(GOOD, (4, FOUR), little=text("yes")),
        "no keys": as_row(GOOD, (4, FOUR), keys=b"]"),
        "keys that double": as_row(GOOD, (4, FOUR), keys=listed(b")" + b"q\0h\0\x86" * 60)),
        "keys of None": as_row(GOOD, (4, FOUR), keys=b"N"),
        "keys of lists": as_row(GOOD, (4, FOUR), keys=listed(b"]")),
        "other keys": as_row(GOOD, (4, FOUR), keys=listed(text("1"))),
        "one key a million times": as_row(GOOD, (4, FOUR), keys=b"](" + text("0") + b"q\0" + b"h\0" * 200_000 + b"e"),
        "another count": as_row(GOOD, (3, FOUR)),
        "count below zero": as_row(GOOD, (-4, FOUR)),
        "a huge count": as_row(state({"w": tensor(storage(count=number(1 << 47)))}), (1 << 47, FOUR)),
        "no storages": as_row(GOOD, (4, FOUR))[: -len(FOUR) - 8],
        "only the magic": MAGIC,
        "a keyed call": as_row(GOOD, (4, FOUR), keys=call(named("os", "system"), text("true"))),
    }


def heavy() -> dict[str, bytes]:
    """Return checkpoints that are nothing wrong with, but as much work as can be."""
    first = tensor(size=row(*[b"K\1"] * 32), stride=row(*[b"K\1"] * 32))
    names = b"".join(text(f"{place:x}") + b"h\0" for place in range(240_000))
    bytes_ = storage("Byte", count=number(1 << 16))
    parts = bytes_ + b"q\1" + b"K\0" + row(*[b"K\1"] * 32) + b"q\2" + row(*[number((1 << 47) + 1)] * 32) + b"q\3"
    folded = b"}" + text("x") + REBUILD + b"q\0(" + parts + b"\x89NtRs("
    for start in range(1, 28_000):
        folded += text(f"{start:x}") + b"h\0(h\1" + number(start) + b"h\2h\3\x89NtR"
    views = {f"{start:x}": tensor(bytes_, number(start), shape(1)) for start in range(9000)}
    storages = {f"{key:x}": tensor(storage("Byte", text(str(key)), b"K\1"), b"K\0", shape(1)) for key in range(9000)}
    brain = state({"w": tensor(storage("BFloat16", count=number(1 << 23)), size=shape(1 << 23))})
    turned = tensor(storage(count=number(1 << 22)), size=shape(1 << 11, 1 << 11), stride=shape(1, 1 << 11))
    return {
        "many names of one tensor": as_zip(b"}" + text("x") + first + b"q\0s(" + names + b"u", FOUR),
        "many views of one storage": as_zip(state(views), bytes(1 << 16)),
        "many views of many axes": as_zip(folded + b"u", bytes(1 << 16)),
        "many storages": as_zip(state(storages), *[b"1"] * 9000),
        "many storages (row)": as_row(state(storages), *[(1, b"1")] * 9000),
        "many members": zipped(*members(PICKLE, FOUR, *[b""] * 64_000)),
        "bfloat16": as_zip(brain, bytes(1 << 24)),
        "transposed": as_zip(state({"w": turned}), bytes(1 << 24)),
    }


def everything(canary: Path) -> dict[str, bytes]:
    """Return every hostile file by name; values are put in both formats, the largest in one."""
    values, large = calls(canary) | tensors(), sizes() | laughs()
    inside = {f"{name} ({kind})": make(value) for name, value in values.items() for kind, make in FORMATS.items()}
    return (
        inside
        | {name: FORMATS["zip"](value) for name, value in large.items()}
        | zips()
        | {f"{name} (row)": data for name, data in rows().items()}
    )


_PIECES = (
    *(bytes([step]) for step in b"]})(N\x88\x89t\x85\x86\x87aesubRQ\x93\x94"),
    *(b"q\0 q\1 h\0 h\1 h\2 K\4 J\xff\xff\xff\xff".split(b" ")),
    *(b"r\0\0\0\1", b"M\0\1", b"G\0\0\0\0\0\0\0\0"),
    *map(text, ("a", "0", "storage", "state_dict", "cpu")),
    *(number(1 << 70), shape(4), shape(2, 2), row(), ORDERED, REBUILD, named("torch", "FloatStorage"), call(ORDERED)),
    *(named("torch._utils", "_rebuild_parameter"), storage(), tensor(), GOOD),
)


def _steps(value: bytes) -> list[bytes]:
    starts = [at for _, _, at in pickletools.genops(pickled(value)) if at is not None]
    return [pickled(value)[start:end] for start, end in pairwise(starts)][1:]


_VIEWS = {
    "w": tensor(),
    "v": tensor(size=shape(2, 2), stride=shape(2, 1)),
    "u": tensor(offset=number(2), size=shape(2)),
    "p": call(named("torch._utils", "_rebuild_parameter"), tensor(), b"\x88", b"N"),
}
_RICH = state({"state_dict": state(_VIEWS), "epoch": number(1)}) + b"}" + text("_metadata") + state({}) + b"sb"


def program(chance: random.Random) -> bytes:
    """Return a good checkpoint, of a random format, in whose pickle a few steps were replaced, put in or left out."""
    steps = _steps(_RICH)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(steps))
        steps[at : at + chance.randrange(2)] = chance.choices((*_PIECES, *steps), k=chance.randrange(3))
    return FORMATS[chance.choice(("zip", "row"))](b"".join(steps))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with a few bytes changed, taken out, doubled, or replaced by ones that matter to pickles."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(len(changed))
        match chance.randrange(6):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                changed[at] ^= 1 << chance.randrange(8)
            case 2:
                changed[at] = chance.choice(START + b"(.]}tuesRbQhqrjcXUTKMJGN\x85\x86\x87\x8a\x93\x94\x95\xff\x7f\0")
            case 3:
                del changed[at : at + chance.randrange(1, 9)]
            case 4:
                changed[at:at] = changed[at : at + chance.randrange(1, 40)]
            case _:
                changed[at : at + 4] = struct.pack("<i", chance.choice((-1, 0, 1 << 30, (1 << 31) - 1)))
    return bytes(changed) or b"\0"
