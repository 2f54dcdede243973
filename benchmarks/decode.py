"""JPEGs of ImageNet's sizes to pixels, and to views of 224x224, on one core, by several libraries.

A view is what a stream makes of a picture in training: decoded, cut at random, resized. All sides
decode the same pictures and cut at the same places, and all but the reduced one resize as streams
do. Seconds are those of the processor, of all threads together. Differences are those of the
decoded pixels from Pillow's, of 255.
"""

import importlib.metadata
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.jpegs import picture
from benchmarks.measure import Spread, in_turn, installed, ratios, spread, text
from benchmarks.picture import Bars
from bnresearch.data import views

HEADER = (
    *("library", "version", "ms decoded", "ms per view", "views/s on a core", "Pillow / this"),
    *("largest difference", "mean difference", "n"),
)
SIZE, PICTURES = 224, 100
OURS, PILLOW, REDUCED = "simplejpeg", "Pillow", "Pillow, reduced where the crop allows"

Decoder = Callable[[bytes], np.ndarray]


def pillow() -> Decoder:
    """What streams decoded with before."""

    def decode(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)

    return decode


def simple(**fast: bool) -> Decoder:
    """``fast`` switches on approximations that it offers."""
    import simplejpeg

    return lambda data: simplejpeg.decode_jpeg(data, **fast)


def opencv() -> Decoder:
    import cv2

    cv2.setNumThreads(1)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)


def imagecodecs() -> Decoder:
    import imagecodecs

    return imagecodecs.jpeg8_decode


def kornia() -> Decoder:
    from kornia_rs import io as kornia_io

    return kornia_io.decode_image_jpeg


def jpegli() -> Decoder:
    import ajpegli

    return lambda data: np.asarray(ajpegli.decode(data))


def vips() -> Decoder:
    import pyvips

    return lambda data: pyvips.Image.new_from_buffer(data, "", access="sequential").numpy()


# Name -> the module, the package that it comes in, and the decoder.
LIBRARIES: dict[str, tuple[str, str, Callable[[], Decoder]]] = {
    PILLOW: ("PIL", "pillow", pillow),
    OURS: ("simplejpeg", "simplejpeg", simple),
    "simplejpeg, approximate": (
        *("simplejpeg", "simplejpeg"),
        lambda: simple(fastdct=True, fastupsample=True),
    ),
    "OpenCV": ("cv2", "opencv-python-headless", opencv),
    "imagecodecs": ("imagecodecs", "imagecodecs", imagecodecs),
    "kornia-rs": ("kornia_rs", "kornia-rs", kornia),
    "ajpegli": ("ajpegli", "ajpegli", jpegli),
    "pyvips": ("pyvips", "pyvips[binary]", vips),
}


def run(quick: bool) -> dict[str, Any]:
    """A row per library; Pillow has a second one, for decoding at half the size and less."""
    pictures = [picture(0, "train", index) for index in range(8 if quick else PICTURES)]
    decoders, left_out = {}, []
    for name, (module, package, make) in LIBRARIES.items():
        if installed(module):
            decoders[name] = make()
        else:
            left_out.append(f"{name}: not installed (pip install '{package}')")
    decoding = {name: _all(decoder, pictures) for name, decoder in decoders.items()}
    viewing = {name: _views(decoder, pictures) for name, decoder in decoders.items()}
    viewing[REDUCED] = lambda: [reduced(data, i) for i, data in enumerate(pictures)]
    repeats = 2 if quick else 15
    decoded = in_turn(decoding, repeats, time.process_time)
    viewed = in_turn(viewing, repeats, time.process_time)
    exact = decoding[PILLOW]()
    rows = [
        {
            "library": name,
            "version": importlib.metadata.version(_package(name)),
            "decode": _each(decoded[name], len(pictures)) if name in decoded else None,
            "view": _each(seconds, len(pictures)),
            "views_per_second": spread([len(pictures) / value for value in seconds]),
            "ratio": ratios(viewed[PILLOW], seconds),
            "difference": difference(decoding[name](), exact) if name in decoding else None,
        }
        for name, seconds in viewed.items()
    ]
    return {"rows": rows, "left_out": left_out}


def reduced(data: bytes, seed: int) -> np.ndarray:
    """A view for which Pillow decodes at 1/2, 1/4 or 1/8 where the crop stays larger than it."""
    rng = np.random.default_rng(seed)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        left, top, right, bottom = views._random_box(height, width, rng)
        scale = min(right - left, bottom - top) / SIZE
        image.draft("RGB", (round(width / scale), round(height / scale)))
        x, y = image.size[0] / width, image.size[1] / height
        box = (left * x, top * y, right * x, bottom * y)
        view = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))
    return view[:, ::-1] if rng.random() < 0.5 else view


def difference(decoded: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    """The largest one of a pixel, and the mean over pictures of their means."""
    found = [np.abs(a.astype(int) - b) for a, b in zip(decoded, exact, strict=True)]
    return {
        "largest": int(max(one.max() for one in found)),
        "mean": float(np.mean([one.mean() for one in found])),
    }


def _package(name: str) -> str:
    return LIBRARIES.get(name, LIBRARIES[PILLOW])[1].removesuffix("[binary]")


def _all(decoder: Decoder, pictures: list[bytes]) -> Callable[[], list[np.ndarray]]:
    return lambda: [decoder(data) for data in pictures]


def _views(decoder: Decoder, pictures: list[bytes]) -> Callable[[], list[np.ndarray]]:
    def work() -> list[np.ndarray]:
        return [
            views.random_view(decoder(data), SIZE, True, np.random.default_rng(i))
            for i, data in enumerate(pictures)
        ]

    return work


def _each(seconds: list[float], pictures: int) -> Spread:
    return spread([value / pictures for value in seconds])


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line per library, the fastest first."""
    rows = sorted(result["rows"], key=lambda row: row["view"]["median"])
    return [
        (
            row["library"],
            row["version"],
            text(row["decode"], 1e3) if row["decode"] else "",
            text(row["view"], 1e3),
            text(row["views_per_second"], digits=0),
            text(row["ratio"]),
            str(row["difference"]["largest"]) if row["difference"] else "",
            f"{row['difference']['mean']:.2f}" if row["difference"] else "",
            str(row["view"]["n"]),
        )
        for row in rows
    ]


def panels(result: dict[str, Any]) -> list[Bars]:
    """Views a second on a core."""
    bars = {row["library"]: {row["library"]: row["views_per_second"]} for row in result["rows"]}
    return [Bars("decoded, cut and resized to 224x224", "views/s on a core", bars)]
