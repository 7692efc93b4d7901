"""The study's task: 15 classes of generated shapes, 750 iterations an epoch."""

_base_ = ['./base.py', '../../configs/_base_/datasets/shapes_hard_detection.py']

# All boxes are about square, so one ratio does, and most of the time goes to the backbone.
model = dict(bbox_head=dict(num_classes=15, anchor_generator=dict(ratios=[1.0])))

# On one core, workers only take time from the training.
train_dataloader = dict(batch_size=16, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=25, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
