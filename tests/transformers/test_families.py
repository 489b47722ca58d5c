"""The table of families, and what a model is told of its pictures."""

from pathlib import Path

import pytest
import torch

from ep_backends.transformers.families import FAMILIES, picture_grids
from ep_core.plugins import registry

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
MERGING = {"vision_config": {"spatial_merge_size": 2}}


def test_the_page_shows_the_table():
    known = registry().families
    rows = [f"| {known[name].name} | {works} |" for name, works in FAMILIES.items()]
    assert "\n".join(["|---|---|", *rows, ""]) in PAGE.read_text()
    assert FAMILIES.keys() == known.keys()


@pytest.mark.parametrize(
    ("config", "given", "grids"),
    [
        (MERGING, {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 2]])}, [(2, 3), (4, 1)]),
        (MERGING, {"image_grid_thw": None}, []),
        (MERGING, {}, []),
        ({"vision_config": {}}, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, []),
        ({}, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, []),
    ],
)
def test_grids_are_those_of_merged_patches(config, given, grids):
    assert picture_grids(config, given) == grids
