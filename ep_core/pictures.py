"""Reading picture files the same way everywhere. Needs Pillow."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps


def read_picture(path: Path) -> Image.Image:
    """A picture file as RGB, turned upright where its EXIF data say so, as viewers show it."""
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")
