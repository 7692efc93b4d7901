"""The static classifier that the study's tasks from static weights start from."""

_base_ = '../../configs/pretrain/od_r18_shapes.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=16,
        out_indices=(3,),
        norm_eval=False,
    )
)

train_cfg = dict(max_epochs=4)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = 4
randomness = dict(seed=0)
