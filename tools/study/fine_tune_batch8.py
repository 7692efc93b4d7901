"""Fine-tuning with eight images a batch: the same images as with two."""

_base_ = './fine_tune_batch2.py'

train_dataloader = dict(batch_size=8)
