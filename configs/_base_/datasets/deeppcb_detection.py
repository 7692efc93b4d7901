"""DeepPCB: six kinds of defects in 640×640 scans of circuit boards, read at half size.

Half of the boxes are under 17 pixels then, nearly all under 32.

Root: data/deeppcb, or the environment variable DEEPPCB_ROOT.
"""

_base_ = './bccd_detection.py'

data_root = '{{$DEEPPCB_ROOT:data/deeppcb}}'
metainfo = dict(_delete_=True, classes=('open', 'short', 'mousebite', 'spur', 'copper', 'pin-hole'))

train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=f'{data_root}/annotations/val.json')
test_evaluator = val_evaluator
