"""Small defects in real scans, from ImageNet weights: 15 epochs of 100 iterations.

Crops of 224×224 pixels take half the time of the config's.
"""

_base_ = '../../configs/odconv/retinanet_efficientnet-lite0_deeppcb.py'

train_pipeline = _base_.train_pipeline
train_pipeline[2].crop_size = (224, 224)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

train_cfg = dict(max_epochs=15, val_begin=10, val_interval=2)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=15, end=15)
