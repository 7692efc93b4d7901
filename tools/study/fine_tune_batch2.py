"""Fine-tuning with two images a batch: one epoch of half of the images."""

_base_ = './fine_tune.py'

train_dataloader = dict(batch_size=2, dataset=dict(indices=6000))
train_cfg = dict(max_epochs=1)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1, end=1)
