"""Whole detectors in several processes on the CPU: training and evaluation as in one."""

import copy
import json
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmdet.evaluation import CocoMetric
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from mmdet_odconv.layers.odconv import _ODConvNd
from mmdet_odconv.safe_running import Checkpoint, NonFiniteError, NonFiniteHook
from tests.conftest import ROOT, tell_the_first_iteration
from tests.test_tools.test_train_guards import TOOL
from tests.tiny_training import InChild, assert_equal_bit_for_bit, runner, weights_of

try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

IMAGES = 4


def exit_codes(world_size, function, folder):
    """Call ``function(rank, world_size)`` in forked processes, and what they return is saved."""
    init_file = f'file://{folder}/init{time.time_ns()}'

    def work(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        dist.init_process_group('gloo', init_method=init_file, rank=rank, world_size=world_size)
        torch.save(function(rank, world_size), folder / f'{world_size}-{rank}.pth')
        dist.barrier()
        dist.destroy_process_group()

    children = [InChild(work, rank) for rank in range(world_size)]
    return [child.wait() for child in children]


def in_processes(world_size, function, folder):
    """As above, and returns what each process returned."""
    assert exit_codes(world_size, function, folder) == [0] * world_size
    return [torch.load(folder / f'{world_size}-{rank}.pth') for rank in range(world_size)]


def small(name, **head):
    """The detector of a config, smaller, with a frozen stage and activation checkpointing."""
    register_all_modules()
    tell_the_first_iteration()
    config = Config.fromfile(ROOT / f'configs/odconv/{name}.py').model
    config.backbone.update(
        depth=18, base_channels=8, with_cp=True, frozen_stages=1, norm_eval=True, init_cfg=None
    )
    config.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    head |= dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=5)
    config.bbox_head.update(head)
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model.train()


def fcos():
    """FCOS, whose losses are normalised over all processes."""
    return small('fcos_od_r50', norm_cfg=dict(type='GN', num_groups=4, requires_grad=True))


def images():
    """Four images with three boxes each, the same ones in all processes."""
    sizes, boxes = [[3, 64, 64]] * IMAGES, [3] * IMAGES
    return demo_mm_inputs(IMAGES, sizes, num_items=boxes, num_classes=5, use_box_type=True)


def trained_by(model, **options):
    """An optimizer wrapper for what a model has to train."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return OptimWrapper(torch.optim.SGD(parameters, lr=0.01, **options))


def train_fcos(rank, world_size):
    """Three steps on this process's share of the images; all weights after that."""
    model = fcos()
    assert sum(isinstance(module, _ODConvNd) for module in model.modules()) > 10
    trained = model
    if world_size > 1:
        trained = MMDistributedDataParallel(model, find_unused_parameters=False)
    wrapper = trained_by(model)
    for step in range(3):
        share = slice(rank, None, world_size)
        batch = {key: value[share] for key, value in images().items()}
        loss = trained.train_step(batch, wrapper)['loss']
        assert loss.isfinite(), step
    return model.state_dict()


@pytest.fixture(scope='module')
def one_process(tmp_path_factory):
    return in_processes(1, train_fcos, tmp_path_factory.mktemp('one'))[0]


@pytest.mark.parametrize('world_size', [2, 4])
def test_processes_train_as_one_with_all_images(one_process, tmp_path, world_size):
    states = in_processes(world_size, train_fcos, tmp_path)
    start = fcos().state_dict()
    for name, expected in one_process.items():
        scale = max(expected.abs().max().item(), 1)
        for state in states:
            difference = (state[name] - expected).abs().max().item()
            assert difference <= 1e-5 * scale, (name, difference)
    moved = [name for name in start if not torch.equal(start[name], one_process[name])]
    assert any(name.startswith('backbone.layer2') for name in moved)
    assert not any(name.startswith(('backbone.conv1', 'backbone.layer1')) for name in moved)


def train_in_shards(rank, world_size):
    """A step of RetinaNet on half of the images; bytes of this process, and all weights."""
    model = small('retinanet_od_r50')
    mesh = init_device_mesh('cpu', (world_size,))
    for module in model.modules():
        if isinstance(module, _ODConvNd):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sizes = step_on(model, [slice(rank, None, world_size)])
    return sizes, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def step_on(model, shares):
    """A step with the mean of the gradients of each share of the images.

    Returns:
        list[int]: Bytes of the parameters, the gradients and the optimizer's state here.
    """
    wrapper = trained_by(model, momentum=0.9)
    batch = model.data_preprocessor(images(), training=True)
    for share in shares:
        part = dict(inputs=batch['inputs'][share], data_samples=batch['data_samples'][share])
        loss, _ = model.parse_losses(model(**part, mode='loss'))
        wrapper.backward(loss / len(shares))
    wrapper.step()
    parameters = list(model.parameters())
    momenta = [state['momentum_buffer'] for state in wrapper.optimizer.state.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [sum(map(bytes_here, group)) for group in (parameters, gradients, momenta)]


def bytes_here(tensor):
    local = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return local.numel() * local.element_size()


@pytest.mark.skipif(fully_shard is None, reason='torch has no fully_shard')
def test_shards_step_as_the_whole_detector_with_half_of_the_memory(tmp_path):
    results = in_processes(2, train_in_shards, tmp_path)
    whole = small('retinanet_od_r50')
    start = copy.deepcopy(whole.state_dict())
    size = step_on(whole, [slice(0, None, 2), slice(1, None, 2)])
    for rank, (sizes, weights) in enumerate(results):
        for here, all_ in zip(sizes, size, strict=True):
            assert 0.49 * all_ < here < 0.51 * all_, (rank, sizes, size)
        for name, expected in whole.state_dict().items():
            scale = max(expected.abs().max().item(), 1)
            difference = (weights[name] - expected).abs().max().item()
            assert difference <= 1e-5 * scale, (name, difference)
    moves = [(value - start[name]).abs().max() for name, value in whole.state_dict().items()]
    assert max(moves) > 1e-3


def annotations(path, images=7):
    """A COCO file with boxes at random places."""
    chance = np.random.default_rng(0)
    content = dict(
        info={},
        images=[dict(id=i, file_name=f'{i}.png', width=90, height=90) for i in range(images)],
        categories=[dict(id=i, name=f'{i}') for i in range(3)],
        annotations=[
            dict(
                id=1 + i,
                image_id=i % images,
                category_id=i % 3,
                bbox=[*chance.uniform(0, 60, 2), *chance.uniform(5, 30, 2)],
                area=400.0,
                iscrowd=0,
            )
            for i in range(5 * images)
        ],
    )
    path.write_text(json.dumps(content))
    return content


def detections(content, image):
    """The true boxes of an image, moved a little, with scores drawn by chance."""
    chance = np.random.default_rng(image)
    own = [a for a in content['annotations'] if a['image_id'] == image]
    boxes = np.array([a['bbox'] for a in own])
    boxes[:, 2:] += boxes[:, :2]
    return dict(
        img_id=image,
        ori_shape=(90, 90),
        pred_instances=dict(
            bboxes=torch.from_numpy(boxes + chance.uniform(-4, 4, boxes.shape)),
            scores=torch.from_numpy(chance.uniform(0, 1, len(own))),
            labels=torch.tensor([a['category_id'] for a in own]),
        ),
    )


@pytest.mark.parametrize('world_size', [2, 4])
def test_shards_are_evaluated_to_the_same_table(tmp_path, world_size):
    """Seven images, so that some process has one of them twice."""
    path = tmp_path / 'annotations.json'
    content = annotations(path)

    def evaluate(rank, world_size):
        metric = CocoMetric(ann_file=str(path), metric='bbox')
        metric.dataset_meta = dict(classes=('0', '1', '2'))
        for image in DefaultSampler(range(7), shuffle=False):
            metric.process({}, [detections(content, image)])
        return metric.evaluate(7)

    expected = in_processes(1, evaluate, tmp_path)[0]
    assert 0.1 < expected['coco/bbox_mAP'] < 0.9
    assert all(table == expected for table in in_processes(world_size, evaluate, tmp_path))


class SignalOne(Hook):
    """Sends SIGTERM to the second process only."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 4 and runner.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Synchronised(nn.Module):
    """Waits for the other processes as a SyncBN does, which PyTorch has for GPUs only."""

    def forward(self, x):
        mean = x.mean()
        dist.all_reduce(mean)
        return x - mean * 0 if mean.isfinite() else x


def train_with_a_bad_image(rank, world_size, action, steps):
    """Steps of which the second, if there is one, has a bad image in the last process."""
    model = fcos()
    model.backbone.add_module('bn1', nn.Sequential(model.backbone.bn1, Synchronised()))
    trained = MMDistributedDataParallel(model, find_unused_parameters=False)
    wrapper, hook = trained_by(model), NonFiniteHook(action=action)
    fake = SimpleNamespace(model=trained, optim_wrapper=wrapper, iter=0)
    hook.before_train(fake)
    for step in steps:
        data = {key: value[rank::world_size] for key, value in images().items()}
        data['inputs'] = [image.float() + step for image in data['inputs']]
        if step == 1 and rank == 1:
            data['inputs'][0][0, 0, 0] = float('nan')
        hook.before_train_iter(fake, step, data)
        trained.train_step(data, wrapper)
    return model.state_dict()


def train_with_and_without_a_bad_image(rank, world_size):
    """Trainings that skip it and that do not have it, and what one that stops says."""
    with pytest.raises(NonFiniteError) as error:
        train_with_a_bad_image(rank, world_size, 'stop', [1])
    skipped, without = (
        train_with_a_bad_image(rank, world_size, 'skip', steps) for steps in ([0, 1, 2], [0, 2])
    )
    return str(error.value), skipped, without


def test_a_bad_image_of_one_process_stops_or_is_skipped_in_all(tmp_path):
    """The others wait for each other in the forward pass, FCOS's losses and this norm too."""
    results = in_processes(2, train_with_and_without_a_bad_image, tmp_path)
    assert 'is not finite in another process' in results[0][0]
    assert 'the images themselves are not finite' in results[1][0]
    for _, skipped, without in results:
        assert_equal_bit_for_bit(skipped, without)
        assert_equal_bit_for_bit(skipped, results[0][1])


@pytest.mark.parametrize('counts', [1, 3])
def test_a_signal_to_one_process_stops_all_after_the_same_iteration(tmp_path, counts):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'

    def train(work_dir, disturbed=False, resume=False):
        hooks = [dict(type='PreemptionHook')] + [SignalOne()] * disturbed
        options = dict(resume=resume, hooks=hooks, launcher='pytorch', accumulative_counts=counts)
        return lambda *_: runner(work_dir, epochs=3, **options).train() and None

    assert exit_codes(2, train(whole), tmp_path) == [0, 0]
    assert exit_codes(2, train(parts, disturbed=True), tmp_path) == [99, 99]
    assert torch.load(parts / 'preempted.pth')['meta']['iter'] == 5
    assert exit_codes(2, train(parts, resume=True), tmp_path) == [0, 0]
    states = [weights_of(folder / 'epoch_3.pth') for folder in (parts, whole)]
    if counts == 1:
        assert_equal_bit_for_bit(*states)
    else:  # the checkpoint has the mean of the gradients that wait for a step
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def test_no_process_ends_before_the_checkpoint_is_saved(tmp_path):
    """A launcher takes one that has ended as the reason to kill the others."""

    def train(rank, world_size):
        hooks = [dict(type='PreemptionHook'), SignalOne()]
        training = runner(tmp_path / 'work', epochs=3, hooks=hooks, launcher='pytorch')
        save = training.save_checkpoint
        training.save_checkpoint = lambda *args, **kwargs: time.sleep(1) or save(*args, **kwargs)
        try:
            training.train()
        except SystemExit:
            os._exit(0 if (tmp_path / 'work/preempted.pth').is_file() else 1)

    assert exit_codes(2, train, tmp_path) == [0, 0]


def test_processes_with_different_checkpoints_do_not_start(tmp_path):
    """As on hosts that do not share their work folder."""

    def start(rank, world_size):
        checkpoint = Checkpoint('epoch_3.pth', dict(meta=dict(iter=9))) if rank == 0 else None
        try:
            TOOL.require_same_start(checkpoint)
        except SystemExit as error:
            return str(error)

    for message in in_processes(2, start, tmp_path):
        assert 'from epoch_3.pth (iteration 9) on ' in message
        assert ' and anew on ' in message
    TOOL.require_same_start(None)
