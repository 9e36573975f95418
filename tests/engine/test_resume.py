import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.engine import default_argument_parser
from detectron2.engine.train_loop import AMPTrainer

from panet_d2.engine import Trainer, setup_config
from panet_d2.engine.main import setup
from panet_d2.engine.resume import ResumableAMPTrainer, changed_keys
from panet_d2.errors import CheckpointError


def trained(config_file, *opts):
    """A run of two steps, and a trainer that continues it with other values."""
    start = ["SOLVER.STEPS", "[]", "SOLVER.WARMUP_ITERS", "0"]
    first = setup_config(config_file, start)
    Trainer(first).train()
    trainer = Trainer(setup_config(config_file, [*start, "SOLVER.MAX_ITER", "4", *opts]))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    return trainer


def test_learning_rate_and_decay_are_those_of_the_config(config_file):
    opts = ("SOLVER.BASE_LR", "0.00001", "SOLVER.WEIGHT_DECAY", "0.5", "SOLVER.MOMENTUM", "0.5")
    trainer = trained(config_file, *opts)
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] == 1e-5 and group["momentum"] == 0.5
    assert max(g["weight_decay"] for g in trainer.optimizer.param_groups) == 0.5
    assert any("momentum_buffer" in s for s in trainer.optimizer.state.values())
    trainer.train()
    with open(f"{trainer.cfg.OUTPUT_DIR}/metrics.json", encoding="utf-8") as f:
        rates = [json.loads(line)["lr"] for line in f if '"lr"' in line]
    assert rates[-1] == 1e-5 and rates[0] != 1e-5


def test_schedule_goes_on_where_it_is(config_file):
    """The rate is that of the step, not of the start."""
    trainer = trained(config_file, "SOLVER.STEPS", "[1, 3]", "SOLVER.BASE_LR", "0.01")
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.OPTIMIZER", "ADAMW"], "SOLVER.OPTIMIZER must stay"),
        (["SOLVER.BIAS_LR_FACTOR", "2.0"], "BIAS_LR_FACTOR.* must stay"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "FREEZE_AT .* must stay .* MODEL.WEIGHTS"),
        (["MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR", "0.5"], "FC_FUSION.LR_FACTOR must stay"),
    ],
)
def test_state_of_another_optimizer_is_rejected(config_file, opts, message):
    with pytest.raises(CheckpointError, match=message):
        trained(config_file, *opts)


def test_changed_values_are_in_the_log(config_file, tmp_path, caplog):
    parse = default_argument_parser().parse_args
    setup(parse(["--config-file", config_file]))
    args = ["--config-file", config_file, "--resume", "SOLVER.BASE_LR", "0.5", "SEED", "3"]
    cfg = setup_config(config_file, args[3:])
    assert changed_keys(cfg) == {"SOLVER.BASE_LR": (0.5, 0.001), "SEED": (3, -1)}
    with caplog.at_level(logging.WARNING, "panet_d2"):
        logging.getLogger("panet_d2").propagate = True
        setup(parse(args))
    assert "SOLVER.BASE_LR 0.5 (was 0.001)" in caplog.text and "SEED 3 (was -1)" in caplog.text
    assert changed_keys(cfg) == {}  # config.yaml says what the run does now
    assert changed_keys(setup_config(config_file, ["OUTPUT_DIR", str(tmp_path / "new")])) == {}


def test_weights_that_are_not_used(config_file, caplog):
    parse = default_argument_parser().parse_args
    trained(config_file)
    cfg = setup_config(config_file, [])
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    logging.getLogger("panet_d2").propagate = True
    setup(parse(["--config-file", config_file, "--resume", "MODEL.WEIGHTS", "other.pth"]))
    assert "continues from" in caplog.text and "'other.pth' is not used" in caplog.text
    assert "other config values" not in caplog.text


def test_nothing_to_train(config_file, caplog):
    trained(config_file, "SOLVER.MAX_ITER", "2").train()
    assert "has all 2 steps of SOLVER.MAX_ITER, so there is nothing to train" in caplog.text


def test_more_steps_than_the_config_has(config_file):
    with pytest.raises(CheckpointError, match="MAX_ITER is 1, but .* already has 2 steps"):
        trained(config_file, "SOLVER.MAX_ITER", "1")


def test_a_subclass_with_the_loader_of_detectron2s_tutorials(config_file, caplog, monkeypatch):
    class Stock(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return super().build_train_loader(cfg)

    monkeypatch.setattr(sys.modules[__name__], "Trainer", Stock)
    trained(config_file).train()
    assert "Stock.build_train_loader has no argument for the first step" in caplog.text


@pytest.mark.parametrize("resume", [True, False])
def test_nothing_to_resume(config_file, caplog, resume):
    """A job may always start with --resume, but a wrong folder should not go unnoticed."""
    trainer = Trainer(setup_config(config_file, []))
    with caplog.at_level(logging.WARNING, "panet_d2"):
        logging.getLogger("panet_d2").propagate = True
        trainer.resume_or_load(resume=resume)
    assert ("no checkpoint to resume" in caplog.text) == resume


@pytest.mark.parametrize(
    "opts, warned",
    [
        (["MODEL.BACKBONE.FREEZE_AT", "2"], True),
        (["MODEL.RESNETS.NORM", "FrozenBN"], True),
        ([], False),
    ],
)
def test_random_weights_that_stay_frozen(config_file, caplog, opts, warned):
    trainer = Trainer(setup_config(config_file, opts))
    with caplog.at_level(logging.WARNING, "panet_d2"):
        logging.getLogger("panet_d2").propagate = True
        trainer.resume_or_load(resume=False)
    assert ("MODEL.BACKBONE.FREEZE_AT" in caplog.text) == warned
    assert warned or all(p.requires_grad for p in trainer.model.parameters())


def test_run_with_other_precision_is_continued(config_file):
    """A checkpoint without the state of AMP's scaler."""
    trainer = trained(config_file)
    state = trainer.state_dict()
    amp = Trainer(setup_config(config_file, []))
    amp.cfg.defrost()
    amp.cfg.SOLVER.AMP.ENABLED = True
    amp.cfg.freeze()
    amp = type(amp)(amp.cfg)
    assert "grad_scaler" not in state["_trainer"]
    amp.load_state_dict(state)
    assert amp.loop.iter == trainer.loop.iter > 0


def test_the_saved_scale_of_the_loss_is_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(AMPTrainer, "load_state_dict", lambda self, state: loaded.append(state))
    trainer = ResumableAMPTrainer.__new__(ResumableAMPTrainer)
    trainer.grad_scaler = SimpleNamespace(state_dict=lambda: {"scale": 65536.0})
    trainer.load_state_dict({"grad_scaler": {"scale": 512.0}})
    trainer.load_state_dict({})
    assert [state["grad_scaler"]["scale"] for state in loaded] == [512.0, 65536.0]
