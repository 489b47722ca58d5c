"""Cluttered pictures: the embedded model's scenes, in which things do not stand out.

The things and the questions are those of `benchmarks.embedded_model.scenes`. Here they lie on a
photograph at its own contrast, among scraps of other photographs, strokes and letters that no
question asks about; shapes are textured, tilted and translucent, and half of them have no sharp
edge; numbers are small and often lack a plate; handwritten digits are ink on the photograph.
A seed gives the same picture again, and the splits share neither photographs nor digits.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.embedded_model.scenes import (
    CELL_TOKENS,
    COLORS,
    DRAWN,
    FONTS,
    SCALE,
    SHAPES,
    Picture,
    Rng,
    Split,
    Studio,
    Thing,
)

Values = NDArray[np.float32]
Mask = NDArray[np.floating[Any]]
SMALL_FONTS = (12, 14, 16, 18, 20)
LEAST_CONTRAST = 90  # between a shape's colour and what it lies on: a distance in RGB
SUPERSAMPLED = 4  # masks are drawn this much larger


class ClutteredStudio(Studio):
    """Draws the cluttered pictures of one split, with so many shapes (at least, at most)."""

    def __init__(self, split: Split, shapes: tuple[int, int] = (3, 4)) -> None:
        super().__init__(split)
        self.shapes = shapes
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.small_fonts = [
            ImageFont.truetype(folder / f"{name}.ttf", size)
            for name in FONTS
            for size in SMALL_FONTS
        ]

    def picture(self, rng: Rng, grid: tuple[int, int]) -> Picture:
        """One random picture of `grid` (rows, columns) visual tokens."""
        rows, columns = grid
        height, width = DRAWN * rows, DRAWN * columns
        canvas = self._crop(rng, height, width)
        for _ in range(rng.integers(8, 17)):
            self._add_clutter(rng, canvas)
        cell_rows, cell_columns = (max(3, round(n / CELL_TOKENS)) for n in grid)
        cell = height // cell_rows, width // cell_columns
        shapes = int(rng.integers(self.shapes[0], self.shapes[1] + 1))
        things: list[Thing] = []
        for place in rng.permutation(cell_rows * cell_columns)[: shapes + 2]:
            corner = place // cell_columns * cell[0], place % cell_columns * cell[1]
            if len(things) < shapes:
                things.append(_add_shape(rng, canvas, things, corner, cell))
            elif len(things) == shapes:
                things.append(self._add_number(rng, canvas, corner, cell))
            else:
                things.append(self._add_digit(rng, canvas, corner, cell))
        canvas += rng.standard_normal(canvas.shape, np.float32) * 4
        pixels = np.clip(canvas, 0, 255).astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
        return Picture(pixels, things, _owners(things, grid))

    def _crop(self, rng: Rng, height: int, width: int) -> Values:
        """Part of a random photograph, perhaps mirrored -> [height, width, 3]."""
        photo = self.photos[rng.integers(len(self.photos))]
        zoom = rng.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
        across, down = zoom * width, zoom * height
        left, top = rng.uniform(0, photo.width - across), rng.uniform(0, photo.height - down)
        crop = photo.resize(
            (width, height), Image.Resampling.BILINEAR, (left, top, left + across, top + down)
        )
        values = np.asarray(crop, np.float32)
        if rng.random() < 0.5:
            values = values[:, ::-1]
        return rng.uniform(0.6, 1) * values + rng.uniform(-20, 40)

    def _add_clutter(self, rng: Rng, canvas: Values) -> None:
        """A scrap of another photograph, a stroke, or letters."""
        height, width = (int(n) for n in rng.integers(12, 56, 2))
        height, width = min(height, canvas.shape[0]), min(width, canvas.shape[1])
        y, x = _inside(rng, (0, 0), canvas.shape[:2], (height, width))
        sheet = Image.new("L", (width, height))
        draw = ImageDraw.Draw(sheet)
        kind = rng.random()
        if kind < 0.5:
            corners = rng.uniform(0, 1, (int(rng.integers(3, 7)), 2)) * (width - 1, height - 1)
            draw.polygon([(float(a), float(b)) for a, b in corners], 255)
            sheet = sheet.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))
            ink = self._crop(rng, height, width)
        elif kind < 0.75:
            ends = rng.uniform(0, 1, (2, 2)) * (width - 1, height - 1)
            draw.line([(float(a), float(b)) for a, b in ends], 255, int(rng.integers(1, 4)))
            ink = _dull(rng)
        else:
            letters = "".join(chr(c) for c in rng.integers(ord("A"), ord("Z") + 1, 2))
            font = self.small_fonts[rng.integers(len(self.small_fonts))]
            draw.text((0, 0), letters, font=font, fill=220)
            ink = _dull(rng)
        _blend(canvas, np.asarray(sheet, np.float32) / 255, ink, (y, x))

    def _add_number(
        self, rng: Rng, canvas: Values, corner: tuple[int, int], cell: tuple[int, int]
    ) -> Thing:
        number = str(rng.integers(10, 100))
        font = self.small_fonts[rng.integers(len(self.small_fonts))]
        left, top, right, bottom = (int(edge) for edge in font.getbbox(number))
        size = bottom - top + 2, right - left + 2
        y, x = _inside(rng, corner, cell, size)
        sheet = Image.new("L", size[::-1])
        ImageDraw.Draw(sheet).text((1 - left, 1 - top), number, font=font, fill=255)
        ink, paper = (15, 240) if rng.random() < 0.5 else (240, 15)
        # Without a plate the photograph is faded just enough for the ink to be read.
        plate = np.full(size, 1 if rng.random() < 0.4 else rng.uniform(0.5, 0.8), np.float32)
        _blend(canvas, plate, _grey(paper), (y, x))
        _blend(canvas, np.asarray(sheet, np.float32) / 255, _grey(ink), (y, x))
        return Thing(_in_tokens(y, x, size), number=number)

    def _add_digit(
        self, rng: Rng, canvas: Values, corner: tuple[int, int], cell: tuple[int, int]
    ) -> Thing:
        strokes, digit = self.digits[rng.integers(len(self.digits))]
        size = int(rng.integers(24, 36))
        y, x = _inside(rng, corner, cell, (size, size))
        image = Image.fromarray(np.clip(strokes * 16, 0, 255).astype(np.uint8))
        sheet = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
        ink, paper = (15, 240) if rng.random() < 0.5 else (240, 15)
        fade = Image.new("L", (size, size))
        ImageDraw.Draw(fade).ellipse((1, 1, size - 2, size - 2), 255)
        faded = np.asarray(fade.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
        _blend(canvas, rng.uniform(0.6, 0.9) * faded, _grey(paper), (y, x))
        _blend(canvas, sheet, _grey(ink), (y, x))
        return Thing(_in_tokens(y, x, (size, size)), digit=digit)


def _add_shape(
    rng: Rng,
    canvas: Values,
    before: list[Thing],
    corner: tuple[int, int],
    cell: tuple[int, int],
) -> Thing:
    """Draw a pair of shape and colour that is new to the picture and differs from its ground.

    A third of the shapes repeat the first one, so that there is something to count.
    """
    repeat = before and rng.random() < 0.35
    shape = before[0].shape if repeat else list(SHAPES)[rng.integers(len(SHAPES))]
    size = int(rng.integers(22, 36))
    y, x = _inside(rng, corner, cell, (size, size))
    ground = canvas[y : y + size, x : x + size].mean((0, 1))
    taken = {thing.color for thing in before if thing.shape == shape}
    free = [name for name in COLORS if name not in taken]
    clear = [name for name in free if np.linalg.norm(COLORS[name] - ground) > LEAST_CONTRAST]
    color = (clear or free)[rng.integers(len(clear or free))]
    large = SUPERSAMPLED * size
    sheet = Image.new("L", (large, large))
    ImageDraw.Draw(sheet).polygon([(a, b) for a, b in _outline(shape, large, rng)], 255)
    sheet = sheet.resize((size, size), Image.Resampling.BOX)
    if rng.random() < 0.5:
        sheet = sheet.filter(ImageFilter.GaussianBlur(rng.uniform(1, 2.5)))
    mask = rng.uniform(0.75, 1) * np.asarray(sheet, np.float32) / 255
    texture = rng.standard_normal((size // 4 + 1, size // 4 + 1, 1), np.float32)
    texture = 12 * texture.repeat(4, 0).repeat(4, 1)[:size, :size]
    fill = np.array(COLORS[color], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
    _blend(canvas, mask, fill + texture, (y, x))
    return Thing(_in_tokens(y, x, (size, size)), shape=shape, color=color)


def _outline(shape: str, size: int, rng: Rng) -> list[tuple[float, float]]:
    """The corners of a shape that fills a square of `size` pixels, tilted by up to 12 degrees."""
    match shape:
        case "circle":
            angles, radii = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.full(48, 1.0)
        case "square":
            angles, radii = np.pi * (np.arange(4) / 2 + 0.25), np.full(4, 1.2)
        case "triangle":
            angles, radii = np.pi * (2 * np.arange(3) / 3 - 0.5), np.full(3, 1.1)
        case "diamond":
            angles, radii = np.pi * np.arange(4) / 2, np.full(4, 1.0)
        case "star":
            angles = np.pi * (np.arange(10) / 5 - 0.5)
            radii = np.where(np.arange(10) % 2, 0.45, 1.0)
        case _:  # a cross: four arms, each with two outer corners and one inner corner
            bar = np.arctan(0.32)
            arms = np.pi * np.arange(4)[:, None] / 2
            angles = (arms + np.array([-bar, bar, np.pi / 4])).ravel()
            radii = np.tile([np.hypot(1, 0.32), np.hypot(1, 0.32), 0.32 * np.sqrt(2)], 4)
    angles = angles + rng.uniform(-0.2, 0.2)
    points = size / 2 * (1 + 0.95 * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    return [(float(x), float(y)) for x, y in points]


def _blend(canvas: Values, mask: Mask, ink: Mask, corner: tuple[int, int]) -> None:
    """Lay `ink` on the canvas where the mask, [height, width] from 0 to 1, says so."""
    part = canvas[corner[0] :, corner[1] :][: mask.shape[0], : mask.shape[1]]
    part += mask[..., None] * (ink - part)


def _dull(rng: Rng) -> Values:
    """A grey or brownish colour that no question names."""
    return (rng.integers(30, 226) + rng.uniform(-15, 15, 3)).astype(np.float32)


def _grey(value: float) -> Values:
    return np.full(3, value, np.float32)


def _inside(
    rng: Rng, corner: tuple[int, int], room: tuple[int, ...], size: tuple[int, int]
) -> tuple[int, int]:
    """A random place for `size` pixels in `room` pixels from a corner on."""
    y, x = (
        int(start + rng.integers(max(1, space - need + 1)))
        for start, space, need in zip(corner, room, size, strict=True)
    )
    return y, x


def _in_tokens(y: int, x: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    return y / DRAWN, x / DRAWN, (y + size[0]) / DRAWN, (x + size[1]) / DRAWN


def _owners(things: list[Thing], grid: tuple[int, int]) -> NDArray[np.int64]:
    """[rows, columns]: the thing that covers a quarter of a token or lies mostly on it, or -1."""
    owner = np.full(grid, -1)
    for i, (top, left, bottom, right) in enumerate(thing.box for thing in things):
        down, across = (
            np.clip(np.minimum(end, np.arange(n) + 1) - np.maximum(start, np.arange(n)), 0, 1)
            for start, end, n in ((top, bottom, grid[0]), (left, right, grid[1]))
        )
        covered = np.outer(down, across)
        owner[covered >= min(0.25, covered.max())] = i
    return owner
