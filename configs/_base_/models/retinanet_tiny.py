"""RetinaNet with few channels, from stride 4 on: for small images with small objects on a CPU.

Its anchors begin at 12 pixels.
"""

_base_ = './retinanet_small.py'

model = dict(
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, start_level=0, num_outs=4),
    bbox_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(octave_base_scale=3, strides=[4, 8, 16, 32]),
    ),
)
