"""RetinaNet, EfficientNet-Lite0 with ODConv from ImageNet weights, K=1, on your own images.

docs/own_data.md says how to use it.
"""

_base_ = [
    '../_base_/models/retinanet_efficientnet-lite0.py',
    '../_base_/datasets/own_detection.py',
    '../_base_/schedules/schedule_fine_tune.py',
    '../_base_/runtime_small.py',
]

model = dict(
    type='ODConvModel',
    detector={{_base_.model.type}},
    odconv=dict(
        kernel_num=1,
        norm_cfg=dict(type='CalibratedNorm'),
        include='backbone',
        exclude='depthwise_conv',
    ),
    bbox_head=dict(num_classes=len(_base_.metainfo.classes)),
)
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor',
    paramwise_cfg=dict(bank_lr_mult='compensated', attention_lr_mult=10),
)
custom_hooks = [dict(type='ODConvCalibrationHook')]
