import numpy as np
import pytest

from panet_d2.analysis import pictures


def test_outline_of_a_label_is_as_wide_as_its_letters():
    # Fonts have another advance for each thickness in OpenCV 5.
    canvas = np.full((40, 300, 3), 128, np.uint8)
    width = pictures._text(canvas, "missed by three pixels", (10, 25), (255, 255, 255))
    dark = np.flatnonzero((canvas[..., 0] < 110).any(0))
    light = np.flatnonzero((canvas[..., 0] > 145).any(0))
    assert 0.9 * width < light[-1] - light[0] <= width
    assert 0 < light[0] - dark[0] <= 2 and 0 < dark[-1] - light[-1] <= 2


@pytest.fixture
def written(monkeypatch):
    """What is written, and where: the box x0, y0, x1, y1 of each text."""
    texts, write = [], pictures._text

    def record(canvas, text, at, color):
        width = write(canvas, text, at, color)
        texts.append((text, color, (at[0], at[1] - 12, at[0] + width, at[1])))
        return width

    monkeypatch.setattr(pictures, "_text", record)
    return texts


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_labels_do_not_cover_each_other(written):
    names = {1: "cross", 2: "triangle"}
    at_one_place = [
        {"category_id": category, "score": score, "bbox": [x, y, 60, 60]}
        for category, score, x, y in ((1, 0.91, 50, 40), (1, 0.53, 70, 41), (2, 0.66, 55, 48))
    ]
    at_the_corners = [
        {"category_id": 2, "score": 0.4, "bbox": [x, y, 10, 10]}
        for x, y in ((0, 0), (4, 3), (190, 0), (190, 190), (188, 195))
    ]
    canvas = np.zeros((200, 200, 3), np.uint8)
    entries = {pictures._FOUND: at_one_place, pictures._FALSE: at_the_corners}
    pictures._label(canvas, entries, names, 1)
    boxes = [box for _, _, box in written]
    assert len(boxes) == 8
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(x0 >= 0 and y0 >= 0 and x1 <= 200 and y1 <= 200 for x0, y0, x1, y1 in boxes)
    # The first stands right above the corner of its box.
    assert written[0][0] == "cross 91%" and boxes[0][0] == 50 and boxes[0][3] == 37


def test_more_labels_than_there_is_place_for_are_all_written(written):
    canvas = np.zeros((40, 60, 3), np.uint8)
    entries = [{"category_id": 1, "bbox": [0, 0, 9, 9]}] * 9
    pictures._label(canvas, {pictures._GROUND_TRUTH: entries}, {1: "cross"}, 1)
    assert len(written) == 9


def test_labels_have_the_colour_of_their_kind(written):
    class Coco:
        def getCatIds(self):
            return [1, 2]

        def loadCats(self, ids):
            return [{"id": 1, "name": "ring"}, {"id": 2, "name": "disc"}]

    found = {"category_id": 1, "score": 0.9, "bbox": [10, 20, 30, 30]}
    false = {"category_id": 2, "score": 0.8, "bbox": [60, 60, 30, 30]}
    truth = {"category_id": 1, "bbox": [11, 21, 30, 30]}
    match = pictures.ImageMatch(found=[found], objects=[truth], false_positives=[false])
    pictures.draw_comparison(np.zeros((100, 100, 3), np.uint8), [truth], match, Coco())
    colors = {text: color for text, color, _ in written}
    strongest = {text: color.index(max(color)) for text, color in colors.items()}
    assert (strongest["ring"], strongest["ring 90%"], strongest["disc 80%"]) == (2, 1, 0)
    assert min(min(colors[text]) for text in ("ring", "ring 90%", "disc 80%")) > 160
