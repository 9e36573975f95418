import re

import pytest

from panet_d2.engine import read_config
from panet_d2.engine.config_file import find_config_file
from panet_d2.errors import ConfigError
from panet_d2.model_zoo import get_config_file

NAME = "COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml"


@pytest.fixture
def write(tmp_path):
    def write(text, name="own.yaml", **kwargs):
        path = tmp_path / name
        path.write_text(text, **kwargs)
        return str(path)

    return write


@pytest.mark.parametrize("base", [f"panet_d2://{NAME}", f"[panet_d2://{NAME}]"])
def test_base_may_be_a_config_of_this_package(write, base):
    cfg = read_config(write(f"_BASE_: {base}\nSOLVER: {{BASE_LR: 0.5}}\n"))
    expected = read_config(get_config_file(NAME))
    assert cfg.SOLVER.BASE_LR == 0.5
    assert cfg.MODEL == expected.MODEL and cfg.MODEL.ROI_BOX_HEAD.AFP.ENABLED


def test_config_file_may_be_one_too():
    assert read_config(f"panet_d2://{NAME}") == read_config(get_config_file(NAME))
    assert find_config_file(f"panet_d2://{NAME}") == get_config_file(NAME)


def test_folder_of_a_run(tmp_path):
    message = f"{tmp_path} is a folder; give a file, such as {tmp_path / 'config.yaml'}."
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(str(tmp_path))


def test_base_beside_the_file(write):
    write("SEED: 7\n", "base.yaml")
    assert read_config(write("_BASE_: base.yaml\n")).SEED == 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "own.yaml has no config keys"),
        ("# nothing\n", "own.yaml has no config keys"),
        ("SEED\n", "own.yaml has no config keys"),
        ("- SEED\n", "own.yaml has no config keys"),
        ("_BASE_: own.yaml\n", "own.yaml: _BASE_ leads back"),
        ("_BASE_: lost.yaml\n", "lost.yaml does not exist; .* panet_d2://COCO-Inst"),
        ("_BASE_: panet_d2://lost.yaml\n", "panet_d2://lost.yaml"),
        ("SEED: [\n", "own.yaml"),
        ("SEED: 1\nMODEL: {}\nSEED: 2\n", "line 3: SEED occurs a second time"),
        ("MODEL: {RPN: {NMS_THRESH: 0.7, NMS_THRESH: 0.5}}\n", "MODEL.RPN.NMS_THRESH occurs"),
        ("VERSION: 1\n", "VERSION is 1; it must be 2"),
        ("SEEDS: 1\n", "own.yaml.*SEEDS"),
        ("DATASETS: {TRAIN: name}\n", "own.yaml.*DATASETS.TRAIN"),
        ("SOLVER: {MAX_ITER: null}\n", "SOLVER.MAX_ITER is None"),
    ],
)
def test_file_that_cannot_be_used_is_named(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(write(text))
    assert "RecursionError" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_any_locale(write, encoding, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *args: "ascii")
    path = write("OUTPUT_DIR: Läufe/細胞\n", encoding=encoding)
    assert read_config(path).OUTPUT_DIR == "Läufe/細胞"
