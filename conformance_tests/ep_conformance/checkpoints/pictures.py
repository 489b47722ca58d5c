"""Seeded pictures."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """Draw a seeded RGB picture of ``size`` (width, height) to ``path`` (PNG) and return it.

    A colour gradient, six rectangles and noise: flat parts whose tokens are nearly alike, and
    edges whose tokens are not.
    """
    width, height = size
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, 3))
    down = np.linspace(0, 1, height)[:, None, None]
    along = np.linspace(0, 1, width)[None, :, None]
    top = corners[0, 0] * (1 - along) + corners[0, 1] * along
    bottom = corners[1, 0] * (1 - along) + corners[1, 1] * along
    pixels = top * (1 - down) + bottom * down  # [height, width, 3]
    for _ in range(6):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        wide, tall = int(rng.integers(8, width)) // 2, int(rng.integers(8, height)) // 2
        pixels[y : y + tall, x : x + wide] = rng.uniform(0, 255, 3)
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path
