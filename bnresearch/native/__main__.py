"""``python -m bnresearch.native``: what there is for this CPU, and compile it."""

import sys

from bnresearch.native import build


def main() -> int:
    """Prints what was found; 0 if there is a library here, else 1."""
    for name, find in (("oneDNN", build.find_onednn), ("compiler", build.find_compiler)):
        try:
            print(f"{name}: {' '.join(map(str, find()))}")
        except build.Missing as missing:
            print(f"{name}: {missing}")
    loaded = build.load()
    if isinstance(loaded, build.Missing):
        print(f"convolutions and BatchNorm: XLA's, because {loaded}")
        return 1
    print(f"convolutions (oneDNN {loaded.onednn}) and BatchNorm: {loaded.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
