import logging
import os
import re
import resource
import signal
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage, get_event_storage
from torch.utils._python_dispatch import TorchDispatchMode

from panet_d2.checkpoint import RunCheckpointer
from panet_d2.data.train_loader import seed_all
from panet_d2.engine import Trainer, latest_checkpoint, setup_config, trainer
from panet_d2.engine.hooks import StopOnSignal
from panet_d2.errors import CheckpointError, ConfigError, TrainingDiverged

from ..common import batch, tiny_cfg


@pytest.fixture
def op(monkeypatch):
    """Lets models with deformable convs be made, though not run, where they are not compiled."""

    class DeformConv(Conv2d):
        def __init__(self, *args, deformable_groups, **kwargs):
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("detectron2.modeling.backbone.resnet.DeformConv", DeformConv)


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
        with pytest.raises(CheckpointError, match="not in the ch.*: backbone.bottom_up.res4"):
            Trainer(cfg).resume_or_load(resume=False)

    def test_a_backbone_without_deformable_convs_starts_one_with(self, config_file, tmp_path, op):
        """Their offsets are in no classifier's weights."""
        depth = ("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256")
        cfg = setup_config(config_file, depth)
        state = {k: v for k, v in build_model(cfg).state_dict().items() if "bottom_up" in k}
        cfg.MODEL.WEIGHTS = str(tmp_path / "plain.pth")
        torch.save({"model": state}, cfg.MODEL.WEIGHTS)
        cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, False, True]
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        loaded = trainer.model.state_dict()
        assert any("conv2_offset" in k for k in loaded)
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
        del state["backbone.bottom_up.res5.0.conv2.weight"]
        torch.save({"model": state}, cfg.MODEL.WEIGHTS)
        with pytest.raises(CheckpointError, match="1 not in the ch.*: .*res5.0.conv2.weight"):
            Trainer(cfg).resume_or_load(resume=False)

    def test_checkpoints_have_the_names_of_the_classes(self, config_file):
        cfg = setup_config(config_file)
        Trainer(cfg).checkpointer.save("model_0000000", iteration=0)
        content = torch.load(latest_checkpoint(cfg.OUTPUT_DIR), weights_only=True)
        assert content["categories"] == [[1, "class0"], [2, "class1"], [3, "class2"]]

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


def run(config_file, *opts, resume=False):
    """A whole run in this process; its weights."""
    cfg = setup_config(config_file, [str(o) for o in opts])
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all(max(cfg.SEED, 0))  # as default_setup does
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def stop_at(monkeypatch, step):
    """Kill the run in the middle of a step."""
    real = Trainer.run_step

    def run_step(self):
        real(self)
        if self.iter == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run_step", run_step)


@pytest.mark.parametrize("scheduler", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_steps_that_are_not_reached(caplog, scheduler):
    """The cosine has no steps, so there is nothing to warn of."""
    cfg = tiny_cfg(
        *("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", (40, 100, 150), "SOLVER.WARMUP_ITERS", 0),
        *("SOLVER.LR_SCHEDULER_NAME", scheduler, "SOLVER.BASE_LR", 1.0),
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Trainer.build_lr_scheduler(cfg, optimizer)
    for _ in range(50):
        optimizer.step(), schedule.step()
    stepped = scheduler == "WarmupMultiStepLR"
    assert schedule.get_last_lr() == [pytest.approx(0.1 if stepped else 0.5)]
    assert ("steps from MAX_ITER on are ignored" in caplog.text) == stepped


class TestResume:
    OPTS = (
        *("SEED", 3),
        *("DATASETS.TEST", "()"),
        *("SOLVER.MAX_ITER", 6),
        *("SOLVER.STEPS", "(3,)"),
        *("SOLVER.WARMUP_ITERS", 4),
        *("SOLVER.CHECKPOINT_PERIOD", 2),
        *("SOLVER.BASE_LR", 0.01),
        *("INPUT.MIN_SIZE_TRAIN", "(48, 64)"),
    )

    @pytest.mark.parametrize(
        "opts",
        [
            pytest.param((), marks=pytest.mark.slow),
            ("SOLVER.OPTIMIZER", "ADAMW", "DATALOADER.NUM_WORKERS", "2"),
            (
                *("MODEL.FPN.NORM", "BN", "TEST.PRECISE_BN.ENABLED", "True"),
                *("TEST.PRECISE_BN.NUM_ITER", "3", "TEST.EVAL_PERIOD", "2"),
            ),
        ],
        ids=["sgd", "adamw-workers", "precise-bn"],
    )
    def test_killed_and_resumed_is_as_never_killed(self, config_file, tmp_path, monkeypatch, opts):
        opts = (*self.OPTS, *opts)
        expected = run(config_file, *opts, "OUTPUT_DIR", tmp_path / "whole")
        opts = (*opts, "OUTPUT_DIR", tmp_path / "killed")
        for step in (2, 4):
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                stop_at(m, step)
                run(config_file, *opts, resume=True)
        torch.manual_seed(7)  # nothing may depend on what is left of this
        assert same(run(config_file, *opts, resume=True), expected)

    def test_killed_before_the_last_save(self, config_file, tmp_path, monkeypatch):
        """All steps are done and in a checkpoint, but not in that of the end."""
        opts = (*self.OPTS, "OUTPUT_DIR", tmp_path / "killed")
        real = RunCheckpointer.save

        def save(self, name, **kwargs):
            if name == "model_final":
                raise KeyboardInterrupt
            real(self, name, **kwargs)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(RunCheckpointer, "save", save)
            run(config_file, *opts)
        assert latest_checkpoint(str(tmp_path / "killed")).endswith("model_0000005.pth")
        weights = run(config_file, *opts, resume=True)
        final = torch.load(tmp_path / "killed/model_final.pth")
        assert final["iteration"] == 5 and same(final["model"], weights)
        before = (tmp_path / "killed/model_final.pth").stat().st_mtime_ns
        run(config_file, *opts, resume=True)  # nothing is left to do
        assert (tmp_path / "killed/model_final.pth").stat().st_mtime_ns == before

    def test_the_seed_matters(self, config_file, tmp_path):
        seeds = [
            run(config_file, *self.OPTS, "SEED", seed, "OUTPUT_DIR", tmp_path / str(seed))
            for seed in (3, 4)
        ]
        assert not same(*seeds)

    def test_each_process_draws_its_own_numbers(self, config_file, monkeypatch):
        """In a step, by its rank: otherwise all would sample the same proposals."""
        drawn = []
        monkeypatch.setattr(
            "detectron2.engine.DefaultTrainer.run_step",
            lambda self: drawn.append(torch.rand(()).item()),
        )
        trainer = Trainer(setup_config(config_file, ["SEED", "3"]))
        trainer.iter = 5
        for rank in (0, 1, 0):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            trainer.run_step()
        assert drawn[0] == drawn[2] != drawn[1]

    def test_without_a_seed_it_resumes_all_the_same(self, config_file, monkeypatch):
        opts = (*self.OPTS, "SEED", -1)
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            stop_at(m, 2)
            run(config_file, *opts)
        run(config_file, *opts, resume=True)
        assert latest_checkpoint(setup_config(config_file).OUTPUT_DIR).endswith("model_final.pth")


class TestDiverged:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_says_step_losses_and_images(self, config_file, monkeypatch, value):
        real = FastRCNNOutputLayers.losses

        def losses(self, *args):
            ret = real(self, *args)
            if get_event_storage().iter == 1:
                ret["loss_cls"] = ret["loss_cls"] * value
            return ret

        monkeypatch.setattr(FastRCNNOutputLayers, "losses", losses)
        with pytest.raises(TrainingDiverged) as e:
            run(config_file, "SEED", 3)
        message = str(e.value)
        assert message.startswith("step 1: a loss is not finite")
        assert f"loss_cls {value}" in message and re.search(r"loss_mask \d", message)
        assert len(re.findall(r"images/\d{3}\.png", message)) == 2  # the batch

    def test_weights_that_are_nan(self, config_file, monkeypatch):
        """The RPN notices before there are any losses; those of the step before are shown."""
        real = Trainer.run_step

        def run_step(self):
            if self.iter == 1:
                self.model.proposal_generator.rpn_head.conv.bias.data.fill_(float("nan"))
            real(self)

        monkeypatch.setattr(Trainer, "run_step", run_step)
        with pytest.raises(TrainingDiverged, match=r"step 1: .*\d{3}\.png") as e:
            run(config_file, "SEED", 3)
        assert re.search(r"step before: .*loss_mask \d", str(e.value))


class OnDevice(torch.Tensor):
    """A tensor like one of a GPU: each call for which a program would wait for it is recorded."""

    waits = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name not in ("cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__", "to"):
            return super().__torch_function__(func, types, args, kwargs)
        cls.waits.append(name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(torch.Tensor) if name in ("cpu", "to") else result


class WaitingOps(TorchDispatchMode):
    """Counts the operators whose result has to reach the CPU, or whose size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += masks or name in self.NAMES
        return func(*args, **(kwargs or {}))


class TestWaiting:
    """A step waits for the GPU only where Detectron2's own does."""

    def test_losses_are_fetched_once(self, config_file, monkeypatch):
        monkeypatch.setattr(OnDevice, "waits", [])
        opts = ("SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "100")
        trainer = Trainer(setup_config(config_file, opts))
        names = set()

        def to_device(model, inputs, losses):
            names.update(losses)
            return {name: loss.as_subclass(OnDevice) for name, loss in losses.items()}

        trainer.loop.model.register_forward_hook(to_device)
        trainer.train()
        assert len(names) == 5 and OnDevice.waits == ["cpu"] * 3 * len(names)
        ours, OnDevice.waits = OnDevice.waits, []
        stock = SimpleTrainer(trainer.loop.model, trainer.loop.data_loader, trainer.loop.optimizer)
        stock.train(0, 3)
        assert OnDevice.waits.count("cpu") == len(ours)

    def test_stop_flag_is_shared_by_cpus(self, monkeypatch):
        seen = []
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        monkeypatch.setattr("detectron2.utils.comm._get_global_gloo_group", lambda: "gloo")
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)

        def all_gather_object(output, flag, group):
            seen.append(group)
            output[:] = [flag, flag]

        monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
        hook = StopOnSignal(checkpointer=None)
        hook.trainer = SimpleNamespace(iter=3, max_iter=10)
        hook.after_step()
        assert seen == ["gloo"]

    def test_model(self):
        """Against Mask R-CNN, whose poolers ask for the boxes of each level."""
        counts = []
        stock = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
        stock += ("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False, "MODEL.ROI_MASK_HEAD.AFP.ENABLED", False)
        stock += ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
        for opts in ((), stock):
            model, inputs = build_model(tiny_cfg(*opts)).train(), batch()
            with EventStorage(), WaitingOps() as seen:
                sum(model(inputs).values()).backward()
            counts.append(seen.count)
        assert 0 < counts[0] <= counts[1]


class TestFullDisk:
    def test_the_checkpoint_before_is_intact(self, config_file, tmp_path, monkeypatch):
        """The operating system refuses to write more than a limit, as it does on a full disk."""
        opts = ("SEED", 3, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 1)
        output = tmp_path / "output"
        with monkeypatch.context() as m:
            stop_at(m, 0)
            with pytest.raises(KeyboardInterrupt):
                run(config_file, *opts)
        monkeypatch.undo()
        trainer = Trainer(setup_config(config_file, [str(o) for o in opts]))
        trainer.checkpointer.save("model_0000000", iteration=0)
        before = {p.name: p.read_bytes() for p in output.iterdir() if p.suffix == ".pth"}
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="cannot write checkpoint model_0000001.pth"):
                trainer.checkpointer.save("model_0000001", iteration=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert {p.name: p.read_bytes() for p in output.iterdir() if ".pth" in p.name} == before
        assert latest_checkpoint(str(output)).endswith("model_0000000.pth")
        run(config_file, *opts, resume=True)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), KeyError("x")])
def test_only_what_the_disk_does_is_a_checkpoint_that_cannot_be_written(
    error, tmp_path, monkeypatch
):
    class Broken:
        def state_dict(self):
            raise error

    checkpointer = RunCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), extra=Broken())
    with pytest.raises(type(error)) as e:
        checkpointer.save("model_0000001")
    assert e.value is error


class TestTimeAugmentation:
    @pytest.mark.parametrize(
        "opts, message",
        [
            (("MODEL.META_ARCHITECTURE", "RetinaNet"), "TEST.AUG.ENABLED.*ARCHITECTURE RetinaNet"),
            (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "TEST.AUG.ENABLED.*PanopticFPN"),
            (("MODEL.KEYPOINT_ON", True), "TEST.AUG.FLIP.*keypoints"),
            (("MODEL.LOAD_PROPOSALS", True), "TEST.AUG.ENABLED.*MODEL.LOAD_PROPOSALS"),
        ],
    )
    def test_what_it_cannot_do_is_refused_at_once(self, opts, message):
        Trainer.check_test_aug(tiny_cfg(*opts))  # which it is not asked for
        with pytest.raises(ConfigError, match=message):
            Trainer.check_test_aug(tiny_cfg("TEST.AUG.ENABLED", True, *opts))

    def test_rcnn_of_any_kind(self):
        Trainer.check_test_aug(tiny_cfg("TEST.AUG.ENABLED", True))
        Trainer.check_test_aug(tiny_cfg("TEST.AUG.ENABLED", True, "MODEL.MASK_ON", False))


def options_by_parameter(optimizer):
    return {
        id(p): {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_a_program_that_sets_up_no_logging_sees_the_losses(config_file):
    logger = logging.getLogger("detectron2")
    logger.setLevel(logging.WARNING)
    Trainer(setup_config(config_file))
    assert logger.isEnabledFor(logging.INFO) and logger.handlers


class TestOptimizer:
    def test_default_is_detectron2s(self):
        cfg = tiny_cfg(
            *("SOLVER.BIAS_LR_FACTOR", 2.0),
            *("SOLVER.WEIGHT_DECAY_BIAS", 0.0),
            *("SOLVER.WEIGHT_DECAY_NORM", 0.25),
            *("SOLVER.NESTEROV", True),
        )
        model = build_model(cfg)
        ours, stock = Trainer.build_optimizer(cfg, model), build_optimizer(cfg, model)
        assert isinstance(ours, torch.optim.SGD)
        assert options_by_parameter(ours) == options_by_parameter(stock)

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

    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    @pytest.mark.parametrize("name", ["SGD", "ADAMW"])
    def test_takes_all_parameters_at_once_on_a_gpu(self, name, device):
        """A loop over parameters launches thousands of kernels; a fused step ignores clipping."""
        cfg = tiny_cfg("SOLVER.OPTIMIZER", name)
        model = build_model(cfg)
        cfg.MODEL.DEVICE = device
        defaults = Trainer.build_optimizer(cfg, model).defaults
        assert defaults["foreach"] and not defaults.get("fused")

    @pytest.mark.parametrize("name", ["SGD", "ADAMW"])
    def test_fully_connected_fusion_has_its_own_rate(self, name):
        cfg = tiny_cfg("SOLVER.OPTIMIZER", name, "SOLVER.BASE_LR", 0.5)
        cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR = 0.25
        model = build_model(cfg)
        expected = {id(p): 0.5 for p in model.parameters() if p.requires_grad}
        fusion = model.roi_heads.mask_head.fc_fusion
        expected.update({id(p): 0.125 for p in fusion.fc.parameters()})
        rates = options_by_parameter(Trainer.build_optimizer(cfg, model))
        assert {p: options["lr"] for p, options in rates.items()} == expected

    def test_unknown(self):
        cfg = tiny_cfg("SOLVER.OPTIMIZER", "LION")
        with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER.*'LION'.*'SGD', 'ADAMW'"):
            Trainer.build_optimizer(cfg, build_model(cfg))


def test_augmented_views_are_of_the_whole_image(monkeypatch):
    """The views are made of the image in its file's size."""
    seen = []
    monkeypatch.setattr(trainer, "RCNNWithTTA", lambda cfg, model: model)
    monkeypatch.setattr(trainer, "inference_on_dataset", lambda *args: {})
    monkeypatch.setattr(trainer, "print_csv_format", lambda results: None)
    monkeypatch.setattr(Trainer, "build_evaluator", lambda *args: None)
    monkeypatch.setattr(
        Trainer, "build_test_loader", lambda cfg, name: seen.append(cfg.INPUT.MIN_SIZE_TEST) or []
    )
    Trainer.test_with_tta(tiny_cfg("DATASETS.TEST", ["a"]), None)
    assert seen == [0]
