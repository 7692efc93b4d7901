"""The study's task as COCO is trained: a classifier's weights and statistics, two images a batch.

The backbone's BatchNorms keep the classifier's statistics, and its first stage is frozen.
"""

_base_ = './pretrained.py'

model = dict(backbone=dict(norm_eval=True, frozen_stages=1))

train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1, end=1)
