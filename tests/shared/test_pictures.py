"""Picture files are read as viewers show them, or refused in one line."""

import numpy as np
from PIL import Image

from ep_backends.shared.pictures import read_picture


def test_a_picture_is_read_upright(tmp_path):
    """Phones store pictures sideways and say so in EXIF; engines and viewers turn them."""
    picture = Image.new("RGB", (6, 4), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    picture.save(tmp_path / "phone.jpg", exif=exif)
    assert read_picture(tmp_path / "phone.jpg").size == (4, 6)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = np.asarray(read_picture(tmp_path / "deep.png"))[..., 0]
    assert np.array_equal(grey, deep >> 8)
