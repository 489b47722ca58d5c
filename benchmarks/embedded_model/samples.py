"""Draw the sample pictures that ship with the package; everything in them is free to ship.

python -m benchmarks.embedded_model.samples ep_core/demo/pictures
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.embedded_model.scenes import SKIMAGE, Studio, ask_each
from benchmarks.embedded_model.train import SQUARE

COUNT = 12
SEED = 5000
BACKGROUNDS = {
    "chelsea": "Background: crop of scikit-image's `chelsea` (Stefan van der Walt, CC0 1.0).",
    "brick": "Background: crop of scikit-image's `brick` (CC0Textures Bricks25, CC0 1.0).",
    "noise": "Background: generated noise, no third-party content.",
}
REST = (
    "Handwritten digit: Optical Recognition of Handwritten Digits, as shipped in scikit-learn"
    " (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0)."
    " Number: rendered with a DejaVu font (Bitstream Vera licence)."
)


def background(name: str) -> Image.Image:
    """A photograph that scikit-image ships under CC0, or smoothed noise."""
    if name == "noise":
        rng = np.random.default_rng(SEED)
        coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        return coarse.resize((512, 512), Image.Resampling.BICUBIC)
    return Image.open(SKIMAGE / f"{name}.png").convert("RGB")


def main() -> None:
    """Draw the pictures and write samples.json beside them."""
    parser = argparse.ArgumentParser(description="Draw the sample pictures.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    studios = {name: Studio("test", [background(name)]) for name in BACKGROUNDS}
    record = []
    for i in range(COUNT):
        name = list(BACKGROUNDS)[i % len(BACKGROUNDS)]
        rng = np.random.default_rng((SEED, i))
        picture = studios[name].picture(rng, SQUARE)
        file = f"sample_{i:02d}.png"
        Image.fromarray(picture.pixels).save(folder / file, optimize=True)
        questions = [
            {"task": q.task, "question": q.text, "answer": q.answer} for q in ask_each(rng, picture)
        ]
        licence = f"{BACKGROUNDS[name]} {REST}"
        record.append(
            {"image": file, "background": name, "licence": licence, "questions": questions}
        )
    (folder / "samples.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
