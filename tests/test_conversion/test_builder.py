"""Conversion from a config, and what mmengine and mmdet do with the detector that comes out."""

import copy

import pytest
import torch
import torch.distributed as dist
from mmdet.apis import inference_detector, init_detector
from mmdet.models.detectors import RetinaNet, SoftTeacher
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.model.utils import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmdet_odconv import ODConv2d
from tests.reference import relative_error

SMALL = """\
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)

model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3),
)
"""
FORMS = {
    'detector': (
        "dict(type='ODConvModel', detector={{_base_.model.type}}, odconv=dict(kernel_num=2))"
    ),
    'model': (
        "dict(_delete_=True, type='ODConvModel', model={{_base_.model}}, odconv=dict(kernel_num=2))"
    ),
}


@pytest.fixture(autouse=True)
def _scope():
    register_all_modules()


@pytest.fixture(params=FORMS)
def config(request, tmp_path):
    return write_config(tmp_path, FORMS[request.param])


@pytest.fixture
def small(tmp_path):
    return write_config(tmp_path, FORMS['detector'])


def write_config(folder, model):
    (folder / 'small.py').write_text(SMALL)
    (folder / 'small_od.py').write_text(f"_base_ = './small.py'\n\nmodel = {model}\n")
    return Config.fromfile(folder / 'small_od.py')


def static(folder):
    return MODELS.build(Config.fromfile(folder / 'small.py').model)


def layers(model):
    return [m for m in model.modules() if isinstance(m, ODConv2d)]


def features(model, images):
    model.eval()
    with torch.no_grad():
        return torch.cat([out.flatten() for out in model.extract_feat(images)])


def test_the_detector_itself_is_built(config, tmp_path):
    model, plain = MODELS.build(config.model), static(tmp_path)
    assert type(model) is type(plain)
    assert len(layers(model)) == 12  # of 16, the first stage being frozen
    assert {layer.kernel_num for layer in layers(model)} == {2}
    names = {name for name in model.state_dict() if '.attention.' not in name}
    assert names == set(plain.state_dict())


def test_fields_and_the_runners_data_preprocessor(tmp_path):
    (tmp_path / 'small.py').write_text(SMALL)
    inner = Config.fromfile(tmp_path / 'small.py').model
    own = inner.pop('data_preprocessor')
    given = dict(type='DetDataPreprocessor', mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0])
    fields = dict(type='ODConvModel', data_preprocessor=given)
    head = dict(inner.bbox_head, num_classes=7)
    model = MODELS.build(dict(model=inner, bbox_head=head, **fields))
    assert model.bbox_head.num_classes == 7
    assert model.data_preprocessor.mean.flatten().tolist() == [1.0, 2.0, 3.0]
    model = MODELS.build(dict(model=dict(inner, data_preprocessor=own), **fields))
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx(own['mean'])


def test_a_config_that_says_nothing_to_build_is_refused():
    with pytest.raises(ValueError, match='ODConvModel needs the type of a model'):
        MODELS.build(dict(type='ODConvModel', backbone=dict(type='ResNet', depth=18)))


def test_initialisation_from_scratch(small):
    small.model.odconv.include = ['backbone', 'bbox_head', 'retina_cls']
    model = MODELS.build(small.model)
    model.init_weights()
    for layer in layers(model):
        assert not layer.attention.channel_fc.weight.any()
        assert not hasattr(layer, 'is_init')
    # The bank of a block is ODConv's own start, that of the head mmdet's.
    block = model.backbone.layer4[1].conv2
    assert block.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert (block.weight[0] - block.weight[1]).std() > block.weight.std()
    assert not model.backbone.layer4[1].bn2.weight.any()
    assert torch.allclose(model.bbox_head.retina_cls.bias, torch.tensor(-4.595), atol=1e-3)


def test_pretrained_weights_of_the_static_backbone_keep_their_function(config, tmp_path):
    donor = static(tmp_path)
    donor.init_weights()
    torch.save({'state_dict': donor.backbone.state_dict()}, tmp_path / 'backbone.pth')
    fields = config.model if 'backbone' in config.model else config.model.model
    fields.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    model = MODELS.build(config.model)
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = (m.eval().backbone(images) for m in (donor, model))
    assert all(relative_error(a, e) < 1e-4 for a, e in zip(actual, expected, strict=True))


def test_pretrained_weights_of_an_odconv_backbone_arrive_as_they_are(small, tmp_path):
    donor = MODELS.build(small.model)
    for parameter in donor.parameters():
        nn.init.normal_(parameter)
    torch.save({'state_dict': donor.backbone.state_dict()}, tmp_path / 'backbone.pth')
    small.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth')
    )
    model = MODELS.build(small.model)
    model.init_weights()
    for name, value in donor.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_init_detector_loads_a_static_checkpoint(config, tmp_path):
    plain = static(tmp_path)
    plain.init_weights()
    path = tmp_path / 'static.pth'
    torch.save({'state_dict': plain.state_dict(), 'meta': {}}, path)
    # mmdet asks for config.model.backbone, unless it gets options.
    options = None if 'backbone' in config.model else {}
    model = init_detector(config, str(path), device='cpu', cfg_options=options)
    images = torch.randn(1, 3, 64, 64)
    assert relative_error(features(model, images), features(plain, images)) < 1e-4
    result = inference_detector(model, (torch.rand(48, 64, 3) * 255).byte().numpy())
    assert hasattr(result, 'pred_instances')


class Batches(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b', 'c'))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        batch = demo_mm_inputs(1, [[3, 64, 64]], num_classes=3, num_items=[2])
        return {key: value[0] for key, value in batch.items()}


def runner_config(config, work_dir, **options):
    return (
        dict(
            model=config.model,
            work_dir=str(work_dir),
            train_dataloader=dict(
                dataset=Batches(),
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
            custom_hooks=[dict(type='EMAHook')],
            default_scope='mmdet',
            experiment_name=f'{work_dir.name}-{len(options)}',
        )
        | options
    )


def test_a_run_from_a_static_checkpoint_with_ema_and_its_resumption(config, tmp_path):
    donor = static(tmp_path)
    torch.save({'state_dict': donor.state_dict()}, tmp_path / 'static.pth')
    work_dir = tmp_path / 'run'
    options = dict(load_from=str(tmp_path / 'static.pth'))
    runner = Runner(**runner_config(copy.deepcopy(config), work_dir, **options))
    runner.train()
    trained = layers(runner.model)[-1]
    assert trained.attention.channel_fc.weight.any()
    assert (work_dir / 'epoch_1.pth').is_file()

    options = dict(resume=True, train_cfg=dict(by_epoch=True, max_epochs=2))
    runner = Runner(**runner_config(config, work_dir, **options))
    runner.train()
    assert (work_dir / 'epoch_2.pth').is_file()


def test_the_averaged_copy_is_a_converted_model_of_its_own(small):
    model = MODELS.build(small.model)
    ema = ExponentialMovingAverage(model)
    assert len(layers(ema.module)) == 12  # of 16, the first stage being frozen
    assert ema.module.init_weights.model is ema.module


def test_test_time_augmentation_takes_the_config_as_its_module(config):
    tta = dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
        module=config.model,
    )
    model = MODELS.build(tta)
    assert len(layers(model.module)) == 12  # of 16, the first stage being frozen


def test_sync_bn_there_and_back(small):
    model = convert_sync_batchnorm(MODELS.build(small.model))
    assert all(isinstance(m.attention.bn, nn.SyncBatchNorm) for m in layers(model))
    model = revert_sync_batchnorm(model)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert features(model, torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_training(small, process_group):
    """DDP raises if a parameter got no gradient."""
    model = MODELS.build(small.model)
    model.init_weights()
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimizer = OptimWrapper(torch.optim.SGD(wrapped.parameters(), lr=0.01))
    for _ in range(2):
        batch = demo_mm_inputs(2, [[3, 64, 64]] * 2, num_classes=3)
        logs = wrapped.train_step(batch, optimizer)
        assert logs['loss'].isfinite()


@pytest.mark.parametrize(
    'base',
    [
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'mmdet::bytetrack/bytetrack_yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_'
        'test-mot17halfval.py',
    ],
)
def test_a_model_with_a_detector_of_its_own_is_told_the_other_form(tmp_path, base):
    path = tmp_path / 'named.py'
    path.write_text(
        f"_base_ = '{base}'\n"
        "model = dict(type='ODConvModel', detector={{_base_.model.type}}, odconv=dict())\n"
    )
    with pytest.raises(ValueError, match=r"field 'detector' of its own.*model=\{\{_base_\.model"):
        MODELS.build(Config.fromfile(path).model)


def test_a_semi_supervised_detector_is_converted_in_the_other_form(tmp_path):
    (tmp_path / 'base.py').write_text(
        "_base_ = 'mmdet::soft_teacher/"
        "soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'\n"
        'model = dict(detector=dict(backbone=dict(depth=18, init_cfg=None),'
        ' neck=dict(in_channels=[64, 128, 256, 512])))\n'
    )
    (tmp_path / 'whole.py').write_text(
        "_base_ = './base.py'\n"
        "model = dict(_delete_=True, type='ODConvModel', model={{_base_.model}},"
        " odconv=dict(kernel_num=2, include='backbone'))\n"
    )
    model = MODELS.build(Config.fromfile(tmp_path / 'whole.py').model)
    assert type(model).__name__ == 'SoftTeacher'
    assert layers(model.student.backbone)
    assert layers(model.teacher.backbone)


def test_a_conversion_of_nothing_is_refused(small):
    """As with the conversion of a config that itself converts one."""
    again = dict(type='ODConvModel', model=small.model)
    with pytest.raises(
        ValueError, match=r'nothing of RetinaNet was converted, .* ODConv2d already'
    ):
        MODELS.build(again)
    assert MODELS.build(dict(again, odconv=dict(include=[]))).backbone


def test_a_python_config_names_the_detector_by_its_class(small):
    model = dict(small.model, detector=RetinaNet)
    assert isinstance(MODELS.build(model), RetinaNet)
    with pytest.raises(ValueError, match="SoftTeacher has a field 'detector' of its own"):
        MODELS.build(dict(type='ODConvModel', detector=SoftTeacher))
