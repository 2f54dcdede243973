"""From stored pictures to the views a model sees; used by decoding threads and worker processes.

JPEGs in colour are decoded by simplejpeg, which is libjpeg-turbo and little else, all other
pictures by Pillow. All resizing is Pillow's, bilinear with a filter that widens when it shrinks
(antialiasing, as in torchvision).
"""

import contextlib
import io
import math

import numpy as np
import simplejpeg
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Those that libjpeg-turbo itself turns into RGB; of CMYK Pillow makes slightly other colours.
JPEG_COLOURS = ("YCbCr", "RGB", "Gray")

# Szegedy et al. 2015 ("Going deeper with convolutions"): a crop covers this part of the area ...
AREA = (0.08, 1.0)
# ... and has this ratio of width to height, drawn evenly on a log scale.
RATIO = (3 / 4, 4 / 3)


def decode(data: bytes, channels: int) -> np.ndarray:
    """A PNG, JPEG, ... as uint8 [h, w, channels]; a turn that a JPEG only notes is not made."""
    if channels == 3 and simplejpeg.is_jpeg(data):
        # What it does not take, Pillow forgives or refuses. The bits are equal where both decode:
        # both leave libjpeg-turbo's exact defaults as they are.
        with contextlib.suppress(ValueError):
            if simplejpeg.decode_jpeg_header(data)[2] in JPEG_COLOURS:
                return simplejpeg.decode_jpeg(data)
    with Image.open(io.BytesIO(data)) as image:
        # convert() copies even when there is nothing to convert.
        mode = MODES[channels]
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def centre_view(image: np.ndarray, size: int, shorter: int) -> np.ndarray:
    """Resizes the shorter side to ``shorter`` and cuts ``size`` x ``size`` pixels out of the
    middle."""
    height, width = image.shape[:2]
    side = min(height, width) * size / shorter
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, size, (left, top, left + side, top + side))


def random_view(image: np.ndarray, size: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """The random-resized crop of Szegedy et al. at ``size`` x ``size``, mirrored half of the time
    if ``flip``."""
    height, width = image.shape[:2]
    view = _resize(image, size, _random_box(height, width, rng))
    return view[:, ::-1] if flip and rng.random() < 0.5 else view


def _random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # Ten misses happen only to very long pictures: take the middle, as large as the ratio allows.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize(image: np.ndarray, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    channels = image.shape[-1]
    pixels = Image.fromarray(image[..., 0] if channels == 1 else image)
    pixels = pixels.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(pixels).reshape(size, size, channels)
