import pytest

from mmdet_odconv.checkpoint.published import backbone_name


@pytest.mark.parametrize(
    ('published', 'expected'),
    [
        ('module.layer1.0.conv1.weight', 'layer1.0.conv1.weight'),
        ('module.fc.weight', None),
        ('classifier.1.bias', None),
        ('features.0.0.weight', 'conv1.conv.weight'),
        ('features.0.1.running_mean', 'conv1.bn.running_mean'),
        ('features.1.conv.0.0.weight', 'layer1.0.depthwise_conv.conv.weight'),
        ('features.1.conv.2.bias', 'layer1.0.linear_conv.bn.bias'),
        (
            'module.features.3.conv.1.0.attention.fc.weight',
            'layer2.1.depthwise_conv.conv.attention.fc.weight',
        ),
        ('features.17.conv.3.weight', 'layer7.0.linear_conv.bn.weight'),
        ('features.18.0.attention.bn.bias', 'conv2.conv.attention.bn.bias'),
    ],
)
def test_names(published, expected):
    assert backbone_name(published) == expected


@pytest.mark.parametrize(
    ('older', 'expected'),
    [
        ('features.0.0.weight', 'conv1.conv.weight'),
        ('features.1.conv.1.bias', 'layer1.0.depthwise_conv.bn.bias'),
        ('features.1.conv.3.weight', 'layer1.0.linear_conv.conv.weight'),
        ('features.2.conv.0.weight', 'layer2.0.expand_conv.conv.weight'),
        ('features.2.conv.3.weight', 'layer2.0.depthwise_conv.conv.weight'),
        ('module.features.17.conv.7.running_var', 'layer7.0.linear_conv.bn.running_var'),
        ('features.18.1.weight', 'conv2.bn.weight'),
    ],
)
def test_torchvisions_older_names(older, expected):
    assert backbone_name(older, flat=True) == expected
