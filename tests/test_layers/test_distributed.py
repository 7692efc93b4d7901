"""Two processes on the CPU, with batches of unequal size."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet_odconv import ODConv2d

# Of each step, for either process.
SAMPLES = [(1, 3), (0, 2), (2, 2), (3, 0)]


def train(rank, init_file, out_dir):
    dist.init_process_group('gloo', init_method=f'file://{init_file}', rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(ODConv2d(4, 4, 3), ODConv2d(4, 4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for samples in SAMPLES:
        optimizer.zero_grad()
        # DDP raises in the next step if a parameter got no gradient in this one.
        model(torch.randn(samples[rank], 4, 6, 6)).square().sum().backward()
        optimizer.step()
    torch.save(dict(model.module.named_parameters()), out_dir / f'{rank}.pth')
    dist.destroy_process_group()


def test_processes_stay_equal_whatever_their_batches(tmp_path):
    mp.spawn(train, (tmp_path / 'init', tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
