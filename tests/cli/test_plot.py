"""The plot of an entropy profile."""

import numpy as np
import pytest
from PIL import Image

from entropyprune.cli.plot import plot_profile
from ep_core.ecl import Collapse, EntropyProfile


@pytest.mark.parametrize("layer", [3, None], ids=["collapse", "none"])
def test_the_plot_is_a_png_with_something_on_it(tmp_path, layer):
    rng = np.random.default_rng(0)
    samples = 0.5 + 0.1 * rng.random((20, 12))
    profile = EntropyProfile("a model", tuple(map(tuple, samples.tolist())))
    collapse = Collapse(layer, 3, 0.2, 4.0, 1.0, 1.0, "a reason")
    path = tmp_path / "profile.png"
    plot_profile(profile, collapse, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50, "one colour: nothing was drawn"
    red = ((pixels == (214, 39, 40)).all(axis=1)).sum()  # the line at the collapse layer
    assert (red > 100) == (layer is not None), f"{red} red pixels for layer {layer}"
