"""The study's task from the weights of the static classifier that classifier.py trains.

The environment variable PRETRAINED names its checkpoint.
"""

_base_ = './shapes.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='{{$PRETRAINED:work_dirs/classifier/epoch_4.pth}}',
            prefix='backbone.',
        )
    )
)
