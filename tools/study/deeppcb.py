"""The study's other task: small defects in real scans, 100 iterations an epoch."""

_base_ = ['./base.py', '../../configs/_base_/datasets/deeppcb_detection.py']

model = dict(bbox_head=dict(num_classes=6))

train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=32, val_interval=8)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=32, end=32)
default_hooks = dict(checkpoint=dict(interval=8))
