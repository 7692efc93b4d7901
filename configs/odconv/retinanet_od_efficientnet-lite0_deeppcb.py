"""RetinaNet, EfficientNet-Lite0 with ODConv from ImageNet weights, K=4, on DeepPCB."""

_base_ = './retinanet_efficientnet-lite0_deeppcb.py'

model = dict(
    type='ODConvModel',
    detector={{_base_.model.type}},
    odconv=dict(
        kernel_num=4,
        norm_cfg=dict(type='CalibratedNorm'),
        include='backbone',
        exclude='depthwise_conv',
    ),
)
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor',
    paramwise_cfg=dict(bank_lr_mult='compensated', attention_lr_mult=10),
)
custom_hooks = [dict(type='ODConvCalibrationHook')]
