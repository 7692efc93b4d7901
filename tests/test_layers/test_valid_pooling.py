"""Attentions that leave out the padding of a batch."""

import copy
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import ODConv2d, ODConv3d, use_valid_pooling
from tests.conftest import ROOT
from tests.predictions import predict


class Detector(nn.Module):
    """Two layers that see one position at a time, so that only the averages look around."""

    def __init__(self):
        super().__init__()
        options = dict(kernel_num=3, attention_init='published', norm_cfg=dict(type='LN'))
        self.backbone = nn.Sequential(
            ODConv2d(3, 8, 1, **options), nn.ReLU(), ODConv2d(8, 8, 1, stride=2, **options)
        )

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.backbone(inputs)


def sample(*shape):
    return SimpleNamespace(img_shape=shape)


def padded(images, size):
    batch = torch.zeros(len(images), 3, *size)
    for target, image in zip(batch, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return batch


@pytest.fixture
def images():
    return [torch.randn(3, 16, 20), torch.randn(3, 24, 12), torch.randn(3, 9, 7)]


@pytest.fixture
def samples(images):
    return [sample(*image.shape[1:]) for image in images]


@pytest.fixture
def detector():
    model = Detector()
    assert use_valid_pooling(model) == 2
    return model.eval()


def test_an_image_gets_the_same_kernels_alone_and_in_company(detector, images, samples):
    together = detector(padded(images, (32, 32)), samples)
    plain = Detector().eval()
    plain.load_state_dict(detector.state_dict())
    for output, image in zip(together, images, strict=True):
        alone = detector(image[None], [sample(*image.shape[1:])])[0]
        height, width = alone.shape[1:]
        torch.testing.assert_close(output[:, :height, :width], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone, plain(image[None])[0])
    # Without the sizes the average runs over the whole map, and the images do differ.
    batch = padded(images, (32, 32))
    torch.testing.assert_close(detector(batch), plain(batch))
    assert not torch.allclose(plain(batch), together, atol=1e-3)


def test_the_sizes_of_a_batch_are_forgotten_after_it(detector, images, samples):
    batch = padded(images, (32, 32))
    detector(batch, samples)
    torch.testing.assert_close(detector.backbone(batch), detector(batch))
    with pytest.raises(ValueError, match='expects 3 input channels'):
        detector(batch[:, :1], samples)
    torch.testing.assert_close(detector.backbone(batch), detector(batch))


def test_threads_do_not_see_each_others_sizes(detector):
    image = torch.randn(1, 3, 32, 32)
    sizes = [(32, 32 - i) for i in range(8)]
    expected = [detector(image, [sample(*size)]) for size in sizes]
    barrier, found = threading.Barrier(len(sizes)), {}

    def work(i):
        for _ in range(5):
            barrier.wait()
            found.setdefault(i, []).append(detector(image, [sample(*sizes[i])]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in found.items():
        for output in outputs:
            torch.testing.assert_close(output, expected[i])


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_sizes_of_its_own(detector, images, samples, duplicate):
    batch = padded(images, (32, 32))
    twin = duplicate(detector)
    sizes = {id(layer.valid_sizes) for layer in (*detector.backbone[::2], *twin.backbone[::2])}
    assert len(sizes) == 2
    torch.testing.assert_close(twin(batch, samples), detector(batch, samples))


def test_no_sizes_are_left_after_a_training_step(detector, images, samples):
    batch = padded(images, (32, 32))
    expected = Detector().eval()
    expected.load_state_dict(detector.state_dict())
    detector.train()(batch, samples).sum().backward()
    detector.eval()
    torch.testing.assert_close(detector.backbone(batch), expected(batch))
    # Nor in a backward pass of its own.
    batch.requires_grad_()
    outputs = checkpoint(detector.backbone, batch, use_reentrant=True)
    outputs.square().sum().backward()
    gradient, batch.grad = batch.grad, None
    expected(batch).square().sum().backward()
    torch.testing.assert_close(gradient, batch.grad)


def test_windows_of_the_images_are_pooled_whole(detector, images, samples):
    """As in the sliding windows of mmseg, whose shape may be that of a map of the whole image."""

    class Sliding(Detector):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            return [self.backbone(inputs[..., :16, :16]), self.backbone(inputs)]

    model = Sliding().eval()
    model.load_state_dict(detector.state_dict())
    batch = padded(images, (32, 32))
    window, _ = model(batch)
    use_valid_pooling(model)
    outputs = model(batch, samples)
    torch.testing.assert_close(outputs[0], window)
    torch.testing.assert_close(outputs[1], detector(batch, samples))


@pytest.mark.parametrize('reentrant', [False, True])
def test_the_backward_pass_of_two_calls_has_the_sizes_of_each(detector, images, samples, reentrant):
    """A student has two losses of different images in one step; here with recomputation."""

    class Recomputing(Detector):
        def forward(self, inputs, data_samples=None, mode='tensor'):
            x = checkpoint(self.backbone, inputs.requires_grad_(), use_reentrant=reentrant)
            return dict(loss=x.square().mean())

    model = Recomputing()
    model.load_state_dict(detector.state_dict())
    use_valid_pooling(model)
    calls = [
        (padded(images, (32, 32)), samples),
        (padded(images, (32, 32)), samples[::-1]),
        (padded(images, (32, 32)), [sample(32, 32)] * 3),
    ]
    (sum(model(*call)['loss'] for call in calls)).backward()
    sum(detector(*call).square().mean() for call in calls).backward()
    for own, expected in zip(model.parameters(), detector.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def test_student_and_teacher_leave_out_the_padding():
    register_all_modules()
    detector = small_retinanet()
    cfg = dict(type='SemiBaseDetector', detector=detector, data_preprocessor=None)
    model = MODELS.build(dict(cfg, semi_train_cfg=dict(cls_pseudo_thr=0.0), semi_test_cfg=dict()))
    data = MODELS.build(detector).data_preprocessor(
        demo_mm_inputs(2, [[3, 40, 60], [3, 64, 33]], num_classes=5), training=True
    )
    images, samples = data['inputs'], data['data_samples']
    for each in samples:
        each.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
    plain = {}
    for valid in (False, True):
        if valid:
            use_valid_pooling(model)
            other = copy.deepcopy(model.student)
        loss = model.eval().loss_by_gt_instances(images, samples)['sup_loss_bbox']
        plain[valid] = torch.stack(loss).sum().item()
        scores = model.get_pseudo_instances(images, copy.deepcopy(samples))[0]
        plain[valid, 'teacher'] = torch.cat([s.gt_instances.bboxes for s in scores])
    direct = torch.stack(other.loss(images, samples)['loss_bbox']).sum().item()
    assert plain[True] == pytest.approx(direct, rel=1e-6)
    assert plain[True] != pytest.approx(plain[False], rel=1e-5)
    boxes = plain[True, 'teacher'], plain[False, 'teacher']
    assert boxes[0].shape != boxes[1].shape or not torch.allclose(*boxes, rtol=1e-5)


def small_retinanet():
    config = Config.fromfile(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py').model
    config.backbone.update(
        base_channels=8, odconv_cfg=dict(attention_init='published', norm_cfg=dict(type='LN'))
    )
    config.neck.in_channels = [8, 16, 32, 64]
    return config


def test_gradient_checkpointing_has_the_same_gradients():
    register_all_modules()
    config = small_retinanet()
    config.update(
        type='ODConvModel', detector=config.type, odconv=dict(include=[]), attention_pool='valid'
    )
    batch = demo_mm_inputs(2, [[3, 40, 60], [3, 64, 33]], num_classes=5)
    model = MODELS.build(config)
    data = model.data_preprocessor(batch, training=True)
    gradients = {}
    for checkpointing in (False, True, 'whole map'):
        for block in model.backbone.modules():
            if hasattr(block, 'with_cp'):
                block.with_cp = checkpointing is True
        for layer in model.modules():
            if checkpointing == 'whole map' and isinstance(layer, ODConv2d):
                layer.valid_sizes = None
        model.zero_grad()
        loss, _ = model.parse_losses(model(**copy.deepcopy(data), mode='loss'))
        loss.backward()
        gradients[checkpointing] = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradients[True], gradients[False])
    assert not torch.allclose(gradients['whole map'], gradients[False], rtol=1e-2)
    assert len(predict(model.eval(), batch)) == 2


def test_a_compiled_model_follows_the_sizes(detector, images, samples):
    batch = padded(images, (32, 32))
    compiled = torch.compile(detector, backend='eager')
    torch.testing.assert_close(compiled(batch, samples), detector(batch, samples))
    other = [sample(32, 32), sample(8, 8), sample(32, 16)]
    torch.testing.assert_close(compiled(batch, other), detector(batch, other))


def test_what_cannot_have_valid_pooling(detector):
    with pytest.raises(ValueError, match='has valid pooling already'):
        use_valid_pooling(detector)
    for model in (nn.Conv2d(3, 3, 1), ODConv3d(2, 2, 1)):
        with pytest.raises(ValueError, match='no 2-D ODConv layer'):
            use_valid_pooling(model)
    with pytest.raises(ValueError, match='no method with images and data samples'):
        use_valid_pooling(nn.Sequential(ODConv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="must be 'all' or 'valid', got 'some'"):
        MODELS.build(dict(type='ODConvModel', detector='RetinaNet', attention_pool='some'))
