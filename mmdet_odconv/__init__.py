"""Omni-Dimensional Dynamic Convolution for MMDetection and the other OpenMMLab libraries.

Importing the package registers its layers, backbones and hooks, so a config needs only
``custom_imports = dict(imports=['mmdet_odconv'], allow_failed_imports=False)``.

Paper: Li, Zhou, Yao: Omni-Dimensional Dynamic Convolution, ICLR 2022
(https://openreview.net/forum?id=DmpCfq6Mg39)
"""

from .compat import check_versions, register_config_scope

check_versions()

from .backbones import EfficientNetLite, ODMobileNetV2, ODResNet, ODResNetV1d, ODResNeXt  # noqa: E402
from .conversion import (  # noqa: E402
    convert_to_odconv,
    export_published_checkpoint,
    load_published_checkpoint,
)
from .deployment import (  # noqa: E402
    collapse_static_layers,
    fuse_odconv_bn,
    prepare_for_export,
    prepare_for_inference,
)
from .layers import (  # noqa: E402
    CalibratedNorm,
    CondConv2d,
    DyConv2d,
    DynamicConvNd,
    FDConv2d,
    ODConv1d,
    ODConv2d,
    ODConv3d,
    calibrate,
    set_temperature,
    use_valid_pooling,
)
from .safe_running import (  # noqa: E402
    NonFiniteHook,
    PreemptionHook,
    SafeCheckpointHook,
    register_safe_globals,
)
from .training import (  # noqa: E402
    ODConvAttentionHook,
    ODConvCalibrationHook,
    ODConvOptimWrapperConstructor,
    ODConvTemperatureHook,
)
from .version import __version__  # noqa: E402

register_safe_globals()
register_config_scope()

__all__ = [
    'CalibratedNorm',
    'CondConv2d',
    'DyConv2d',
    'DynamicConvNd',
    'EfficientNetLite',
    'FDConv2d',
    'NonFiniteHook',
    'ODConv1d',
    'ODConv2d',
    'ODConv3d',
    'ODConvAttentionHook',
    'ODConvCalibrationHook',
    'ODConvOptimWrapperConstructor',
    'ODConvTemperatureHook',
    'ODMobileNetV2',
    'ODResNeXt',
    'ODResNet',
    'ODResNetV1d',
    'PreemptionHook',
    'SafeCheckpointHook',
    '__version__',
    'calibrate',
    'collapse_static_layers',
    'convert_to_odconv',
    'export_published_checkpoint',
    'fuse_odconv_bn',
    'load_published_checkpoint',
    'prepare_for_export',
    'prepare_for_inference',
    'set_temperature',
    'use_valid_pooling',
]
