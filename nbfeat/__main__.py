"""``python -m nbfeat``: photographs → features → a cross-validated support-vector machine, offline, in 20 seconds."""

import argparse
import sys

import nbfeat

# Tiles show more texture than objects, so earlier layers do better; the first also finds copies.
BLOCKS = tuple(f"EfficientNetLite0{layer}" for layer in (" --layer block5c_add", "", " --layer block2b_add"))
SIZE = 64  # pixels
NEAR = 0.035  # the cosine distance within which tiles are copies, and not only of the same texture


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and print what it does."""
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")  # a terminal may lack arrows and ellipses
    parser = argparse.ArgumentParser(prog="python -m nbfeat", description=__doc__)
    parser.add_argument("folder", nargs="?", help="photographs of your own, in one subfolder per class")
    chosen = parser.parse_args(arguments).folder
    try:
        photos = nbfeat.folder(chosen) if chosen else nbfeat.sample_photos()
        print(f"{len(photos):,} photographs, {photos['label'].nunique()} classes:\n\n{photos.head(3).to_string()}\n")
        result = nbfeat.Extraction(photos, *BLOCKS, images="path", size=SIZE)
        for step in result.steps():
            if step.note:
                print(f"… {step.note}")
        print(f"\n{result}\n\n{nbfeat.compare(result, 'label')}\n")
        print(nbfeat.duplicates(result, NEAR, features=result.parts[0].prefix))
    except nbfeat.NbfeatError as error:
        print(error if chosen else f"{error} Or name a folder of photographs of yours: python -m nbfeat FOLDER")
        return 1
    print("\nNext: open a notebook, %load_ext nbfeat, and %extract YOUR_FRAME ResNet50 --images YOUR_COLUMN")
    return 0


if __name__ == "__main__":
    sys.exit(main())
