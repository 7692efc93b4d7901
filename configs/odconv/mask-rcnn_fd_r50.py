"""Mask R-CNN, ResNet-50 with FDConv, K=64, on COCO, 12 epochs, from ImageNet's static weights."""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

# As published: FDConv with a frozen stage whose attentions train, DETR's augmentation, AdamW
# without decay on norms, half precision, and steps after the epochs 10 and 11. The authors have
# four images on a GPU, and do not say how many GPUs.
model = dict(
    data_preprocessor=dict(pad_size_divisor=64),
    backbone=dict(
        type='ODResNet',
        odconv_cfg=dict(type='FDConv2d'),
        kernel_num=64,
        train_frozen_attentions=True,
    ),
)

short_sides = [(side, 1333) for side in range(480, 801, 32)]
resize = dict(type='RandomChoiceResize', scales=short_sides, keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                resize,
            ],
        ],
    ),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[10, 11], gamma=0.1),
]

# Of the checkpoints the last three stay, and the best by validation AP.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
