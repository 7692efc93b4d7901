"""The arms of the study: what each changes in the config of a task.

Every arm can be trained at another learning rate: ``plain_rate4`` is ``plain`` at four times the
rate of the task.
"""

import re
from typing import Any

Options = dict[str, Any]


def split_rate(arm: str) -> tuple[str, float]:
    """The arm without its learning rate, and the rate relative to the task's."""
    found = re.fullmatch(r'(.+?)_rate(\d+(?:\.\d+)?)', arm)
    return (found[1], float(found[2])) if found else (arm, 1.0)


def dynamic(kernel_num: int, **odconv_cfg: Any) -> Options:
    """The backbone with dynamic convolutions in its blocks; their stem and shortcuts stay plain."""
    return {
        'model.backbone.type': 'ODResNet',
        'model.backbone.kernel_num': kernel_num,
        'model.backbone.odconv_cfg': odconv_cfg,
    }


def wide(channels: int) -> Options:
    """A network with so many channels in its first stage, and accordingly in those that follow."""
    return {
        'model.backbone.base_channels': channels,
        'model.neck.in_channels': [channels * 2**stage for stage in range(4)],
    }


LN = dict(type='LN')
CALIBRATED = dict(type='CalibratedNorm')
# What banks learn at that start from static weights. Plain arms take no notice of it.
BANK_RATE = 2.0
STATIC_WEIGHTS: Options = {
    'optim_wrapper.constructor': 'ODConvOptimWrapperConstructor',
    'optim_wrapper.paramwise_cfg.bank_lr_mult': BANK_RATE,
}


def frozen_banks(options: Options) -> Options:
    """With ODConv in the frozen first stage as well, where only the attentions learn."""
    rates = {'backbone.layer1': dict(lr_mult=0.0, decay_mult=0.0)}
    for stage in (1, 2, 3, 4):
        for layer in (f'layer{stage}.{block}.conv{i}' for block in (0, 1) for i in (1, 2)):
            if stage == 1:
                rates[f'backbone.{layer}.attention'] = dict(lr_mult=1.0, decay_mult=1.0)
            else:
                rates[f'backbone.{layer}.weight'] = dict(
                    lr_mult=BANK_RATE, decay_mult=1 / BANK_RATE
                )
    return {
        **options,
        'model.backbone.frozen_stages': 0,
        'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg': dict(custom_keys=rates),
    }


def bank_rate(options: Options, factor: float | str) -> Options:
    """With another rate for the banks than the task gives them."""
    return {**options, 'optim_wrapper.paramwise_cfg.bank_lr_mult': factor}


def annealed(options: Options, iters: int) -> Options:
    """With the paper's temperature, from 30 to 1 in so many iterations: a tenth of the schedule."""
    hook = dict(type='ODConvTemperatureHook', initial=30.0, anneal_iters=iters)
    return {**options, 'custom_hooks': [hook]}


def attention_rate(options: Options, factor: float) -> Options:
    """With another rate for the attentions, and no weight decay that would hold them at zero."""
    return {
        **options,
        'optim_wrapper.constructor': 'ODConvOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg': dict(attention_lr_mult=factor, attention_decay_mult=0.0),
    }


def calibrated(options: Options) -> Options:
    """With the hook that the CalibratedNorm of an arm needs."""
    return {**options, 'custom_hooks': [dict(type='ODConvCalibrationHook')]}


def start(run: str) -> Options:
    """From the checkpoint of a run of another task, rather than from STATIC_DETECTOR."""
    return {'load_from': f'work_dirs/study/{run}/epoch_4.pth'}


def on(base: Options, arms: dict[str, Options]) -> dict[str, Options]:
    """The arms on top of further changes."""
    return {arm: {**base, **options} for arm, options in arms.items()}


def at_rate(arms: dict[str, Options], rate: float) -> dict[str, Options]:
    """The arms with another learning rate."""
    return {arm: {**options, 'optim_wrapper.optimizer.lr': rate} for arm, options in arms.items()}


ARMS: dict[str, Options] = {
    'plain': {},
    'od_k1': dynamic(1),
    'od_k4': dynamic(4),
    'od_k4_ln': dynamic(4, norm_cfg=LN),
    'od_k4_calibrated': calibrated(dynamic(4, norm_cfg=CALIBRATED)),
    'od_k4_paper': annealed(dynamic(4, attention_init='published'), 300),
    'od_k4_attention5': attention_rate(dynamic(4), 5.0),
    'condconv_k4': dynamic(4, type='CondConv2d'),
    'condconv_k8': dynamic(8, type='CondConv2d'),
    'dyconv_k4': dynamic(4, type='DyConv2d'),
    'od_spatial': dynamic(1, attentions=('spatial',)),
    'od_channel': dynamic(1, attentions=('channel',)),
    # Squeeze and excitation in front of each convolution: the channel attention, without a norm.
    'se': dynamic(1, attentions=('channel',), norm_cfg=None),
    'od_filter': dynamic(1, attentions=('filter',)),
    'od_kernel': dynamic(4, attentions=('kernel',)),
    # As many multiply-adds, or as much time for a step, as od_k4: see docs/study.md.
    'plain_wide_madds': wide(17),
    'plain_wide_time': wide(22),
}

# Of the tasks that start from static weights.
PRETRAINED_ARMS = on(
    STATIC_WEIGHTS,
    {
        'plain': {},
        'od_k4_ln': dynamic(4, norm_cfg=LN),
        'od_k4_ln_spread0.1': bank_rate(dynamic(4, norm_cfg=LN, spread=0.1), 1.0),
        'od_k4_ln_spread2': bank_rate(dynamic(4, norm_cfg=LN, spread=2.0), 1.0),
        'od_k4_ln_frozen_banks': frozen_banks(dynamic(4, norm_cfg=LN)),
        'od_k4': dynamic(4),
        'od_k4_calibrated': calibrated(dynamic(4, norm_cfg=CALIBRATED)),
        'od_k4_gn': dynamic(4, norm_cfg=dict(type='GN', num_groups=4)),
        'od_k4_no_norm': dynamic(4, norm_cfg=None),
        # BANK_RATE is that of four kernels with four attentions. These have a factor of their own.
        'od_k1_calibrated': bank_rate(calibrated(dynamic(1, norm_cfg=CALIBRATED)), 'compensated'),
        'od_kernel_ln': bank_rate(dynamic(4, attentions=('kernel',), norm_cfg=LN), 'compensated'),
        'condconv_k4': bank_rate(dynamic(4, type='CondConv2d'), 'compensated'),
        'dyconv_k4': bank_rate(dynamic(4, type='DyConv2d'), 'compensated'),
    },
)

# A harder task for the same backbone: with a light neck and head, and from stride 8 on, as most
# detectors look. The backbone is then nearly all of the network, and small objects are difficult.
# The learning rate is the one that gave plain convolutions their best result in the other tasks.
LIGHT: Options = {
    'optim_wrapper.optimizer.lr': 0.004,
    'model.neck.start_level': 1,
    'model.neck.num_outs': 3,
    'model.bbox_head.stacked_convs': 1,
    'model.bbox_head.anchor_generator.octave_base_scale': 1.5,
    'model.bbox_head.anchor_generator.strides': [8, 16, 32],
}
LIGHT_ARMS = on(LIGHT, ARMS)
LIGHT_PRETRAINED_ARMS = on(LIGHT, PRETRAINED_ARMS)
# The same with half the channels.
NARROW_ARMS = on(wide(8), LIGHT_ARMS)
NARROW_ARMS |= {'plain_wide_madds': {**LIGHT, **wide(9)}, 'plain_wide_time': {**LIGHT, **wide(16)}}
BATCH2_ARMS = at_rate(NARROW_ARMS, 0.001)
DEEPPCB_ARMS = at_rate(NARROW_ARMS, 0.002)  # for batches of half the size
NARROW_PRETRAINED_ARMS = on(wide(8), LIGHT_PRETRAINED_ARMS)
# From another plain detector, that of seed 2; with a first stage that
# is frozen, and so plain in ODConv's kind too, unlike that of od_k4_ln_frozen_banks; and from a
# static detector with nine channels in place of eight, which was trained as long.
FINE_TUNE_ARMS = at_rate(
    {
        **NARROW_PRETRAINED_ARMS,
        **{
            f'{arm}_start2': NARROW_PRETRAINED_ARMS[arm] | start('narrow/plain-2')
            for arm in ('plain', 'od_k4_calibrated')
        },
        **{
            f'{arm}_frozen': NARROW_PRETRAINED_ARMS[arm] | {'model.backbone.frozen_stages': 1}
            for arm in ('plain', 'od_k4_ln')
        },
        'plain_wide_madds': NARROW_ARMS['plain_wide_madds'] | start('narrow/plain_wide_madds-1'),
    },
    0.001,
)
# The same for the networks with twice the channels, from the detectors of seeds 1 and 0.
LIGHT_WIDE = LIGHT_ARMS['plain_wide_madds']
FINE_TUNE_LIGHT_ARMS = at_rate(
    {
        **on(start('light/plain-1'), LIGHT_PRETRAINED_ARMS),
        'plain_wide_madds': LIGHT_WIDE | start('light/plain_wide_madds-1'),
        **{
            f'{arm}_start0': LIGHT_PRETRAINED_ARMS[arm] | start('light/plain-0')
            for arm in ('plain', 'od_k4_calibrated')
        },
        'plain_wide_madds_start0': LIGHT_WIDE | start('light/plain_wide_madds-0'),
    },
    0.001,
)
FINE_TUNE_BATCH2_ARMS = at_rate(NARROW_PRETRAINED_ARMS, 0.003)
FINE_TUNE_BATCH8_ARMS = at_rate(NARROW_PRETRAINED_ARMS, 0.012)
FINE_TUNE_DEEPPCB_ARMS = at_rate(NARROW_PRETRAINED_ARMS, 0.002)


def mobile(
    kind: str,
    widen_factor: float = 0.25,
    channels: tuple[int, ...] = (8, 8, 24, 1280),
    **odconv: Any,
) -> Options:
    """A light detector with a MobileNetV2, of a quarter of its channels by default.

    Its ODConv kind has ODConv in every convolution but the first, as in the paper.
    """
    backbone = dict(
        _delete_=True,
        type=kind,
        widen_factor=widen_factor,
        out_indices=(1, 2, 4, 7),
        norm_eval=False,
        init_cfg=None,
        **odconv,
    )
    return {**LIGHT, 'model.backbone': backbone, 'model.neck.in_channels': list(channels)}


MOBILE_ARMS = {
    'plain': mobile('MobileNetV2'),
    'od_k1': mobile('ODMobileNetV2', kernel_num=1),
    'od_k4': mobile('ODMobileNetV2', kernel_num=4),
    'od_k4_calibrated': calibrated(
        mobile('ODMobileNetV2', kernel_num=4, odconv_cfg=dict(norm_cfg=CALIBRATED))
    ),
    # All channels are multiples of eight, so this is the first one with as many multiply-adds as
    # od_k4. It has 19 % more.
    'plain_wide_madds': mobile('MobileNetV2', 0.28, (8, 16, 32, 1280)),
}
FINE_TUNE_MOBILE_ARMS = at_rate(
    on(
        STATIC_WEIGHTS | start('mobile/plain-0'),
        {arm: MOBILE_ARMS[arm] for arm in ('plain', 'od_k4_calibrated')},
    ),
    0.001,
)


def converted(
    kernel_num: int, layer: str = 'ODConv2d', include: str = 'backbone', **odconv: Any
) -> Options:
    """A detector from static weights, its convolutions converted, with the rate for its banks."""
    return {
        'model.type': 'ODConvModel',
        'model.detector': 'RetinaNet',
        'model.odconv': dict(kernel_num=kernel_num, layer=layer, include=include, **odconv),
        'optim_wrapper.constructor': 'ODConvOptimWrapperConstructor',
        'optim_wrapper.paramwise_cfg': dict(bank_lr_mult='compensated'),
    }


def faster(options: Options, factor: float) -> Options:
    """With attentions that learn so many times faster than the rest."""
    rates = {**options['optim_wrapper.paramwise_cfg'], 'attention_lr_mult': factor}
    return {**options, 'optim_wrapper.paramwise_cfg': rates}


def awake(kernel_num: int, factor: float, **odconv: Any) -> Options:
    """Converted, with a CalibratedNorm and attentions that learn so many times faster."""
    return faster(calibrated(converted(kernel_num, norm_cfg=CALIBRATED, **odconv)), factor)


def under_sgd(options: Options) -> Options:
    """With the optimizer of MMDetection's COCO configs, at their rate for 8 images."""
    sgd = dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001)
    return {**options, 'optim_wrapper.optimizer': sgd}


def larger(arch: str, channels: list[int]) -> Options:
    """The next larger backbone with its own ImageNet weights: what one would take instead."""
    return {
        'model.backbone.arch': arch,
        'model.backbone.init_cfg.checkpoint': f'checkpoints/efficientnet-{arch}.pth',
        'model.neck.in_channels': channels,
    }


# Real images, and a backbone of real width with ImageNet weights. The configs are those that users
# get; a run of the study has one process and keeps its checkpoints by its own rules.
LITE0: Options = {
    **{
        f'{part}_dataloader.{name}': value
        for part in ('train', 'val', 'test')
        for name, value in (('num_workers', 0), ('persistent_workers', False))
    },
    'log_processor.window_size': 50,
    'default_hooks.logger.interval': 50,
    'default_hooks.checkpoint': dict(
        _delete_=True, type='CheckpointHook', interval=1, max_keep_ckpts=2
    ),
}
_LITE0_ARMS: dict[str, Options] = {
    'plain': {},
    'od_k4_ln': converted(4, norm_cfg=LN),
    **{
        f'od_k4_ln_attention{factor}': faster(converted(4, norm_cfg=LN), factor)
        for factor in (10, 30)
    },
    **{
        f'od_k{k}_calibrated_attention{factor}': awake(k, factor)
        for k in (1, 4)
        for factor in (1, 3, 10, 30)
    },
    # The depthwise convolutions stay plain: they are half of what ODConv costs in such a network.
    **{
        f'od_k{k}_pointwise_attention{factor}': awake(k, factor, exclude=['depthwise_conv'])
        for k in (1, 4)
        for factor in (3, 10, 30)
    },
    # The mean kernel moves as fast as a plain one; with 'compensated' it is 1.41 times as fast.
    'od_k4_pointwise_equal_attention10': bank_rate(
        awake(4, 10, exclude=['depthwise_conv']), 1 / 0.9**2
    ),
    'od_k4_pointwise_ln': converted(4, norm_cfg=LN, exclude=['depthwise_conv']),
    # Sigmoids that start at a half, where they are steepest.
    **{
        f'od_k{k}_calibrated_half_attention{factor}': awake(k, factor, attention_bias=0.0)
        for k in (1, 4)
        for factor in (3, 10, 30)
    },
    'sgd_od_k4_ln_attention0.1': under_sgd(faster(converted(4, norm_cfg=LN), 0.1)),
    **{
        f'sgd_od_k4_calibrated_attention{factor}': under_sgd(awake(4, factor))
        for factor in (1, 10, 100)
    },
    'condconv_k4': converted(4, 'CondConv2d'),
    'dyconv_k4': converted(4, 'DyConv2d'),
    'se': converted(1, attentions=('channel',), norm_cfg=None),
    'plain_lite1': larger('lite1', [40, 112, 320]),
    'plain_lite2': larger('lite2', [48, 120, 352]),
}
LITE0_ARMS = on(LITE0, _LITE0_ARMS)
