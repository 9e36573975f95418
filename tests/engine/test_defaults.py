import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer

from panet_d2 import ConfigError
from panet_d2.checkpoint import CheckpointError
from panet_d2.engine import Predictor, Trainer, latest_checkpoint, setup_config

from ..common import batch, tiny_cfg, write_coco


@pytest.fixture
def config_file(tmp_path):
    """The tiny model as a YAML file, with a data set."""
    json_file, root = write_coco(tmp_path / "data")
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["engine_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["engine_squares"]),
        *("DATASETS.TEST", ["engine_squares"]),
        *("OUTPUT_DIR", str(tmp_path / "output")),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 2),
    )
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)


class TestSetupConfig:
    def test_file_and_overrides(self, config_file):
        cfg = setup_config(config_file, ["SOLVER.MAX_ITER", "5"])
        assert cfg.SOLVER.MAX_ITER == 5 and cfg.SOLVER.IMS_PER_BATCH == 2
        assert not cfg.is_frozen()

    @pytest.mark.parametrize("cuda", [True, False])
    def test_device_that_is_there(self, monkeypatch, caplog, cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        with caplog.at_level(logging.WARNING, "panet_d2"):
            logging.getLogger("panet_d2").propagate = True
            device = setup_config("").MODEL.DEVICE
        assert device == ("cuda" if cuda else "cpu")
        assert len(caplog.records) == (0 if cuda else 1)

    def test_device_that_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert setup_config("", ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"
        with pytest.raises(ConfigError, match="MODEL.DEVICE is 'cuda'.*'cpu'"):
            setup_config("", ["MODEL.DEVICE", "cuda"])
        with pytest.raises(ConfigError, match="SOLVER.AMP.ENABLED"):
            setup_config("", ["SOLVER.AMP.ENABLED", "True"])

    @pytest.mark.parametrize(
        "opts, message",
        [
            (["MODEL.ROI_BOX_HEAD.AFP.FUSE", "max"], "AFP.FUSE"),
            (["MODEL.ROI_BOX_HEAD.AFP.ENABLED", "maybe"], "AFP.ENABLED|ENABLED"),
            (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER"),
        ],
    )
    def test_bad_overrides(self, config_file, opts, message):
        with pytest.raises(ConfigError, match=message):
            setup_config(config_file, opts)

    def test_bad_files(self, tmp_path):
        with pytest.raises(ConfigError, match="lost.yaml"):
            setup_config(str(tmp_path / "lost.yaml"))
        path = tmp_path / "typo.yaml"
        path.write_text("VERSION: 2\nMODEL:\n  PANET: {}\n")
        with pytest.raises(ConfigError, match="typo.yaml.*MODEL.PANET"):
            setup_config(str(path))
        path.write_text("MODEL: [unclosed\n")
        with pytest.raises(ConfigError, match="typo.yaml"):
            setup_config(str(path))


class TestPredictor:
    def test_predicts(self, config_file, tmp_path):
        cfg = setup_config(config_file, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"])
        model = build_model(cfg).eval()
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
        cfg.freeze()
        image = batch(1)[0]["image"].permute(1, 2, 0).byte().numpy()
        predictor = Predictor(cfg)
        assert predictor(image)["instances"].pred_masks.shape[1:] == image.shape[:2]
        assert predictor.cfg.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
        for name, value in predictor.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name

    def test_refuses_weights_of_another_model(self, config_file, tmp_path):
        cfg = setup_config(config_file)
        stock = tiny_cfg("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        torch.save({"model": build_model(stock).state_dict()}, cfg.MODEL.WEIGHTS)
        with pytest.raises(CheckpointError, match="missing from it: backbone.pafpn_"):
            Predictor(cfg)


class TestTrainer:
    def test_starts_from_a_backbone(self, config_file, tmp_path):
        cfg = setup_config(config_file)
        source = build_model(cfg)
        state = {k: v for k, v in source.state_dict().items() if "bottom_up" in k}
        cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
        torch.save({"model": state}, cfg.MODEL.WEIGHTS)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        loaded = trainer.model.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
        assert trainer.start_iter == 0

    def test_refuses_half_a_backbone(self, config_file, tmp_path):
        cfg = setup_config(config_file)
        state = {k: v for k, v in build_model(cfg).state_dict().items() if "res4" not in k}
        cfg.MODEL.WEIGHTS = str(tmp_path / "half.pth")
        torch.save({"model": state}, cfg.MODEL.WEIGHTS)
        with pytest.raises(CheckpointError, match="missing from it: backbone.bottom_up.res4"):
            Trainer(cfg).resume_or_load(resume=False)

    def test_does_not_resume_into_another_model(self, config_file):
        cfg = setup_config(config_file)
        trainer = Trainer(cfg)
        trainer.checkpointer.save("model_0000000", iteration=0)
        assert latest_checkpoint(cfg.OUTPUT_DIR).endswith("model_0000000.pth")
        cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED = False
        with pytest.raises(
            CheckpointError, match="not in the model: roi_heads.mask_head.fc_fusion"
        ):
            Trainer(cfg).resume_or_load(resume=True)


class TestOptimizer:
    def test_default_is_detectron2s(self):
        cfg = tiny_cfg()
        model = build_model(cfg)
        ours, stock = Trainer.build_optimizer(cfg, model), build_optimizer(cfg, model)
        assert isinstance(ours, torch.optim.SGD)
        assert ours.param_groups[0]["momentum"] == stock.param_groups[0]["momentum"] == 0.9

    def test_adamw(self):
        cfg = tiny_cfg(
            *("SOLVER.OPTIMIZER", "ADAMW"),
            *("SOLVER.BASE_LR", 0.25),
            *("SOLVER.WEIGHT_DECAY", 0.5),
            *("SOLVER.WEIGHT_DECAY_NORM", 0.125),
            *("SOLVER.CLIP_GRADIENTS.ENABLED", True),
            *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-6),
        )
        model = build_model(cfg)
        optimizer = Trainer.build_optimizer(cfg, model)
        assert isinstance(optimizer, torch.optim.AdamW)
        decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        stem = model.backbone.bottom_up.stem.conv1
        assert decay[id(stem.weight)] == 0.5 and decay[id(stem.norm.weight)] == 0.125
        assert {g["lr"] for g in optimizer.param_groups} == {0.25}
        stem.weight.grad = torch.full_like(stem.weight, 100.0)
        optimizer.step()
        assert stem.weight.grad.norm() <= 2e-6  # clipped

    def test_unknown(self):
        cfg = tiny_cfg("SOLVER.OPTIMIZER", "LION")
        with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER.*'LION'.*'SGD', 'ADAMW'"):
            Trainer.build_optimizer(cfg, build_model(cfg))
