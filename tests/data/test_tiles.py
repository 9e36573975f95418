import numpy as np
import pytest

from panet_d2.data.tiles import files_by_image, windows
from panet_d2.errors import DataError


@pytest.mark.parametrize("width, height", [(100, 100), (101, 250), (30, 170), (99, 40)])
@pytest.mark.parametrize("overlap", [0, 20, 99])
def test_tiles_cover_the_image(width, height, overlap):
    seen = np.zeros((height, width), int)
    for x0, y0, x1, y1 in windows(width, height, 100, overlap):
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert (x1 - x0, y1 - y0) == (min(width, 100), min(height, 100))
        seen[y0:y1, x0:x1] += 1
    assert seen.min() >= 1


def test_neighbours_share_the_overlap():
    assert windows(260, 10, 100, 20) == [(x, 0, x + 100, 10) for x in (0, 80, 160)]
    assert windows(250, 10, 100, 20) == [(x, 0, x + 100, 10) for x in (0, 80, 150)]


@pytest.mark.parametrize("overlap", [-1, 100])
def test_overlap_that_cannot_be(overlap):
    with pytest.raises(DataError, match=f"--overlap is {overlap} and --size 100"):
        windows(10, 10, 100, overlap)


def test_linked_folders_are_searched(tmp_path):
    """As iSAID's images, which are DOTA's."""
    (tmp_path / "dota").mkdir()
    (tmp_path / "dota/P0001.png").touch()
    (tmp_path / "isaid").mkdir()
    (tmp_path / "isaid/images").symlink_to(tmp_path / "dota")
    found = files_by_image(str(tmp_path / "isaid"), ".png")
    assert found == {"P0001": str(tmp_path / "isaid/images/P0001.png")}
