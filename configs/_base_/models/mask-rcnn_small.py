"""Mask R-CNN for a CPU: a neck and heads of 64 channels, few proposals, few samples in RoIAlign."""

_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

roi_extractor = dict(out_channels=64, roi_layer=dict(sampling_ratio=2))
model = dict(
    neck=dict(out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
