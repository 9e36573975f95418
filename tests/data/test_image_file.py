import logging

import numpy as np
import pytest
from PIL import Image

from panet_d2.data.image_file import read_image_file
from panet_d2.errors import DataError

GRAY = np.arange(20, dtype=np.uint8).reshape(4, 5)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_reads(tmp_path, name, mode):
    Image.fromarray(GRAY).convert(mode).save(tmp_path / name)
    assert read_image_file(str(tmp_path / name)).shape == (4, 5, 3)
    assert read_image_file(str(tmp_path / name), "L").shape == (4, 5, 1)


@pytest.mark.parametrize(
    "name, dtype",
    [("a.png", np.uint16), ("a.tif", np.uint16), ("a.tif", np.int32), ("a.tif", "f4")],
)
def test_more_than_8_bits(tmp_path, name, dtype):
    Image.fromarray(GRAY.astype(dtype)).save(tmp_path / name)
    with pytest.raises(DataError, match=f"cannot use image .*{name}: it has more than 8 bits per"):
        read_image_file(str(tmp_path / name))


def test_broken(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(DataError, match="cannot read image .*a.png: "):
        read_image_file(str(tmp_path / "a.png"))


@pytest.mark.parametrize("name, warned", [("a.tif", True), ("a.mpo", False)])
def test_pages(tmp_path, caplog, monkeypatch, name, warned):
    monkeypatch.setattr(logging.getLogger("panet_d2"), "propagate", True)
    first, second = Image.fromarray(GRAY), Image.fromarray(GRAY + 9)
    first.save(tmp_path / name, save_all=True, append_images=[second, second])
    assert abs(read_image_file(str(tmp_path / name)).mean() - GRAY.mean()) < 2
    assert (f"{tmp_path / name} has 3 pages; only the first is used" in caplog.text) == warned
