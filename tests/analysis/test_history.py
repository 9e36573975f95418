import json

import pytest

from panet_d2.analysis.history import evaluations, losses, read_history

LINES = [
    {"iteration": 0, "total_loss": 2.0},
    {"iteration": 1, "total_loss": 1.5},
    {"iteration": 2, "segm/AP": 10.0},
]


@pytest.mark.parametrize("end", ["", '{"iteration": 3, "total_l', "12", "\x00\x00", "\n\n", "é"])
def test_lines_that_were_cut_are_left_out(tmp_path, end):
    path = tmp_path / "metrics.json"
    text = "".join(json.dumps(line) + "\n" for line in LINES) + end
    path.write_bytes(text.encode("utf-8")[: -1 if end == "é" else None])
    history = read_history(str(path))
    assert history == LINES
    assert list(losses(history)) == [1, 2] and list(evaluations(history)) == [2]


def test_a_line_that_was_cut_before_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0, "total_loss": 2.0}\n{"iterat\n{"iteration": 1, "lr": 1}\n')
    assert [line["iteration"] for line in read_history(str(path))] == [0, 1]


def test_evaluations_without_losses():
    assert list(evaluations([{"iteration": i, "segm/AP": 1.0} for i in (9, 19)])) == [10, 20]
