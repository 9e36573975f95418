import logging
from contextlib import nullcontext

import pytest
import torch

from panet_d2.engine import defaults, setup_config
from panet_d2.errors import ConfigError

from ..common import tiny_cfg


class TestSetupConfig:
    def test_file_and_overrides(self, config_file):
        cfg = setup_config(config_file, ["SOLVER.MAX_ITER", "5"])
        assert cfg.SOLVER.MAX_ITER == 5 and cfg.SOLVER.IMS_PER_BATCH == 2
        assert not cfg.is_frozen()

    @pytest.mark.parametrize("cuda", [True, False])
    def test_device_that_is_there(self, monkeypatch, caplog, cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(defaults, "check_device", lambda cfg: None)
        with caplog.at_level(logging.WARNING, "panet_d2"):
            logging.getLogger("panet_d2").propagate = True
            device = setup_config("").MODEL.DEVICE
        assert device == ("cuda" if cuda else "cpu")
        assert caplog.text.count("No CUDA device found") == (0 if cuda else 1)

    def test_device_that_is_named(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert setup_config("", ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"
        with pytest.raises(ConfigError, match="SOLVER.AMP.ENABLED"):
            setup_config("", ["SOLVER.AMP.ENABLED", "True"])
        # What was trained so can be evaluated and used there all the same.
        assert setup_config("", ["SOLVER.AMP.ENABLED", "True"], needed=()).SOLVER.AMP.ENABLED

    @pytest.mark.parametrize("device", ["cuda:99", "mps:3", "gpu", "meta", "cpu:x"])
    def test_device_that_does_not_work(self, device):
        with pytest.raises(ConfigError, match=f"MODEL.DEVICE is '{device}'.*'cpu'") as caught:
            setup_config("", ["MODEL.DEVICE", device])
        assert len(str(caught.value)) < 350

    @pytest.mark.parametrize("key", ["MODEL.FPN.NORM", "MODEL.RESNETS.NORM"])
    def test_norm_that_needs_gpus(self, monkeypatch, key):
        opts = ["MODEL.DEVICE", "cpu", key, "SyncBN"]
        setup_config("", opts)  # as BN in one process
        monkeypatch.setattr(defaults.comm, "get_world_size", lambda: 2)
        with pytest.raises(ConfigError, match=f"{key} is 'SyncBN'.*naiveSyncBN"):
            setup_config("", opts)
        setup_config("", [*opts[:3], "naiveSyncBN"])

    def test_cpu_in_processes_for_gpus(self, monkeypatch):
        monkeypatch.setattr(defaults.comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(defaults.dist, "is_initialized", lambda: True)
        for backend in ("gloo", "nccl"):
            monkeypatch.setattr(defaults.dist, "get_backend", lambda backend=backend: backend)
            expected = nullcontext()
            if backend == "nccl":
                message = "MODEL.DEVICE is 'cpu'.*CUDA_VISIBLE_DEVICES=''"
                expected = pytest.raises(ConfigError, match=message)
            with expected:
                defaults.check_device(tiny_cfg())

    @pytest.mark.parametrize("head", ["BOX", "MASK", "KEYPOINT"])
    def test_pooling_that_nothing_would_do(self, head):
        opts = [f"MODEL.ROI_{head}_HEAD.AFP.ENABLED", "True", "MODEL.ROI_HEADS.NAME"]
        for name in ("PANetROIHeads", "PANetCascadeROIHeads", "SomebodysROIHeads"):
            setup_config("", [*opts, name], needed=())
        with pytest.raises(ConfigError, match=f"ROI_{head}_HEAD.AFP.*'Standard.*PANetROIHeads"):
            setup_config("", [*opts, "StandardROIHeads"], needed=())

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
