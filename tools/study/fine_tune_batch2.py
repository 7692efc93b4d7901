"""Fine-tuning with two images a batch, for one epoch."""

_base_ = './fine_tune.py'

train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1, end=1)
