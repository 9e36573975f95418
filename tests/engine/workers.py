"""What test_launch.py runs in several processes: one backward pass over a batch of two images."""

from __future__ import annotations

import argparse
import sys

import detectron2.utils.comm as comm
import torch
from detectron2.engine import create_ddp_model, default_argument_parser
from detectron2.modeling import build_model, proposal_generator, roi_heads
from detectron2.modeling.sampling import subsample_labels
from detectron2.utils.events import EventStorage

from panet_d2.engine import launch

from ..common import batch, tiny_cfg


def first_ones(labels, num_samples, positive_fraction, bg_label):
    """Detectron2's sampling without its chance, which differs from process to process."""
    shuffle, torch.randperm = torch.randperm, torch.arange
    try:
        return subsample_labels(labels, num_samples, positive_fraction, bg_label)
    finally:
        torch.randperm = shuffle


def gradients(args: argparse.Namespace) -> None:
    roi_heads.roi_heads.subsample_labels = proposal_generator.rpn.subsample_labels = first_ones
    torch.manual_seed(0)
    norms = [f"MODEL.{node}.NORM" for node in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
    cfg = tiny_cfg(
        *(part for norm in norms for part in (norm, "naiveSyncBN")),
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCNormHead"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4),
    )
    model = create_ddp_model(build_model(cfg), broadcast_buffers=False, device_ids=None)
    inputs = batch(2)  # the same in all processes
    rank, processes = comm.get_rank(), comm.get_world_size()
    with EventStorage():
        losses = model(inputs[rank::processes])
    sum(losses.values()).backward()
    means = {
        name: sum(comm.all_gather(float(value.detach()))) / processes
        for name, value in losses.items()
    }
    if comm.is_main_process():
        module = model.module if processes > 1 else model
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        torch.save({"processes": processes, "losses": means, "gradients": grads}, args.output)


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("what", choices=["gradients"])
    parser.add_argument("output")
    arguments = parser.parse_args(sys.argv[1:])
    launch(gradients, arguments)
