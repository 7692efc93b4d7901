"""The study's task with two images a batch, as people train on large images: one epoch."""

_base_ = './shapes.py'

train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1, end=1)
