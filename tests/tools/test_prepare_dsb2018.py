from ..common import load_script
from ..data.test_dsb2018 import source  # noqa: F401 (a fixture)

tool = load_script("tools/prepare_dsb2018.py")


def test_counts_and_errors(source, tmp_path, capsys, monkeypatch):  # noqa: F811
    folder, _ = source
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    assert tool.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "dsb2018_train: 29 images, 87 nuclei" in printed
    assert (tmp_path / "datasets/dsb2018/annotations/instances_val.json").is_file()
    assert tool.main([str(folder)]) == 2
    assert "error: " in capsys.readouterr().err
