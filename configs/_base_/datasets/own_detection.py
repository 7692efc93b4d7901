"""Your own images, annotated in COCO's format: set the folder, the classes and the size here.

docs/own_data.md goes on from this file to a trained and exported detector. The folder can be named
by the environment variable OWN_ROOT as well.
"""

_base_ = './coco128_detection.py'

data_root = '{{$OWN_ROOT:data/own}}'
metainfo = dict(classes=('cat', 'dog'))  # as the annotation files name them
scale = (640, 640)  # the larger and the smaller side of an image are at most this

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale

own = dict(data_root=data_root, metainfo=metainfo)
train = dict(**own, ann_file='annotations/train.json', data_prefix=dict(img='train/'))
val = dict(**own, ann_file='annotations/val.json', data_prefix=dict(img='val/'))

train_dataloader = dict(dataset=dict(**train, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**val, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/annotations/val.json')
test_evaluator = val_evaluator
