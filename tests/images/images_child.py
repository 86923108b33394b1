"""Extracts features of damaged images in a process of its own, and says what became of them as JSON.

`python -m tests.images.images_child FIRST COUNT` damages images of every format that is read; those of the same numbers
are damaged alike each time.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from nbfeat import Extraction
from nbfeat.inference import prepared
from tests.fake import FakeNetwork
from tests.memory import peak
from tests.mutations import mutated

SEED = 20_261_125
AT_ONCE = 100
LONGEST_REASON = 200


def images() -> dict[str, list[bytes]]:
    """Draw small images in every format that is read, in several ways of writing each."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    plain = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    modes = {mode: plain.convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")}
    modes["I;16"] = Image.fromarray(np.asarray(modes["L"]).astype(np.uint16) * 257)
    return {kind: [_written(kind, modes[mode], **how) for mode, how in ways] for kind, ways in _ways(plain).items()} | {
        "PSD": [_psd(modes["RGB"], packed=packed) for packed in (False, True)]
    }


def _ways(plain: Image.Image) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    more: dict[str, Any] = {"save_all": True, "append_images": [plain.transpose(Image.Transpose.ROTATE_180)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    packings = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate")
    return {
        "JPEG": [("RGB", {"exif": exif}), ("RGB", {"progressive": True}), ("L", {}), ("CMYK", {}),
                 ("RGB", {"subsampling": 0, "restart_marker_rows": 1})],
        "MPO": [("RGB", more)],
        "PNG": [("RGB", {"exif": exif}), ("RGBA", {}), ("P", {}), ("I;16", {}), ("1", {}), ("LA", {}), ("RGB", more)],
        "WEBP": [("RGB", {}), ("RGBA", {"lossless": True}), ("RGB", more)],
        "GIF": [("P", {}), ("P", {"interlace": 0}), ("RGB", more)],
        "BMP": [("RGB", {}), ("P", {}), ("1", {}), ("L", {})],
        "TIFF": [*(("RGB", {"compression": how}) for how in packings), ("1", {"compression": "group4"}), ("I;16", {}),
                 ("CMYK", {}), ("YCbCr", {}), ("RGB", {"big_tiff": True}), ("P", {}), ("RGBA", {})],
        "JPEG2000": [("RGB", {}), ("L", {"irreversible": True}), ("RGBA", {"no_jp2": True})],
        "AVIF": [("RGB", {"speed": 10}), ("RGBA", {"speed": 10}), ("RGB", {"speed": 10, **more})],
        "PPM": [("RGB", {}), ("L", {}), ("1", {})],
        "ICO": [("RGBA", {"sizes": [(32, 32), (16, 16)]}), ("RGB", {"sizes": [(32, 32)], "bitmap_format": "bmp"})],
        "PCX": [("RGB", {}), ("P", {}), ("1", {})],
        "QOI": [("RGB", {}), ("RGBA", {})],
        "TGA": [("RGB", {}), ("RGBA", {"compression": "tga_rle"}), ("P", {}), ("L", {"compression": "tga_rle"})],
    }  # fmt: skip


def _written(kind: str, image: Image.Image, **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def _psd(image: Image.Image, *, packed: bool) -> bytes:
    """Write what Pillow only reads."""
    width, height = image.size
    planes = [np.asarray(channel) for channel in image.split()]
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, len(planes), height, width, 8, 3) + bytes(12)
    if not packed:
        return head + bytes(2) + b"".join(plane.tobytes() for plane in planes)
    rows = [bytes([width - 1]) + row.tobytes() for plane in planes for row in plane]
    return head + b"\0\1" + struct.pack(f">{len(rows)}H", *map(len, rows)) + b"".join(rows)


def damaged(first: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged images of all formats in turn: each by its own number, whatever was asked for before it."""
    every = images()
    kinds = list(every)
    for number in range(first, first + count):
        chance = random.Random(SEED + number)
        kind = kinds[number % len(kinds)]
        data = mutated(chance.choice(every[kind]), chance)
        # A chunk whose checksum is wrong is not looked into.
        yield kind, _with_right_sums(data) if kind == "PNG" and chance.random() < 0.7 else data


def _with_right_sums(png: bytes) -> bytes:
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def main(first: int, count: int) -> None:
    """Extract features of the damaged images, and print what became of them."""
    faulthandler.enable()
    found: dict[str, Counter[str]] = {}
    odd: list[str] = []
    slowest = 0.0
    made = list(damaged(first, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "PreparedNetwork", FakeNetwork)
        for start in range(0, count, AT_ONCE):
            some = made[start : start + AT_ONCE]
            before = time.perf_counter()
            result = _extracted([data for _, data in some])
            slowest = max(slowest, time.perf_counter() - before)
            reasons = dict(zip(result.failures["position"], result.failures["reason"], strict=True))
            rows = result.features.to_numpy()
            for row, (kind, _) in enumerate(some):
                failed = row in reasons
                found.setdefault(kind, Counter())["failed" if failed else "decoded"] += 1
                if (failed and not is_a_sentence(reasons[row])) or np.isnan(rows[row]).any() != failed:
                    odd.append(f"{kind} {first + start + row}: {reasons.get(row)!r}")
    print(json.dumps({"found": found, "odd": odd, "slowest": slowest, "peak": peak()}))


def _extracted(images: list[bytes]) -> Extraction:
    whole = _written("PNG", Image.new("RGB", (8, 8)))  # where all images fail there is no result
    frame = pd.DataFrame({"image": [*images, whole]})
    return Extraction(frame, "MobileNet --size 32", images="image", cache=False).run()


def is_a_sentence(reason: str) -> bool:
    """Tell whether a reason is what is shown of a failure."""
    return 0 < len(reason) <= LONGEST_REASON and reason.isprintable() and reason[0] == reason[0].lower()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
