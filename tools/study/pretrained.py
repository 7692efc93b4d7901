"""The study's task from the weights of a classifier, made by configs/pretrain/od_r18_shapes.py.

PRETRAINED names the checkpoint: of the static classifier (``model.backbone.type=ResNet``), unless
the arm is to start from an ODConv one.
"""

_base_ = './shapes.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='{{$PRETRAINED:work_dirs/od_r18_shapes/epoch_4.pth}}',
            prefix='backbone.',
        )
    )
)

# Plain arms take no notice of this.
optim_wrapper = dict(
    constructor='ODConvOptimWrapperConstructor', paramwise_cfg=dict(bank_lr_mult=2.0)
)
