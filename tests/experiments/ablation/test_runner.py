import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from os import cpu_count

import pytest
import torch

from experiments.ablation import runner
from experiments.ablation.runner import Run, RunFailed, pretrained_resnet, result_of, run_all
from panet_d2.engine.hooks import STOPPED

from ...common import ROOT

RUN = Run("+mst", 2, "config.yaml", ("A", 1))
LOG = "Total inference pure compute time: 0:00:13 ({} s / iter per device, on 1 devices)\n"


def write_output(folder):
    """A run of four steps that was killed after the third and resumed from the second."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"iteration": 1, "time": 1.0, "total_loss": 3.0, "segm/AP": 10.0, "bbox/AP": 11.0},
        {"iteration": 2, "time": 9.0, "total_loss": 9.0},
        {"iteration": 2, "time": 2.0, "total_loss": 2.0},
        {"iteration": 3, "time": 4.0, "total_loss": 1.0},
        {"iteration": 4, "segm/AP": 20.0, "segm/AP50": 30.0},  # as Detectron2 counts at the end
    ]
    (folder / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "log.txt").write_text(LOG.format("0.5") + LOG.format("0.25"))


def write_train_net(folder, *lines):
    """Write a program that replaces ``train_net.py`` and works in its own folder."""
    path = folder / "train_net.py"
    start = ["import json, os, shutil, sys, time", f"os.chdir({str(folder)!r})"]
    path.write_text("\n".join([*start, *lines]))
    return str(path)


# Writes its process id, and ends when a file "end" appears.
ENDLESS = [
    "with open('pid.new', 'w') as f:",
    "    f.write(str(os.getpid()))",
    "os.rename('pid.new', 'pid')",
    "while not os.path.exists('end'):",
    "    time.sleep(0.02)",
    "sys.exit('ended as told')",
]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited for too long"
        time.sleep(0.02)


def test_result_of_a_resumed_run(tmp_path):
    write_output(tmp_path)
    assert result_of(RUN, str(tmp_path)) == {
        "rung": "+mst",
        "seed": 2,
        "settings": {"config": "config.yaml", "A": "1"},
        "steps": 4,
        "results": {"segm/AP": 20.0, "segm/AP50": 30.0},
        "curve": {2: 10.0, 4: 20.0},
        "losses": {2: 3.0, 3: 2.0, 4: 1.0},
        "seconds_per_step": 2.0,
        "seconds_per_image": 0.25,
    }


def test_a_model_that_finds_nothing_has_no_ap(tmp_path):
    """Detectron2 then reports nan for boxes and no key for masks."""
    write_output(tmp_path)
    with open(tmp_path / "metrics.json", "a") as f:
        f.write('\n{"iteration": 5, "time": 1.0, "total_loss": 1.0}')
        f.write('\n{"iteration": 6, "bbox/AP": NaN, "bbox/AP50": NaN}')
    result = result_of(RUN, str(tmp_path))
    assert result["steps"] == 6 and result["curve"] == {2: 10.0, 5: 20.0, 6: 0.0}
    kinds = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert result["results"] == {f"{task}/{k}": 0.0 for task in ("bbox", "segm") for k in kinds}


def test_a_run_is_a_training_run(tmp_path):
    write_output(tmp_path / "output")
    train_net = write_train_net(
        tmp_path,
        "with open('command.json', 'w') as f:",
        "    json.dump([sys.argv, os.environ['OMP_NUM_THREADS']], f)",
        f"shutil.copytree({str(tmp_path / 'output')!r}, sys.argv[-1], dirs_exist_ok=True)",
    )
    (tmp_path / "results").mkdir()
    runner.execute(RUN, str(tmp_path / "work"), str(tmp_path / "results"), train_net, 3)
    command, threads = json.loads((tmp_path / "command.json").read_text())
    assert threads == "3"
    assert command[:6] == [train_net, "--config-file", "config.yaml", "--resume", "A", "1"]
    assert command[6:] == ["SEED", "2", "OUTPUT_DIR", str(tmp_path / "work/+mst_seed2")]
    written = json.loads((tmp_path / "results/+mst_seed2.json").read_text())
    assert written["results"]["segm/AP"] == 20.0 and written["wall_seconds"] >= 0
    assert len(list((tmp_path / "results").iterdir())) == 1


def test_what_is_done_is_not_done_again(tmp_path):
    runs = [Run("baseline", seed, "config.yaml", ()) for seed in range(4)]
    done = []

    def execute(run, work, results, train_net, threads):
        assert threads is None or threads * 2 <= max(2, cpu_count())  # two at a time share cores
        done.append(run.seed)
        if run.seed == 2:
            raise RunFailed("seed 2 broke")
        written = json.dumps({"settings": run.settings})
        (tmp_path / f"{run.name}.json").write_text(written)

    assert run_all(runs[:2], "work", str(tmp_path), "train_net.py", execute=execute) == []
    failures = run_all(runs, "work", str(tmp_path), "train_net.py", jobs=2, execute=execute)
    assert failures == ["seed 2 broke"] and sorted(done) == [0, 1, 2, 3]
    run_all(runs, "work", str(tmp_path), "train_net.py", execute=execute)
    assert sorted(done) == [0, 1, 2, 2, 3]


def test_ctrl_c_starts_no_other_run(tmp_path, monkeypatch):
    """The run that is under way is terminated as well."""
    runs = [Run("baseline", seed, "config.yaml", ()) for seed in range(4)]
    started, interrupted = [], threading.Event()

    def execute(run, *args):
        started.append(run.seed)
        assert interrupted.wait(10)

    def as_completed(futures):
        while not started:
            time.sleep(0.01)
        threading.Timer(0.2, interrupted.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "as_completed", as_completed)
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, "work", str(tmp_path), "train_net.py", execute=execute)
    assert started == [0]


def heed_sigint():
    """Programs that a shell starts in the background ignore it, and so do their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start_tool(tmp_path):
    """Start a program that trains, and wait for its training process."""
    tools = []

    def start(program):
        command = [sys.executable, "-W", "ignore", "-c", program]
        tools.append(subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_sigint))
        wait_for((tmp_path / "pid").exists)
        return tools[-1]

    yield start
    (tmp_path / "end").touch()
    for tool in tools:
        tool.kill()
        tool.wait()


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, STOPPED), (signal.SIGINT, -2)])
def test_the_end_of_the_tool_is_that_of_its_runs(sent, status, start_tool, tmp_path):
    """``kill`` reaches the tool alone. A training process that lives on would block a new run."""
    train_net = write_train_net(tmp_path, *ENDLESS)
    tool = start_tool(
        "import sys; import experiments.ablation.__main__ as ablation; "
        f"ablation.TRAIN_NET = {train_net!r}; "
        f"sys.exit(ablation.main(['--quick', '--results', {str(tmp_path / 'results')!r}, "
        f"'--work', {str(tmp_path / 'work')!r}]))"
    )
    training = int((tmp_path / "pid").read_text())
    tool.send_signal(sent)
    assert tool.wait(60) == status
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)


def test_a_run_has_one_process(start_tool, tmp_path):
    """Also after the tool was killed and while its training process lives on."""
    arguments = (str(tmp_path), str(tmp_path), write_train_net(tmp_path, *ENDLESS))
    tool = start_tool(
        "from experiments.ablation import runner; "
        f"runner.execute(runner.Run('+mst', 2, 'config.yaml', ('A', 1)), *{arguments!r})"
    )
    with pytest.raises(RunFailed, match=r"\+mst_seed2 is .* another process"):
        runner.execute(RUN, *arguments)
    tool.kill()
    tool.wait()
    with pytest.raises(RunFailed, match=r"\+mst_seed2 is .* another process"):
        runner.execute(RUN, *arguments)

    def may_run():
        try:
            runner.execute(RUN, *arguments)
        except RunFailed as e:
            return "ended with 1" in str(e)

    (tmp_path / "end").touch()
    wait_for(may_run)


def test_what_another_process_has_done_meanwhile_is_not_done_again(tmp_path):
    runs = [Run("baseline", seed, "config.yaml", ()) for seed in range(2)]
    done = []

    def execute(run, *args):
        done.append(run.seed)
        for each in runs:
            (tmp_path / f"{each.name}.json").write_text(json.dumps({"settings": each.settings}))

    assert run_all(runs, "work", str(tmp_path), "train_net.py", execute=execute) == []
    assert done == [0]


def test_settings_have_no_folders():
    opts = ("SOLVER.STEPS", [3, 4], "MODEL.WEIGHTS", "/somewhere/resnet.pth")
    settings = {"config": "c.yaml", "SOLVER.STEPS": "[3, 4]", "MODEL.WEIGHTS": "resnet.pth"}
    assert Run("baseline", 1, "/home/c.yaml", opts).settings == settings


def test_runs_of_other_settings_do_not_count(tmp_path):
    def execute(run, *args):
        pytest.fail("nothing may be trained")

    path = tmp_path / f"{RUN.name}.json"
    for settings in ({"config": "config.yaml", "A": "2"}, {"config": "config.yaml"}, {}):
        path.write_text(json.dumps({"settings": settings}))
        with pytest.raises(RunFailed, match=r"mst_seed2.json .*(A|config) (2|None), now"):
            run_all(
                [Run("+ff", 2, "config.yaml", ()), RUN],
                "work",
                str(tmp_path),
                "train_net.py",
                execute=execute,
            )


def test_a_run_begun_with_other_settings_does_not_go_on(tmp_path):
    train_net = tmp_path / "train_net.py"
    train_net.write_text("import sys; sys.exit('broken')")
    run = partial(runner.execute, work=str(tmp_path), results="", train_net=str(train_net))
    for _ in range(2):  # the same run is resumed
        with pytest.raises(RunFailed, match="ended with 1"):
            run(RUN)
    with pytest.raises(RunFailed, match="other settings.*A 1, now 3"):
        run(Run(RUN.rung, RUN.seed, RUN.config_file, ("A", 3)))


def test_resnet_is_trained_once(tmp_path, monkeypatch):
    trained = []

    def execute(run, work, results, train_net):
        trained.append((run, results, train_net))
        folder = tmp_path / run.name
        folder.mkdir()
        weights = {
            "backbone.bottom_up.stem.w": torch.ones(2),
            "backbone.fpn_lateral2.w": torch.ones(3),
        }
        torch.save({"model": weights, "iteration": 9}, folder / "model_final.pth")

    monkeypatch.setattr(runner, "execute", execute)
    for _ in range(2):
        path = pretrained_resnet(RUN, str(tmp_path), "results", "train_net.py")
    assert trained == [(RUN, "results", "train_net.py")]
    ((name, weight),) = torch.load(path)["model"].items()
    assert name == "backbone.bottom_up.stem.w" and weight.tolist() == [1, 1]


def test_a_failure_names_its_log(tmp_path):
    run = Run("baseline", 1, str(tmp_path / "missing.yaml"), ())
    train_net = tmp_path / "train_net.py"
    train_net.write_text("import sys; sys.exit('broken')")
    with pytest.raises(RunFailed, match="baseline_seed1 ended with 1.*console.txt"):
        runner.execute(run, str(tmp_path), str(tmp_path), str(train_net))
    assert "broken" in (tmp_path / "baseline_seed1/console.txt").read_text()
    assert not (tmp_path / "baseline_seed1.json").exists()
