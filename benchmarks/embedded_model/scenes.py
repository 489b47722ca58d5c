"""Synthetic pictures and the questions asked about them.

A picture is a grid of visual tokens. On a low-contrast photograph lie three or four coloured
shapes, one printed two-digit number and one handwritten digit; every thing covers only a few
tokens, so each answer has a known, small piece of evidence. Everything is drawn from a seeded
generator: the same seed gives the same pictures and questions. The two splits share colours, shapes
and fonts, and share neither photographs nor handwritten digits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import skimage
import sklearn
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

Rng = np.random.Generator
Pixels = NDArray[np.uint8]
Split = Literal["train", "test"]

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 190),
    "orange": (250, 140, 20),
    "white": (250, 250, 250),
    "cyan": (60, 220, 230),
}
SHAPES = {  # the name and its plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "diamond": "diamonds",
    "cross": "crosses",
}
RELATIONS = {  # the direction (down, right) from the second thing to the first
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
TASKS = ("color", "shape", "count", "number", "handwritten", "relation", "exist", "position")

# A visual token covers 28 x 28 pixels: four 14-pixel patches. Scenes are drawn at half that
# resolution and doubled, which makes drawing four times cheaper and changes nothing else.
DRAWN = 14
SCALE = 2
CELL_TOKENS = 3  # a thing gets a cell of about this many tokens a side to itself

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
PHOTOS: dict[Split, list[Path]] = {
    "train": [
        *(SKIMAGE / f"{name}.png" for name in ("astronaut", "camera", "coffee", "coins", "grass")),
        *(SKIMAGE / f"{name}.png" for name in ("gravel", "motorcycle_left", "page")),
        *(SKIMAGE / f"{name}.jpg" for name in ("retina", "rocket")),
        SKLEARN / "china.jpg",
    ],
    "test": [
        *(SKIMAGE / f"{name}.png" for name in ("brick", "chelsea", "ihc", "moon")),
        SKLEARN / "flower.jpg",
    ],
}
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
FONT_SIZES = (22, 24, 25)
TRAIN_DIGITS = 1300  # of the 1,797 handwritten digits; the rest is held out


@dataclass(frozen=True)
class Thing:
    """Something to ask about. `box` is (top, left, bottom, right), in visual tokens."""

    box: tuple[float, float, float, float]
    shape: str = ""
    color: str = ""
    number: str = ""
    digit: str = ""

    @property
    def center(self) -> NDArray[np.float32]:
        """The row and column of the middle, in visual tokens."""
        top, left, bottom, right = self.box
        return np.array([(top + bottom) / 2, (left + right) / 2], np.float32)

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Picture:
    """Pixels, and the truth about what they show."""

    pixels: Pixels  # [28 * rows, 28 * columns, 3]
    things: list[Thing]
    owner: NDArray[np.int64]  # [rows, columns]: the index of the thing on each token, -1 for none

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        rows, columns = self.owner.shape
        return rows, columns


@dataclass(frozen=True)
class Mention:
    """Words that name things, or nothing; `counted` where the question is how many."""

    end: int  # where they end in the text
    things: tuple[int, ...]
    counted: bool = False


@dataclass(frozen=True)
class Question:
    """A question, its answer and why.

    `evidence` are the things that decide the answer. `direction` is what the answer follows from:
    the place of the thing relative to the picture's centre, or to another thing. It and `mentions`
    only supervise training.
    """

    task: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    mentions: tuple[Mention, ...]
    direction: tuple[float, float] | None = None


class Studio:
    """Draws the pictures of one split. `photos` replaces the backgrounds of the split."""

    def __init__(self, split: Split, photos: list[Image.Image] | None = None) -> None:
        self.photos = photos or [_load_photo(path) for path in PHOTOS[split]]
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.fonts = [
            ImageFont.truetype(folder / f"{name}.ttf", size)
            for name in FONTS
            for size in FONT_SIZES
        ]
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        mine = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
        self.digits = [(digits.images[i], str(digits.target[i])) for i in mine]

    def picture(self, rng: Rng, grid: tuple[int, int]) -> Picture:
        """One random picture of `grid` (rows, columns) visual tokens."""
        rows, columns = grid
        height, width = DRAWN * rows, DRAWN * columns
        canvas = self._background(rng, height, width)
        draw = ImageDraw.Draw(canvas)
        cell_rows, cell_columns = (max(3, round(n / CELL_TOKENS)) for n in grid)
        cell_height, cell_width = height // cell_rows, width // cell_columns
        shapes = int(rng.integers(3, 5))
        things: list[Thing] = []
        for cell in rng.permutation(cell_rows * cell_columns)[: shapes + 2]:
            y, x = cell // cell_columns * cell_height, cell % cell_columns * cell_width
            if len(things) < shapes:
                size = int(rng.integers(26, 34))
                y, x = _jitter(rng, y, cell_height, size), _jitter(rng, x, cell_width, size)
                things.append(_draw_shape(rng, draw, things, y, x, size))
            elif len(things) == shapes:
                things.append(self._draw_number(rng, draw, y, x, cell_height, cell_width))
            else:
                size = int(rng.integers(30, 36))
                y, x = _jitter(rng, y, cell_height, size), _jitter(rng, x, cell_width, size)
                things.append(self._draw_digit(rng, canvas, y, x, size))
        noise = rng.standard_normal((height, width, 3), np.float32) * 4
        pixels = np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8)
        return Picture(pixels.repeat(SCALE, 0).repeat(SCALE, 1), things, _owners(things, grid))

    def _background(self, rng: Rng, height: int, width: int) -> Image.Image:
        """A random crop of a random photograph, its contrast lowered."""
        photo = self.photos[rng.integers(len(self.photos))]
        fit = min(photo.width / width, photo.height / height)
        zoom = min(fit, rng.uniform(0.6, 1.6))
        crop_width, crop_height = int(zoom * width), int(zoom * height)
        left = int(rng.integers(photo.width - crop_width + 1))
        top = int(rng.integers(photo.height - crop_height + 1))
        crop = photo.resize(
            (width, height),
            Image.Resampling.BILINEAR,
            (left, top, left + crop_width, top + crop_height),
        )
        values = np.asarray(crop, np.float32)
        values = rng.integers(60, 151) + rng.uniform(0.25, 0.6) * (values - values.mean((0, 1)))
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))

    def _draw_number(
        self, rng: Rng, draw: ImageDraw.ImageDraw, y: int, x: int, height: int, width: int
    ) -> Thing:
        number = str(rng.integers(10, 100))
        font = self.fonts[rng.integers(len(self.fonts))]
        left, top, right, bottom = (int(edge) for edge in font.getbbox(number))
        y, x = _jitter(rng, y, height, bottom - top), _jitter(rng, x, width, right - left)
        box = (y - 1, x - 1, y + bottom - top + 1, x + right - left + 1)
        ink, paper = (10, 245) if rng.random() < 0.5 else (245, 10)
        draw.rectangle((box[1], box[0], box[3] - 1, box[2] - 1), fill=(paper,) * 3)
        draw.text((x - left, y - top), number, font=font, fill=(ink,) * 3)
        return Thing(_in_tokens(box), number=number)

    def _draw_digit(self, rng: Rng, canvas: Image.Image, y: int, x: int, size: int) -> Thing:
        strokes, digit = self.digits[rng.integers(len(self.digits))]
        image = Image.fromarray(np.clip(strokes * 16, 0, 255).astype(np.uint8))
        canvas.paste(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"), (x, y))
        return Thing(_in_tokens((y, x, y + size, x + size)), digit=digit)


def ask(rng: Rng, picture: Picture, task: str) -> Question | None:
    """A random question of one task, or None where the picture allows none."""
    things = picture.things
    shapes = [i for i, thing in enumerate(things) if thing.shape]
    match task:
        case "color":
            return _ask_for(rng, things, shapes, "shape", "what color is the {}", "color")
        case "shape":
            return _ask_for(rng, things, shapes, "color", "what shape is {}", "shape")
        case "count":
            present = rng.random() < 0.75
            shape = things[_pick(rng, shapes)].shape if present else _pick(rng, list(SHAPES))
            found = tuple(i for i in shapes if things[i].shape == shape)
            text = f"how many {SHAPES[shape]}"
            mentions = (Mention(len(text), found, counted=True),)
            return Question(task, f"{text}?", str(len(found)), found, mentions)
        case "number":
            i = next(i for i, thing in enumerate(things) if thing.number)
            text = "what number is written"
            return Question(task, f"{text}?", things[i].number, (i,), (Mention(len(text), (i,)),))
        case "handwritten":
            i = next(i for i, thing in enumerate(things) if thing.digit)
            text = "which digit is handwritten"
            return Question(task, f"{text}?", things[i].digit, (i,), (Mention(len(text), (i,)),))
        case "relation":
            i, j = (int(i) for i in rng.choice(shapes, 2, replace=False))
            relation = _pick(rng, list(RELATIONS))
            offset = things[i].center - things[j].center
            along = float(offset @ np.array(RELATIONS[relation]))
            if abs(along) < 1:
                return None
            answer = "yes" if along > 0 else "no"
            direction = (float(offset[0]), float(offset[1]))
            start = f"is the {things[i].name}"
            text = f"{start} {relation} the {things[j].name}"
            both = (Mention(len(start), (i,)), Mention(len(text), (j,)))
            return Question(task, f"{text}?", answer, (i, j), both, direction)
        case "exist":
            wanted = things[_pick(rng, shapes)]
            color, shape = wanted.color, wanted.shape
            change = rng.random()  # half of the questions change nothing
            if change < 0.25:
                color = _pick(rng, list(COLORS))
            elif change < 0.5:
                shape = _pick(rng, list(SHAPES))
            found = tuple(i for i in shapes if things[i].name == f"{color} {shape}")
            text = f"is there a {color} {shape}"
            answer = "yes" if found else "no"
            return Question(task, f"{text}?", answer, found, (Mention(len(text), found),))
        case "position":
            i = _pick(rng, shapes)
            down, right = (float(d) for d in things[i].center - np.array(picture.grid) / 2)
            if min(abs(down), abs(right)) < 0.5:
                return None
            text = f"where is the {things[i].name}"
            answer = CORNERS[2 * (down > 0) + (right > 0)]
            mentions = (Mention(len(text), (i,)),)
            return Question(task, f"{text}?", answer, (i,), mentions, (down, right))
        case _:
            raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")


def ask_each(rng: Rng, picture: Picture, attempts: int = 10) -> list[Question]:
    """One question of every task that the picture allows."""
    questions = []
    for task in TASKS:
        tries = (ask(rng, picture, task) for _ in range(attempts))
        questions += [q for q in tries if q is not None][:1]
    return questions


def _ask_for(
    rng: Rng, things: list[Thing], shapes: list[int], known: str, template: str, wanted: str
) -> Question | None:
    """Ask for one attribute of a thing that its other attribute singles out."""
    values = [getattr(things[i], known) for i in shapes]
    unique = [i for i, value in zip(shapes, values, strict=True) if values.count(value) == 1]
    if not unique:
        return None
    i = _pick(rng, unique)
    text = template.format(getattr(things[i], known))
    return Question(
        wanted, f"{text}?", getattr(things[i], wanted), (i,), (Mention(len(text), (i,)),)
    )


def _draw_shape(
    rng: Rng, draw: ImageDraw.ImageDraw, before: list[Thing], y: int, x: int, size: int
) -> Thing:
    """Draw a pair of shape and colour that is new to the picture.

    A third of the shapes repeat the first one, so that there is something to count.
    """
    repeat = before and rng.random() < 0.35
    shape = before[0].shape if repeat else _pick(rng, list(SHAPES))
    taken = {thing.color for thing in before if thing.shape == shape}
    color = _pick(rng, [name for name in COLORS if name not in taken])
    fill, half = COLORS[color], size / 2
    cy, cx = y + half, x + half
    match shape:
        case "circle":
            draw.ellipse((x, y, x + size, y + size), fill)
        case "square":
            draw.rectangle((x + 2, y + 2, x + size - 2, y + size - 2), fill)
        case "triangle":
            draw.polygon([(cx, y), (x + size, y + size), (x, y + size)], fill)
        case "diamond":
            draw.polygon([(cx, y), (x + size, cy), (cx, y + size), (x, cy)], fill)
        case "cross":
            bar = 0.16 * size
            draw.rectangle((x, cy - bar, x + size, cy + bar), fill)
            draw.rectangle((cx - bar, y, cx + bar, y + size), fill)
        case "star":
            angles = np.pi * np.arange(10) / 5 - np.pi / 2
            radii = half * np.where(np.arange(10) % 2, 0.48, 1.1)
            points = np.stack([cx + radii * np.cos(angles), cy + radii * np.sin(angles)], -1)
            draw.polygon(points.flatten().tolist(), fill)
    return Thing(_in_tokens((y, x, y + size, x + size)), shape=shape, color=color)


def _owners(things: list[Thing], grid: tuple[int, int]) -> NDArray[np.int64]:
    """[rows, columns]: the thing that covers at least a quarter of each token, or -1."""
    owner = np.full(grid, -1)
    for i, (top, left, bottom, right) in enumerate(thing.box for thing in things):
        down, across = (
            np.clip(np.minimum(end, np.arange(n) + 1) - np.maximum(start, np.arange(n)), 0, 1)
            for start, end, n in ((top, bottom, grid[0]), (left, right, grid[1]))
        )
        owner[np.outer(down, across) >= 0.25] = i
    return owner


def _in_tokens(box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    top, left, bottom, right = (edge / DRAWN for edge in box)
    return top, left, bottom, right


def _jitter(rng: Rng, start: int, room: int, size: int) -> int:
    """A random place for `size` pixels in `room` pixels, one pixel away from both ends."""
    return int(start + rng.integers(1, max(2, room - size)))


def _pick(rng: Rng, options: list[Any]) -> Any:
    return options[rng.integers(len(options))]


def _load_photo(path: Path) -> Image.Image:
    photo = Image.open(path).convert("RGB")
    photo.thumbnail((512, 512))
    return photo
