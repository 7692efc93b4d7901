"""The runtime of ODConv on small data sets: logs and checkpoints often, keeps few."""

_base_ = 'mmdet::_base_/default_runtime.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=4, max_keep_ckpts=2, save_best='auto')
)
