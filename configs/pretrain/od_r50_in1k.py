"""OD-ResNet-50, K=4, on ImageNet-1k with the paper's schedule: 8 GPUs with 32 images each.

It needs mmpretrain 1.2 (``pip install -r requirements/pretrain.txt``), and ImageNet in
data/imagenet.
"""

_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs256.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ODResNet',
        depth=50,
        out_indices=(3,),
        norm_eval=False,
        odconv_cfg=dict(attention_init='published'),
    ),
    neck=dict(type='GlobalAverageDropout', dropout=0.2),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5),
    ),
)

custom_hooks = [dict(type='ODConvTemperatureHook', initial=30.0, anneal_epochs=10)]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
