"""Drawing what was kept: the pictures of a prompt with dropped patches dimmed. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ep_backends.shared.pictures import read_picture
from ep_core.family import PatchGrid
from ep_core.report import SpanRecord

HEIGHT = 672  # pixels of each drawn picture
CAPTION = 32
DIMMED = 0.35  # brightness left to a dropped patch


def draw_overlay(
    pictures: Sequence[Path], spans: Sequence[SpanRecord], grids: Sequence[PatchGrid], out: Path
) -> None:
    """Write one PNG with the pictures side by side, each with its dropped patches dimmed.

    Args:
        pictures: picture files in the order of the prompt.
        spans: what was kept of each.
        grids: where each picture's tokens lie; rows and columns that a span knows come first.
        out: file to write.
    """
    panels = [
        _panel(read_picture(path), span, grid)
        for path, span, grid in zip(pictures, spans, grids, strict=True)
    ]
    sheet = Image.new("RGB", (sum(panel.width for panel in panels), HEIGHT + CAPTION), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    sheet.save(out)


def _panel(picture: Image.Image, span: SpanRecord, grid: PatchGrid) -> Image.Image:
    if span.grid is not None:
        grid = replace(grid, rows=span.grid[0], columns=span.grid[1])
    scale = HEIGHT / picture.height
    width = round(picture.width * scale)
    pixels = np.asarray(picture.resize((width, HEIGHT), Image.Resampling.LANCZOS), np.float32)
    kept = np.zeros(grid.rows * grid.columns, bool)
    kept[list(span.kept)] = True
    left, top, right, bottom = (edge * scale for edge in grid.box)
    row = np.floor((np.arange(HEIGHT) + 0.5 - top) / (bottom - top) * grid.rows).astype(int)
    column = np.floor((np.arange(width) + 0.5 - left) / (right - left) * grid.columns).astype(int)
    inside = ((row >= 0) & (row < grid.rows))[:, None] & ((column >= 0) & (column < grid.columns))[
        None
    ]
    cell = row.clip(0, grid.rows - 1)[:, None] * grid.columns + column.clip(0, grid.columns - 1)
    bright = (kept[cell] & inside)[..., None]
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = np.where(bright, pixels, DIMMED * grey)
    panel = Image.new("RGB", (width, HEIGHT + CAPTION), "white")
    panel.paste(Image.fromarray(pixels.astype(np.uint8)), (0, 0))
    ImageDraw.Draw(panel).text(
        (8, HEIGHT + 6),
        f"{len(span.kept)} of {span.stop - span.start} visual tokens kept",
        fill="black",
        font=ImageFont.load_default(size=18),
    )
    return panel
