"""Reading picture files the same way everywhere. Needs Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ep_core.errors import EntropyPruneError


def read_picture(path: Path) -> Image.Image:
    """A picture file as RGB, turned upright where its EXIF data say so, as viewers show it.

    Raises:
        EntropyPruneError: the file cannot be read as a picture, and why.
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EntropyPruneError(f"{path} is not a readable picture: {error}") from None
