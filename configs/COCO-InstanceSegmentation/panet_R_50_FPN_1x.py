# Model and schedule of panet_R_50_FPN_1x.yaml, for tools/lazyconfig_train_net.py.
from detectron2 import model_zoo

from ..common.models.mask_panet_fpn import model

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

model.backbone.bottom_up.freeze_at = 2
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
