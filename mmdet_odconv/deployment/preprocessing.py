"""How an image becomes the input of a detector, in plain values for programs without mmdet."""

from typing import Any

from mmdet.utils import get_test_pipeline_cfg
from torch import nn


def describe_preprocessing(detector: nn.Module) -> dict[str, Any]:
    """How the test pipeline and the data preprocessor of a detector make its input of an image.

    Args:
        detector (nn.Module): The detector; where it has its whole config as ``cfg``, as mmdet's
            ``init_detector`` leaves it, the steps of the test pipeline are described too.

    Returns:
        dict: In the order of their use: ``resize`` (None, or ``scale`` as width and height or as a
        factor, and ``keep_ratio``), ``pad`` (None, or ``size`` as width and height or None,
        ``divisor`` or None, ``square``, ``value``), ``bgr_to_rgb``, ``mean`` and ``std`` of the
        channels, and the multiple ``size_divisor`` that height and width are padded to with
        ``pad_value``, below and on the right.

    Raises:
        ValueError: The test pipeline has a step that cannot be described like that.
    """
    steps: dict[str, Any] = dict(resize=None, pad=None)
    config = getattr(detector, 'cfg', None)
    for step in get_test_pipeline_cfg(config) if config is not None else ():
        name = str(step['type']).rpartition('.')[2]
        options = {key: value for key, value in step.items() if key != 'type'}
        if name == 'Resize' and steps['pad'] is None:
            scale = options.get('scale') or options.get('scale_factor')
            plain = options.get('interpolation', 'bilinear') == 'bilinear'
            if plain and options.get('backend', 'cv2') == 'cv2':
                steps['resize'] = dict(scale=scale, keep_ratio=options.get('keep_ratio', False))
                continue
        if name == 'Pad' and options.get('padding_mode', 'constant') == 'constant':
            value = options.get('pad_val', 0)
            steps['pad'] = dict(
                size=options.get('size'),
                divisor=options.get('size_divisor'),
                square=options.get('pad_to_square', False),
                value=value.get('img', 0) if isinstance(value, dict) else value,
            )
            continue
        if name not in ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs'):
            raise ValueError(
                f'the test pipeline has {dict(step)}, a step that the file cannot describe; it '
                'can describe a bilinear Resize, followed by a Pad with a constant'
            )
    given: Any = getattr(detector, 'data_preprocessor', None)
    normalises = getattr(given, '_enable_normalize', False)
    return dict(
        **steps,
        bgr_to_rgb=bool(getattr(given, '_channel_conversion', False)),
        mean=given.mean.flatten().tolist() if normalises else [0.0, 0.0, 0.0],
        std=given.std.flatten().tolist() if normalises else [1.0, 1.0, 1.0],
        size_divisor=getattr(given, 'pad_size_divisor', 1),
        pad_value=float(getattr(given, 'pad_value', 0)),
    )
