"""Eight more epochs of small defects in real scans, from a static detector trained on them.

The environment variable STATIC_DETECTOR names its checkpoint.
"""

_base_ = './deeppcb.py'

load_from = '{{$STATIC_DETECTOR:work_dirs/study/deeppcb/plain-0/epoch_32.pth}}'

train_cfg = dict(max_epochs=8, val_interval=4)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=8, end=8)
default_hooks = dict(checkpoint=dict(interval=4))
