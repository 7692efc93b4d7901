"""Two processes on the CPU: batches of unequal size under DDP, shards under FSDP."""

import copy
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mmdet_odconv import ODConv2d, convert_to_odconv, set_temperature
from mmdet_odconv.analysis import AttentionMeter, attention_statistics

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

needs_fully_shard = pytest.mark.skipif(fully_shard is None, reason='torch has no fully_shard')

# Of each step, for either process.
SAMPLES = [(1, 3), (0, 2), (2, 2), (3, 0)]


def work(rank, init_file, out_dir):
    """What either process does: starting it takes longer than all of this."""
    dist.init_process_group('gloo', init_method=f'file://{init_file}', rank=rank, world_size=2)
    saved = {'ddp': train(rank), 'statistics': count_attentions(rank)}
    torch.save(saved | (train_shards(rank) if fully_shard else {}), out_dir / f'{rank}.pth')
    dist.destroy_process_group()


def train(rank):
    static = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)).state_dict()
    for weight in static.values():
        weight.fill_(0.1)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(ODConv2d(4, 4, 3), ODConv2d(4, 4, 1)))
    model.module.load_state_dict(static)  # each process for itself, as `load_from` does
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for samples in SAMPLES:
        optimizer.zero_grad()
        # DDP raises in the next step if a parameter got no gradient in this one.
        model(torch.randn(samples[rank], 4, 6, 6)).square().sum().backward()
        optimizer.step()
    return dict(model.module.named_parameters())


def images_and_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(ODConv2d(4, 4, 3, attention_init='published') for _ in range(2)))
    return torch.randn(4, 4, 8, 8), model.eval()


def count_attentions(rank):
    images, model = images_and_model()
    model = DistributedDataParallel(model)
    if fully_shard:
        model = fully_shard(model.module, mesh=init_device_mesh('cpu', (2,)))
    with AttentionMeter(model) as meter, torch.no_grad():
        model(images[:3] if rank else images[3:])
    meter.all_reduce()
    return [asdict(record) for record in meter.statistics()]


def converted():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)
    )
    convert_to_odconv(model, kernel_num=3, include='.*', exclude='^0$')
    return model


def train_shards(rank):
    torch.manual_seed(0)
    whole = converted()
    start = copy.deepcopy(whole.state_dict())
    shards = copy.deepcopy(whole)
    mesh = init_device_mesh('cpu', (2,))
    fully_shard(shards[3], mesh=mesh)
    fully_shard(shards, mesh=mesh)
    for model, trained in ((whole, DistributedDataParallel(whole)), (shards, shards)):
        torch.manual_seed(rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(torch.randn(4, 4, 8, 8)).square().mean().backward()
            optimizer.step()
    # Every process takes part in gathering; with the offload only the first gets the values.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(shards, options=options)
    return {'start': start, 'whole': whole.state_dict(), 'gathered': gathered}


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """What each of the two processes saved."""
    path = tmp_path_factory.mktemp('distributed')
    mp.spawn(work, (path / 'init', path), nprocs=2)
    return [torch.load(path / f'{rank}.pth') for rank in (0, 1)]


def test_processes_stay_equal_whatever_their_batches(results):
    first, second = (result['ddp'] for result in results)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_processes_add_up_their_attentions(results):
    images, model = images_and_model()
    expected = [asdict(record) for record in attention_statistics(model, [images])]
    assert [record['samples'] for record in expected] == [4, 4]
    for result in results:
        for record, whole in zip(result['statistics'], expected, strict=True):
            for key, value in whole.items():
                assert record[key] == (value if key == 'name' else pytest.approx(value)), key


@needs_fully_shard
def test_shards_train_as_the_whole_model_does(results):
    states = results[0]
    model = converted()
    model.load_state_dict(states['gathered'], strict=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, states['whole'][name], msg=name)
    assert not torch.allclose(states['start']['3.weight'], model[3].weight)


@pytest.fixture
def _one_process(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/one', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_fully_shard  # not for FSDP1 itself, which needs a GPU in torch of that time
@pytest.mark.usefixtures('_one_process')
@pytest.mark.filterwarnings('ignore:FSDP')
def test_the_temperature_leaves_the_wrapper_of_mmengine(tmp_path):
    """FSDP1, on which mmengine's wrapper is built, strips its own name off the keys only."""
    model = converted()
    set_temperature(model, 7.0)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device('cpu'), use_orig_params=True)
    torch.save(wrapped.state_dict(), tmp_path / 'state.pth')
    plain = converted()
    plain.load_state_dict(torch.load(tmp_path / 'state.pth'))
    assert plain[3].temperature == 7.0
    set_temperature(model, 1.0)
    wrapped.load_state_dict(torch.load(tmp_path / 'state.pth'))
    assert model[3].temperature == 7.0


@needs_fully_shard
@pytest.mark.usefixtures('_one_process')
@pytest.mark.parametrize('convert', [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_shards_change_their_type(convert):
    torch.manual_seed(0)
    model, plain = converted(), converted()
    plain.load_state_dict(model.state_dict())
    set_temperature(model, 7.0)
    fully_shard(model[3], mesh=init_device_mesh('cpu', (1,)))
    convert(model)
    convert(plain)
    set_temperature(plain, 7.0)
    x = torch.randn(4, 4, 8, 8).to(plain[3].weight.dtype)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    assert model[3].temperature == 7.0
