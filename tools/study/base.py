"""What every run of the study shares: a small RetinaNet, from scratch.

shapes.py and deeppcb.py add a task; arms.py says what each arm changes.
"""

_base_ = [
    '../../configs/_base_/models/retinanet_tiny.py',
    '../../configs/_base_/runtime_small.py',
]

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

# Losses are logged as means over 100 iterations. Two checkpoints are kept, because a run may be
# stopped while it writes or evaluates the newer one.
log_processor = dict(window_size=100)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(_delete_=True, type='CheckpointHook', interval=1, max_keep_ckpts=2),
)
