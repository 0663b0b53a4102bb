"""Small images to learn from, of what is installed anyway: digits and letters in the fonts that
matplotlib carries, turned, sheared, scaled, moved, faded and blurred by noise. Writes nothing.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from data import drawn
from PIL import Image, ImageDraw, ImageFont

CLASSES = string.digits + string.ascii_letters
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral"),
)
SIZE = 24  # pixels of a side
CANVAS = 48  # that a glyph is drawn on before it is distorted


class Glyphs:
    """A pool of images beside their classes, with the two methods of `data.Tokens` that the
    training loop calls.

    Args:
        count: images of the pool.
        seed: of which they are a function, beside the fonts.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._rows = pool(count, seed)

    def windows(
        self, seed: int, stream: int, step: int, global_batch: int
    ) -> npt.NDArray[np.int64]:
        """Places of the `global_batch` images of a step, (global_batch,)."""
        return drawn(len(self._rows), seed, stream, step, global_batch)

    def read(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The images at `places` (n,), (n, 1 + SIZE * SIZE): the class, then grey values."""
        return self._rows[places]


@functools.cache
def pool(count: int, seed: int) -> npt.NDArray[np.uint8]:
    """`count` images, (count, 1 + SIZE * SIZE), see `Glyphs.read`."""
    numbers = np.random.default_rng(seed)
    drawings = _drawings()
    rows = np.empty((count, 1 + SIZE * SIZE), np.uint8)
    for row in rows:
        row[0] = numbers.integers(len(CLASSES))
        drawing = drawings[numbers.integers(len(FONTS))][row[0]]
        image = np.asarray(_distorted(drawing, numbers), np.float64)
        image *= numbers.uniform(0.5, 1.0)
        image += numbers.normal(0.0, 40.0, image.shape)
        row[1:] = np.clip(image, 0, 255).ravel()
    return rows


def _drawings() -> list[list[Any]]:
    """By font and class the glyph in the middle of a canvas."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 32)
        found.append([])
        for glyph in CLASSES:
            canvas = Image.new("L", (CANVAS, CANVAS))
            ImageDraw.Draw(canvas).text(
                (CANVAS / 2, CANVAS / 2), glyph, fill=255, font=font, anchor="mm"
            )
            found[-1].append(canvas)
    return found


def _distorted(drawing: Any, numbers: np.random.Generator) -> Any:
    """The drawing on SIZE x SIZE pixels, by a random affine map."""
    angle, shear = numbers.uniform(-0.35, 0.35, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # from pixels of the result to those of the canvas
    matrix = turn @ np.array([[1.0, shear], [0.0, 1.0]]) * numbers.uniform(1.3, 2.0)
    offset = CANVAS / 2 - matrix @ (np.full(2, SIZE / 2) + numbers.uniform(-2.5, 2.5, 2))
    affine = (*matrix[0], offset[0], *matrix[1], offset[1])
    return drawing.transform(
        (SIZE, SIZE), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR
    )
