"""Fine-tuning with eight images a batch, for one epoch."""

_base_ = './fine_tune_batch2.py'

train_dataloader = dict(batch_size=8)
