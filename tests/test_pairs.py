"""Features that meet: pairs of them drawn by chance, against plain convolutions and the formula.

Each test trains a small detector with two features at a time and checks its weights and outputs.
The number of examples is that of hypothesis's profile, as in ``test_properties.py``.
"""

import copy
import pickle
from fractions import Fraction
from itertools import combinations
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.model import BaseModule, ExponentialMovingAverage
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_odconv import (
    ODConvOptimWrapperConstructor,
    convert_to_odconv,
    fuse_odconv_bn,
    use_valid_pooling,
)
from mmdet_odconv.deployment import collapse_static_layers
from mmdet_odconv.layers import DynamicConvNd
from tests.reference import randomise, reference_forward

RATE, MOMENTUM, DECAY, AVERAGING = 0.05, 0.9, 0.01, 0.3


class SteppedByAnother(torch.optim.Optimizer):
    """Leaves the steps to another optimizer, whose groups are its own, as SAM does."""

    def __init__(self, params, base, **options):
        self.base = getattr(torch.optim, base['type'])(params, **options)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


# Of each feature the values, the first of which is its absence.
FEATURES = dict(
    norm=[
        dict(type='BN'),
        dict(type='LN'),
        dict(type='GN', num_groups=4),
        dict(type='CalibratedNorm'),
        None,
    ],
    layer=['ODConv', 'CondConv2d', 'DyConv2d'],
    kernel_num=[3, 1],
    recompute=[None, 'reentrant', 'not reentrant'],
    average=[False, True],
    accumulate=[1, 2],
    convert=['model', 'checkpoint', 'layer by layer'],
    initialise=[False, True],
    deploy=[None, 'fuse', 'collapse'],
    valid=[False, True],
    optimizer=[dict(type='SGD'), dict(type=SteppedByAnother, base=dict(type='SGD'))],
    copy=[None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
)


@st.composite
def pairs(draw, leave_out=()):
    case = {name: values[0] for name, values in FEATURES.items()}
    names = [name for name in FEATURES if name not in leave_out]
    for name in draw(st.sampled_from(list(combinations(names, 2)))):
        case[name] = draw(st.sampled_from(FEATURES[name][1:]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return SimpleNamespace(**case)


class Stage(nn.Module):
    def __init__(self, recompute, *args, **options):
        super().__init__()
        self.recompute = recompute
        self.conv = nn.Conv2d(*args, **options)
        self.bn = nn.BatchNorm2d(self.conv.out_channels)

    def forward(self, x):
        if self.recompute and self.training:
            y = checkpoint(self.conv, x, use_reentrant=self.recompute == 'reentrant')
        else:
            y = self.conv(x)
        return self.bn(y).relu()


class Detector(BaseModule):
    """Has the arguments of mmdet's detectors."""

    def __init__(self, recompute=None):
        super().__init__(init_cfg=dict(type='Kaiming', layer='Conv2d'))
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            Stage(recompute, 4, 8, 3, padding=1, stride=2, bias=False),
            Stage(recompute, 8, 8, 3, padding=1, groups=8),
            Stage(recompute, 8, 6, 1),
        )

    def forward(self, inputs, data_samples=None, mode='tensor'):
        y = self.backbone(inputs)
        return y.square().mean() if mode == 'loss' else y


def batches(number=4):
    """Padded images, and the samples that have their sizes."""
    for _ in range(number):
        sizes = torch.randint(4, 10, (4, 2)).tolist()
        images = torch.zeros(4, 3, 9, 9, dtype=torch.float64)
        for image, (height, width) in zip(images, sizes, strict=True):
            image[:, :height, :width] = torch.rand(3, height, width)
        yield images, [SimpleNamespace(img_shape=tuple(size)) for size in sizes]


def converted(plain, case, **options):
    """A model like ``plain`` with dynamic layers, in which the case's features are prepared."""
    options |= dict(layer=case.layer, kernel_num=case.kernel_num)
    if case.layer == 'ODConv':  # the others have no norm
        options['norm_cfg'] = case.norm
    model = copy.deepcopy(plain)
    if case.convert == 'layer by layer':
        for part in list(model.backbone)[1:]:
            convert_to_odconv(part, include='conv', **options)
    else:
        if case.convert == 'checkpoint':
            randomise(model)
        convert_to_odconv(model, **options)
        model.load_state_dict(plain.state_dict() if case.convert == 'checkpoint' else {}, False)
    if case.valid:
        use_valid_pooling(model)
    return case.copy(model) if case.copy else model


def dynamic_layers(model):
    return [module for module in model.modules() if isinstance(module, DynamicConvNd)]


def train(model, case, data, **rates):
    """By MMEngine's wrapper and hooks, with the features of the case."""
    wrapper = ODConvOptimWrapperConstructor(
        dict(
            optimizer=dict(case.optimizer, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY),
            accumulative_counts=case.accumulate,
        ),
        rates,
    )(model)
    wrapper.initialize_count_status(model, 0, len(data))
    average = ExponentialMovingAverage(model, momentum=AVERAGING)
    model.train()
    for i, (images, samples) in enumerate(data):
        if i == 2 and case.initialise:
            model._is_init = True
            model.init_weights()
        with wrapper.optim_context(model):
            loss = model(images, samples, mode='loss')
        wrapper.update_params(loss)
        average.update_parameters(model)
    return average.module if case.average else model


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9)


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(pairs())
def test_with_constant_attentions_a_model_trains_as_its_plain_twin(case):
    plain = Detector(case.recompute).double()
    model = converted(plain, case)
    data = list(batches())
    frozen = dict(attention_lr_mult=0.0, bank_lr_mult='compensated')
    plain, model = (train(m, case, data, **frozen) for m in (plain, model))
    for layer, conv in zip(
        dynamic_layers(model), [s.conv for s in plain.backbone[1:]], strict=True
    ):
        scale = layer.attention.constant_product()
        torch.testing.assert_close(scale * layer.weight.mean(0), conv.weight, rtol=1e-8, atol=1e-9)
    plain.eval()
    model.eval()
    images, samples = data[0]
    if case.deploy == 'fuse':
        fuse_odconv_bn(model)
    elif case.deploy == 'collapse':
        collapse_static_layers(model, [images])
        assert not dynamic_layers(model)
    assert_close([model(images, samples)], [plain(images)])


class Formula(nn.Module):
    """A dynamic layer that follows the formula."""

    valid = None

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return reference_forward(self.layer, x, self.valid)


def by_formula(model, case, images, samples, **kwargs):
    """What ``model``, whose layers are formulas, gives for a batch."""
    for module in model.modules():
        if isinstance(module, Formula) and case.valid:
            module.valid = [tuple(Fraction(n, 9) for n in s.img_shape) for s in samples]
    return model(images, **kwargs)


def train_by_formula(model, case, data):
    """The obvious loop."""
    banks = [m.layer.weight for m in model.modules() if isinstance(m, Formula)]
    attentions = [p for n, p in model.named_parameters() if '.attention.' in n]
    rest = [p for p in model.parameters() if not any(p is q for q in (*banks, *attentions))]
    groups = [
        dict(params=rest),
        dict(params=banks, lr=2 * RATE, weight_decay=DECAY / 2),
        dict(params=attentions, lr=RATE / 2),
    ]
    optimizer = torch.optim.SGD(groups, RATE, MOMENTUM, weight_decay=DECAY)
    losses, average = [], None
    for images, samples in data:
        losses.append(by_formula(model, case, images, samples, mode='loss'))
        if len(losses) == case.accumulate:
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()
            optimizer.step()
            losses = []
        now = [p.detach().clone() for p in model.parameters()]
        if average is not None:
            now = [(1 - AVERAGING) * a + AVERAGING * p for a, p in zip(average, now, strict=True)]
        average = now
    if case.average:
        for parameter, value in zip(model.parameters(), average, strict=True):
            parameter.data = value


@torch.no_grad()
def copy_tensors(target, source, kind):
    for one, other in zip(getattr(target, kind)(), getattr(source, kind)(), strict=True):
        one.copy_(other)


@settings(max_examples=max(settings().max_examples // 4, 1))
@given(pairs(leave_out=['convert', 'layer']))
def test_a_model_trains_as_the_formula_says(case):
    case.deploy = 'fuse' if case.deploy else None  # layers that move do not collapse
    model = converted(Detector(case.recompute).double(), case, attention_init='published')
    randomise(model)
    for stage in model.backbone[1:]:
        nn.init.normal_(stage.conv.weight)
    formula = Detector().double()
    for stage, other in zip(formula.backbone[1:], model.backbone[1:], strict=True):
        stage.conv = Formula(copy.deepcopy(other.conv))
    copy_tensors(formula, model, 'parameters')
    data = list(batches())
    model = train(model, case, data, attention_lr_mult=0.5, bank_lr_mult=2.0)
    train_by_formula(formula.train(), case, data)
    assert_close(model.parameters(), formula.parameters())
    copy_tensors(formula, model, 'buffers')
    images, samples = data[0]
    if case.deploy:
        fuse_odconv_bn(model.eval())
    assert_close(
        [model.eval()(images, samples)], [by_formula(formula.eval(), case, images, samples)]
    )
