"""What every run of the study shares: a small RetinaNet, from scratch.

shapes.py and deeppcb.py add a task; arms.py says what each arm changes.
"""

_base_ = [
    '../../configs/_base_/models/retinanet_small.py',
    '../../configs/_base_/runtime_small.py',
]

model = dict(
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    # From stride 4 on, with anchors from 12 pixels on: most objects are smaller than 32.
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, start_level=0, num_outs=4),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(octave_base_scale=3, strides=[4, 8, 16, 32]),
    ),
)

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=4, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.001, weight_decay=0.05),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        T_max=4,
        end=4,
        eta_min=0,
        convert_to_iter_based=True,
    ),
]

# Means over 100 iterations, and a checkpoint to go on from at each evaluation. The one before is
# kept as well: a run may be stopped while it writes, or evaluates.
log_processor = dict(window_size=100)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(_delete_=True, type='CheckpointHook', interval=1, max_keep_ckpts=2),
)
