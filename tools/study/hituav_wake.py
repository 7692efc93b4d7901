"""Do attentions wake up? 200 iterations of HIT-UAV; only the last stage and the head learn."""

_base_ = './hituav_lite0.py'

model = dict(backbone=dict(frozen_stages=5))
train_dataloader = dict(dataset=dict(indices=1600))

train_cfg = dict(max_epochs=1, val_begin=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1, end=1)
