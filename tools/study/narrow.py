"""The study's main task: the same images, with a network too small for them.

With half the channels of shapes.py in the backbone, and a light neck and head from stride 8 on,
what limits a run is the capacity of the backbone and not the length of the schedule.
"""

_base_ = './shapes.py'

model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], start_level=1, num_outs=3),
    bbox_head=dict(
        stacked_convs=1, anchor_generator=dict(octave_base_scale=1.5, strides=[8, 16, 32])
    ),
)
