import pickle
import re
import sys

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmdet_odconv import ODConv2d, cli
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/odconv/retinanet_od_r18_shapes.py')


def test_a_detector_is_not_loaded_where_it_cannot_run(tmp_path):
    config = cli.load_config(CONFIG)
    with pytest.raises(SystemExit, match=r'^--device gpu cannot be used: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'), 'gpu')
    with pytest.raises(SystemExit, match=r'^checkpoint not found: '):
        cli.load_detector(config, str(tmp_path / 'a.pth'))


class Start(BaseModule):
    def __init__(self, checkpoint, **attributes):
        super().__init__()
        self.backbone = BaseModule(dict(type='Pretrained', checkpoint=checkpoint))
        for name, value in attributes.items():
            setattr(self.backbone, name, value)


def test_weights_that_cannot_be_had_name_the_file_and_the_options(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(SystemExit) as error:
        cli.require_start_weights(Start('torchvision://resnet50', frozen_stages=1))
    message = str(error.value)
    assert message.startswith(
        'model.backbone.init_cfg.checkpoint: torchvision://resnet50 cannot be'
    )
    assert 'torchvision' in message.partition('read as a checkpoint: ')[2]
    assert re.search(r'fetch https://\S+/resnet50-\w+\.pth and set --cfg-options model', message)
    assert message.endswith(
        'model.backbone.init_cfg=None model.backbone.frozen_stages=-1 '
        'model.backbone.norm_eval=False'
    )
    assert '\n' not in message


@pytest.mark.parametrize(
    ('path', 'address'),
    [
        ('open-mmlab://mmdet/mobilenet_v2', 'https://.*/mobilenet_v2_batch256_imagenet-'),
        ('mmcls://resnet50', 'https://.*/resnet50_8xb32_in1k_'),
        ('https://example.org/a.pth', 'https://example.org/a.pth'),
    ],
)
def test_without_a_network_the_address_is_named(monkeypatch, tmp_path, path, address):
    def offline(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(SystemExit, match=rf': no network; fetch {address}'):
        cli.require_start_weights(Start(path))


def test_start_weights_that_are_there_are_accepted(tmp_path):
    torch.save({}, tmp_path / 'a.pth')
    model = nn.ModuleDict(dict(module=Start(str(tmp_path / 'a.pth'))))
    cli.require_start_weights(model)
    (tmp_path / 'a.pth').unlink()
    with pytest.raises(SystemExit, match=r'^model\.backbone\.init_cfg\.checkpoint not found: '):
        cli.require_start_weights(model)


def dynamic(kernel_num=4, classes=3):
    return nn.ModuleDict(
        dict(
            backbone=nn.Sequential(ODConv2d(3, 8, 3, kernel_num=kernel_num), nn.BatchNorm2d(8)),
            head=nn.Conv2d(8, classes, 1),
        )
    )


def test_weights_of_another_norm_are_named(tmp_path):
    """A LayerNorm has all its entries in the file of a BatchNorm."""
    path = tmp_path / 'a.pth'
    for kind in ('LN', 'BN'):
        layer = nn.Sequential(ODConv2d(16, 8, 3, norm_cfg=dict(type=kind)))
        torch.save(layer.state_dict(), path)
        require_weights(layer, path)
    layer = nn.Sequential(ODConv2d(16, 8, 3, norm_cfg=dict(type='LN')))
    with pytest.raises(
        SystemExit, match=r'0\.attention\.bn is a BatchNorm in the file, but not in'
    ):
        require_weights(layer, path)


def require_weights(model, path):
    cli.require_weights(model, cli.require_checkpoint(str(path)))


@pytest.mark.parametrize('wrapped', [True, False])
def test_weights_that_fit_are_loaded(tmp_path, wrapped):
    model, other = dynamic(), dynamic()
    state = {'module.' * wrapped + name: t for name, t in model.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'a.pth')
    require_weights(other, tmp_path / 'a.pth')
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_static_weights_fit(tmp_path):
    plain = nn.ModuleDict(
        dict(backbone=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), head=nn.Conv2d(8, 3, 1))
    )
    torch.save(plain.state_dict(), tmp_path / 'a.pth')
    require_weights(dynamic(), tmp_path / 'a.pth')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(kernel_num=2), '1 banks have K=2 in the file, K=4 in the config'),
        (
            dict(classes=5),
            r'head\.weight has shape \(5, 8, 1, 1\) in the file, \(3, 8, 1, 1\) in the config '
            r'\(and 1 more like it\)',
        ),
    ],
)
def test_weights_of_another_shape_end_the_program(tmp_path, options, message):
    torch.save(dynamic(**options).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=rf'a\.pth does not fit the config: {message}'):
        require_weights(dynamic(), tmp_path / 'a.pth')


def test_weights_of_another_model_end_the_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match=r'of the \d+ weights of the model are not in the file'):
        require_weights(dynamic(), tmp_path / 'a.pth')


@pytest.mark.parametrize('content', [b'', b'text', pickle.dumps(3)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(SystemExit, match=r'a\.pth (cannot be read as a checkpoint|has no state)'):
        require_weights(dynamic(), tmp_path / 'a.pth')


def test_a_truncated_checkpoint_is_named(tmp_path):
    torch.save(dynamic().state_dict(), tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r'a\.pth cannot be read as a checkpoint'):
        require_weights(dynamic(), tmp_path / 'a.pth')
