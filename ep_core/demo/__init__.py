"""A small trained vision-language model and pictures: for demonstrations and tests only.

It knows coloured shapes, digits and numbers on synthetic pictures and nothing else. How it was
made and what it can do: benchmarks/embedded_model/README.md.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
PICTURES = Path(__file__).parent / "pictures"
