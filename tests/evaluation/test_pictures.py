import numpy as np

from panet_d2.evaluation import pictures


def test_outline_of_a_label_is_as_wide_as_its_letters():
    # Fonts have another advance for each thickness in OpenCV 5.
    canvas = np.full((40, 300, 3), 128, np.uint8)
    width = pictures._text(canvas, "missed by three pixels", (10, 25), (255, 255, 255))
    dark = np.flatnonzero((canvas[..., 0] < 110).any(0))
    light = np.flatnonzero((canvas[..., 0] > 145).any(0))
    assert 0.9 * width < light[-1] - light[0] <= width
    assert 0 < light[0] - dark[0] <= 2 and 0 < dark[-1] - light[-1] <= 2
