"""OD-MobileNetV2 1.0, K=4, on ImageNet-1k as in the paper: 150 epochs, cosine from 0.05."""

_base_ = './od_r50_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ODMobileNetV2',
        out_indices=(7,),
        odconv_cfg=dict(attention_init='published'),
    ),
    head=dict(in_channels=1280),
)

optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=4e-5))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', T_max=150, by_epoch=True)
train_cfg = dict(max_epochs=150)
