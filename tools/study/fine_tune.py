"""The study's task for two more epochs, from a static detector that was trained on it.

The environment variable STATIC_DETECTOR names its checkpoint.
"""

_base_ = './shapes.py'

load_from = '{{$STATIC_DETECTOR:work_dirs/study/narrow/plain-1/epoch_4.pth}}'

train_cfg = dict(max_epochs=2)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=2, end=2)
