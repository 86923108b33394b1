"""``ways``: the same files through nbfeat and through other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from tests.benchmarks.child import Child, compiler, keras_child, torch_child
from tests.benchmarks.limit import Limit, Ours
from tests.benchmarks.rounds import Found, MissingError, in_rounds, progress, why
from tests.benchmarks.setting import Setting, titled, weights_of
from tests.benchmarks.table import Row, Table, rate, share, times

LOOP = "tutorial loop: `load_img`, `model.predict`, one image at a time"
HEAD = ("way", "images/s", "× tutorial loop", "of the limit")
LIMIT = "limit, {}"


class Counts(NamedTuple):
    """How many images each kind of way is measured with: slow ones need no more."""

    loop: int
    single: int
    batches: int  # of 32
    ours: int


COUNTS = {
    "MobileNetV2": Counts(24, 48, 4, 480),
    "ResNet50": Counts(16, 24, 2, 240),
    "VGG16": Counts(12, 12, 1, 160),
}
QUICK = Counts(4, 4, 1, 32)
Way = Callable[[], float]


def tables(setting: Setting) -> Iterator[Table]:
    """Measure each backbone."""
    for backbone, counts in COUNTS.items():
        progress(f"ways: {backbone}")
        keras, torch = keras_child(), torch_child(setting.folder)
        try:
            yield measured(setting, backbone, QUICK if setting.quick else counts, keras, torch)
        finally:
            keras.close()
            torch.close()


def measured(setting: Setting, backbone: str, counts: Counts, keras: Child, torch: Child) -> Table:
    """Measure one backbone in every way."""
    files = setting.files[: counts.ours]
    ways = {
        **with_keras(keras, files, backbone, counts),
        **with_torch(torch, files, backbone, counts),
        **with_nbfeat(files, backbone),
    }
    rows = shown(in_rounds(ways, setting.rounds), list(ways))
    return Table(f"From files to features: {titled(backbone)}", HEAD, rows, note(setting, counts, torch))


def note(setting: Setting, counts: Counts, torch: Child) -> str:
    """Say what was measured, and with what."""
    if torch.told:
        with_what = f"PyTorch {torch.told['torch']} with {torch.told['networks']}, random weights, as fast as others."
    else:
        with_what = "PyTorch's ways need torch, and timm or torchvision, in the Python that NBFEAT_TORCH_PYTHON names."
    return (
        f"JPEGs of 500 × 375: {min(counts.ours, len(setting.files))} through nbfeat, {32 * counts.batches} in batches, "
        f"{counts.loop} through the tutorial loop, {counts.single} one at a time through PyTorch. "
        f"Medians of {setting.rounds} round{'s' * (setting.rounds > 1)}. {with_what} nbfeat's networks are on disk; "
        "opening them and attaching columns are in the whole run alone. Limit: cores ÷ (processor seconds per image of "
        "nbfeat's decoding, plus of its network); each way is compared with that of its precision."
    )


def with_keras(keras: Child, files: list[str], backbone: str, counts: Counts) -> dict[str, Way]:
    """Return what is done with Keras on TensorFlow."""
    rated = partial(keras.rate, backbone=backbone, weights=weights_of(backbone))
    return {
        LOOP: partial(rated, "tutorial", files[: counts.loop], first=2),
        "Keras `predict`, batches of 32": partial(rated, "batches", files[: 32 * counts.batches]),
    }


def with_torch(torch: Child, files: list[str], backbone: str, counts: Counts) -> dict[str, Way]:
    """Return what is done with PyTorch."""
    few, many = files[: counts.single], files[: 32 * counts.batches]
    batches = partial(torch.rate, "batches", many, backbone=backbone)
    return {
        "img2vec's way, one image at a time": partial(torch.rate, "img2vec", few, backbone=backbone, first=2),
        "embetter's way, one image at a time": partial(torch.rate, "embetter", few, backbone=backbone, first=2),
        "PyTorch, batches of 32, float32": partial(batches, precision="float32", compiled=False),
        "PyTorch, batches of 32, bfloat16 autocast": partial(batches, precision="bfloat16", compiled=False),
        "PyTorch, batches of 32, bfloat16 autocast, compiled": partial(compiled, batches),
    }


def compiled(batches: Callable[..., float]) -> float:
    """Measure what PyTorch compiles, where it can."""
    if compiler() is None:
        raise MissingError("not installed: a C++ compiler")
    return batches(precision="bfloat16", compiled=True)


def with_nbfeat(files: list[str], backbone: str) -> dict[str, Way]:
    """Return nbfeat in each precision, after the limit of that precision; a first run builds what is kept on disk."""
    ways: dict[str, Way] = {}
    auto = Ours(files, backbone, "auto")
    try:
        auto.steady()
        chosen = auto.precision
    except Exception as error:  # its row says so, and says it again
        progress(f"  nbfeat auto: {why(error)}")
        chosen = "float32"
    for asked, precision in (("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", chosen)):
        if precision in {"float32", "bfloat16"}:
            ways.setdefault(LIMIT.format(precision), Limit(files, backbone, precision).rate)  # type: ignore[arg-type]
        ours = Ours(files, backbone, asked)
        name = f"**nbfeat, auto** (here {chosen})" if asked == "auto" else f"nbfeat, {asked}"
        ways[name] = ours.steady
        if asked == "auto":
            ways[f"the same ({chosen}), the whole run"] = ours.whole
    return ways


def precision_in(way: str) -> str:
    """Return in which precision a way computes."""
    return "bfloat16" if "bfloat16" in way else "float16" if "float16" in way else "float32"


def shown(found: Found, ways: list[str]) -> list[Row]:
    """Turn what was measured into rows, limits last."""
    rows: list[Row] = []
    for way in sorted(ways, key=lambda way: way.startswith("limit")):
        if way in found.missing:
            rows.append((way, found.missing[way]))
            continue
        limit = LIMIT.format(precision_in(way))
        faster = times(found.ratio(way, LOOP)) if found.has(LOOP) else ""
        part = share(found.ratio(way, limit)) if found.has(limit) and way != limit else ""
        rows.append((way, rate(found.typical(way)), faster, part))
    return rows
