"""``init_weights`` moves the layers of a converted model where it moves the plain convolutions."""

import copy

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.model import BaseModel, BaseModule, ModuleList
from mmengine.runner import Runner
from torch import nn

from mmdet_odconv import convert_to_odconv
from mmdet_odconv.layers import DynamicConvNd

pytestmark = pytest.mark.filterwarnings('ignore:The BatchNorm in an ODConv')


class Foreign(nn.Module):
    """A network of another library, whose weights are loaded before it gets here."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        return self.layers(x)


class OwnInit(BaseModule):
    """Initialises by code, not by a config."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def init_weights(self):
        super().init_weights()
        nn.init.normal_(self.conv.weight)

    def forward(self, x):
        return self.conv(x)


class Net(BaseModel):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.first = nn.Conv2d(4, 4, 1)
        self.foreign = Foreign()
        self.parts = ModuleList([OwnInit()])
        self.resnet = ResNet(18, in_channels=4, base_channels=4, norm_eval=False)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.parts[0](self.foreign(self.first(torch.stack(inputs))))
        return dict(loss=sum(y.square().mean() for y in self.resnet(x)))


def convolutions(model):
    kinds = (nn.Conv2d, DynamicConvNd)
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, kinds)}


def moved(model, act):
    before = {name: weight.detach().clone() for name, weight in convolutions(model).items()}
    act(model)
    return {
        name
        for name, weight in convolutions(model).items()
        if not torch.equal(weight, before[name])
    }


def initialise(model):
    model.init_weights()


def whole(model):
    model._is_init = True


def backbone(model):
    model.resnet._is_init = True


def nothing(model):
    pass


@pytest.mark.parametrize('initialised', [whole, backbone, initialise, nothing])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_what_is_initialised_stays_as_in_the_plain_model(initialised, when):
    plain = Net()
    model = copy.deepcopy(plain)
    if when == 'before':
        initialised(model)
    convert_to_odconv(model, include='.*')
    if when == 'after':
        initialised(model)
    initialised(plain)
    expected = moved(plain, initialise)
    assert moved(model, initialise) == expected
    assert len(expected) == {whole: 0, backbone: 1, initialise: 0, nothing: 21}[initialised]


def test_an_initialisation_by_type_reaches_all():
    init_cfg = dict(type='Normal', layer='Conv2d')
    model = Net(init_cfg)
    convert_to_odconv(model, include='.*')
    assert moved(model, initialise) == convolutions(model).keys()


def test_a_second_runner_goes_on_from_the_weights_of_the_first(tmp_path):
    model = Net()
    convert_to_odconv(model, include='.*')

    def train(lr):
        Runner(
            model,
            str(tmp_path),
            train_dataloader=dict(
                dataset=[dict(inputs=torch.randn(4, 32, 32)) for _ in range(4)],
                batch_size=2,
                sampler=dict(type='DefaultSampler'),
                collate_fn=dict(type='pseudo_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr)),
            experiment_name=f'{tmp_path.name}-{lr}',
        ).train()

    train(0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
