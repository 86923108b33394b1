"""``python -m nbfeat``: images → features → a cross-validated support-vector machine, offline, in under a minute."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nbfeat.errors import NbfeatError

if TYPE_CHECKING:
    import pandas as pd

# Digits are strokes, not objects, so also try an earlier layer.
BLOCKS = ("EfficientNetLite0", "EfficientNetLite0 --layer block3b_add")
SIZE = 64  # pixels, the size of the files


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and print what it does."""
    from nbfeat.explore.compare import compare
    from nbfeat.extraction.extraction import Extraction

    parser = argparse.ArgumentParser(prog="python -m nbfeat", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=600, help="how many digits to use, from 50 to 1,797")
    count = max(50, min(1797, parser.parse_args(arguments).images))
    with tempfile.TemporaryDirectory(prefix="nbfeat-demo-") as folder:
        digits = _write_digits(Path(folder), count)
        print(f"{len(digits):,} handwritten digits as image files, and a dataframe with their path and label.\n")
        try:
            result = Extraction(digits, *BLOCKS, images="path", size=SIZE)
            for step in result.steps():
                if step.note:
                    print(f"… {step.note}")
        except NbfeatError as error:
            print(error)
            return 1
        print(f"\n{result}\n\n{compare(result, 'label')}")
    print("\nNext: open a notebook, %load_ext nbfeat, and %extract YOUR_FRAME ResNet50 --images YOUR_COLUMN")
    return 0


def _write_digits(folder: Path, count: int) -> pd.DataFrame:
    import pandas as pd
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = []
    for number, (pixels, label) in enumerate(zip(data.images[:count], data.target[:count], strict=True)):
        path = folder / f"{number:04d}.png"
        image = Image.fromarray((255 - pixels * (255 / 16)).astype("uint8"))
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(path)
        rows.append({"path": str(path), "label": int(label)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(main())
