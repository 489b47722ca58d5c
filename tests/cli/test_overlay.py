"""The overlay, pixel by pixel: kept patches keep their colours, dropped ones are dim and grey."""

import gc

import numpy as np
import pytest
from PIL import Image

from entropyprune.cli.overlay import CAPTION, DIMMED, HEIGHT, draw_overlay
from ep_core.family import PatchGrid
from ep_core.report import SpanRecord


def mosaic(path, rows, columns, *, size, seed=0):
    """A picture of flat cells in bright colours; returns the colours [rows, columns, 3]."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(60, 256, (rows, columns, 3), dtype=np.uint8)
    colours[..., 0] = 255 - colours[..., 1] // 2  # never grey
    width, height = size
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    Image.fromarray(colours[y][:, x]).save(path)
    return colours


def drawn(tmp_path, pictures, spans, grids):
    out = tmp_path / "overlay.png"
    draw_overlay(pictures, spans, grids, out)
    with Image.open(out) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def grey(colour):
    return np.asarray(colour, np.float32).mean(axis=-1, keepdims=True) * DIMMED


@pytest.mark.parametrize("kept", [(), (0,), (5,), (0, 3, 12, 15), (1, 6, 7, 10), tuple(range(16))])
def test_kept_patches_keep_their_colours_and_dropped_are_dimmed_grey(tmp_path, kept):
    picture = tmp_path / "picture.png"
    mosaic(picture, 4, 4, size=(HEIGHT, HEIGHT))  # drawn at its own size: no resampling
    with Image.open(picture) as image:
        before = np.asarray(image)
    sheet = drawn(
        tmp_path,
        [picture],
        [SpanRecord(10, 26, kept)],
        [PatchGrid(4, 4, (0, 0, HEIGHT, HEIGHT))],
    )
    assert sheet.shape == (HEIGHT + CAPTION, HEIGHT, 3)
    side = HEIGHT // 4
    for token in range(16):
        cell = np.s_[token // 4 * side : (token // 4 + 1) * side, token % 4 * side :][:2]
        there, here = sheet[cell][:, :side], before[cell][:, :side]
        if token in kept:
            assert (there == here).all(), f"kept token {token} changed its colour"
        else:
            assert (there == there[..., :1]).all(), f"dropped token {token} is not grey"
            assert np.abs(there - grey(here)).max() <= 1, f"dropped token {token} is not dimmed"


@pytest.mark.parametrize(
    ("guessed", "known"), [((2, 6), None), ((3, 4), (2, 6))], ids=["family's", "engine's"]
)
def test_a_grid_that_is_not_square_goes_row_by_row(tmp_path, guessed, known):
    picture = tmp_path / "picture.png"
    colours = mosaic(picture, 2, 6, size=(3 * HEIGHT, HEIGHT))
    kept = (1, 5, 6, 9)
    sheet = drawn(
        tmp_path,
        [picture],
        [SpanRecord(0, 12, kept, known)],
        [PatchGrid(*guessed, (0, 0, 3 * HEIGHT, HEIGHT))],
    )
    side = HEIGHT // 2
    for token in range(12):
        row, column = divmod(token, 6)
        middle = sheet[row * side + side // 2, column * side + side // 2]
        expected = colours[row, column] if token in kept else grey(colours[row, column])
        assert np.abs(middle.astype(float) - expected).max() <= 1, f"token {token}"


def test_what_the_grid_does_not_cover_is_dimmed(tmp_path):
    picture = tmp_path / "picture.png"
    mosaic(picture, 4, 8, size=(2 * HEIGHT, HEIGHT))
    with Image.open(picture) as image:
        before = np.asarray(image).astype(float)
    left, right = HEIGHT // 2, 3 * HEIGHT // 2  # a centre crop
    sheet = drawn(
        tmp_path,
        [picture],
        [SpanRecord(0, 16, tuple(range(16)))],
        [PatchGrid(4, 4, (left, 0, right, HEIGHT))],
    )[:HEIGHT].astype(float)
    assert (sheet[:, left:right] == before[:, left:right]).all()
    for outside in (np.s_[:, :left], np.s_[:, right:]):
        assert np.abs(sheet[outside] - grey(before[outside])).max() <= 1


@pytest.mark.parametrize("size", [(60, 40), (30, 90), (1500, 1000)])
def test_pictures_of_any_size_are_drawn_at_one_height(tmp_path, size):
    picture = tmp_path / "picture.png"
    colours = mosaic(picture, 2, 2, size=size)
    sheet = drawn(tmp_path, [picture], [SpanRecord(0, 4, (0, 3))], [PatchGrid(2, 2, (0, 0, *size))])
    height, width = sheet.shape[0] - CAPTION, sheet.shape[1]
    assert height == HEIGHT
    assert width == round(size[0] * HEIGHT / size[1])
    for token in range(4):
        row, column = divmod(token, 2)
        middle = sheet[height * (2 * row + 1) // 4, width * (2 * column + 1) // 4].astype(float)
        expected = colours[row, column] if token in (0, 3) else grey(colours[row, column])
        assert np.abs(middle - expected).max() <= 2, f"token {token}"


def test_several_pictures_stand_side_by_side_each_with_its_own_span(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    sizes = [(HEIGHT, HEIGHT), (HEIGHT // 2, HEIGHT)]
    colours = [
        mosaic(path, 1, 1, size=s, seed=n)
        for n, (path, s) in enumerate(zip(paths, sizes, strict=True))
    ]
    sheet = drawn(
        tmp_path,
        paths,
        [SpanRecord(0, 1, (0,)), SpanRecord(5, 6, ())],
        [PatchGrid(1, 1, (0, 0, *size)) for size in sizes],
    ).astype(float)
    assert sheet.shape[1] == HEIGHT * 3 // 2
    assert (sheet[:HEIGHT, :HEIGHT] == colours[0][0, 0]).all()
    assert np.abs(sheet[:HEIGHT, HEIGHT:] - grey(colours[1][0, 0])).max() <= 1


def test_the_caption_is_written_below_on_white(tmp_path):
    picture = tmp_path / "picture.png"
    mosaic(picture, 1, 2, size=(HEIGHT, HEIGHT))
    grid = PatchGrid(1, 2, (0, 0, HEIGHT, HEIGHT))
    captions = [
        drawn(tmp_path, [picture], [SpanRecord(0, 2, kept)], [grid])[HEIGHT:]
        for kept in ((0,), (1,), (0, 1))
    ]
    for caption in captions:
        assert (caption[:, -50:] == 255).all()
        assert (caption < 100).any(), "no text below the picture"
    assert (captions[0] == captions[1]).all(), "one of two is kept in both"
    assert (captions[0] != captions[2]).any(), "the caption does not count"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_drawn(tmp_path, mode):
    picture = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (40, 40), (204, 204, 204)).convert(mode).save(picture)
    sheet = drawn(tmp_path, [picture], [SpanRecord(0, 1, (0,))], [PatchGrid(1, 1, (0, 0, 40, 40))])
    assert np.abs(sheet[:HEIGHT].astype(int) - 204).max() <= 3


def test_a_file_of_several_frames_is_drawn_by_its_first_and_closed(tmp_path):
    picture = tmp_path / "picture.gif"
    first, second = (Image.new("L", (40, 40), value) for value in (180, 20))
    first.save(picture, save_all=True, append_images=[second])
    sheet = drawn(tmp_path, [picture], [SpanRecord(0, 1, (0,))], [PatchGrid(1, 1, (0, 0, 40, 40))])
    assert np.abs(sheet[:HEIGHT].astype(int) - 180).max() <= 3
    gc.collect()  # an open file would be reported here, and warnings are errors


def test_a_picture_without_its_span_is_an_error(tmp_path):
    picture = tmp_path / "picture.png"
    mosaic(picture, 1, 1, size=(8, 8))
    with pytest.raises(ValueError, match="shorter"):
        draw_overlay([picture], [], [PatchGrid(1, 1, (0, 0, 8, 8))], tmp_path / "out.png")
