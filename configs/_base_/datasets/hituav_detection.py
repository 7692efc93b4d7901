"""HIT-UAV: people, cars and bicycles in 640×512 infrared frames from a drone.

Seven in ten boxes are under 32 pixels. Training takes crops of a quarter of the frame, in which the
objects keep their size; tests take whole frames.

Root: data/hituav, or the environment variable HITUAV_ROOT.
"""

_base_ = './bccd_detection.py'

data_root = '{{$HITUAV_ROOT:data/hituav}}'
metainfo = dict(_delete_=True, classes=('person', 'car', 'bicycle'))

scale = (640, 512)

train_pipeline = _base_.train_pipeline
train_pipeline[2] = dict(type='RandomCrop', crop_size=(320, 256))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale

own = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(**own, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**own, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/annotations/val.json')
test_evaluator = val_evaluator
