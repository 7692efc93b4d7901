#!/usr/bin/env python
"""Draw the ODConv layer: docs/layer.svg.

Example: python tools/draw_layer.py
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / 'docs/layer.svg'
PLAIN, BANK = '#eeeeee', '#f6d7a7'
# A colour for each attention, the same at its head and where it acts.
COLORS = dict(c='#b8d8f2', s='#c5e8c0', k='#f2c0c8', f='#d9c9ee')


def box(axes: Any, x: float, y: float, width: float, text: str, color: str = PLAIN) -> None:
    """A box of the drawing with its middle at (x, y)."""
    style = dict(boxstyle='round,pad=0,rounding_size=0.1', facecolor=color, edgecolor='#444444')
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.34), width, 0.68, **style))
    axes.text(x, y, text, ha='center', va='center', fontsize=11)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from one point to another."""
    style = dict(arrowstyle='-|>', color='#444444', shrinkA=0, shrinkB=0, linewidth=1)
    axes.annotate('', end, start, arrowprops=style)


def draw(path: Path) -> None:
    """The layer: the attentions above, the bank in the middle, the convolution below."""
    figure, axes = plt.subplots(figsize=(8.6, 4.3))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 12), ylim=(0, 6))
    axes.axis('off')

    box(axes, 0.8, 0.7, 0.9, 'x')
    box(axes, 0.8, 5.3, 1.4, 'average')
    box(axes, 3.0, 5.3, 2.0, 'FC, norm, ReLU')
    arrow(axes, (0.8, 1.04), (0.8, 4.96))
    arrow(axes, (1.5, 5.3), (2.0, 5.3))

    heads = dict(
        c=(2.9, 'c: input channels'),
        s=(5.2, 's: positions'),
        k=(7.4, 'k: kernels'),
        f=(9.9, 'f: output filters'),
    )
    widths = dict(c=2.1, s=1.7, k=1.5, f=2.1)
    axes.plot([4.0, 9.9], [5.3, 5.3], color='#444444', linewidth=1)
    axes.plot([4.4, 4.4, 2.9], [5.3, 4.6, 4.6], color='#444444', linewidth=1)
    for name, (x, text) in heads.items():
        arrow(axes, (x, 4.6 if name == 'c' else 5.3), (x, 4.24))
        box(axes, x, 3.9, widths[name], text, COLORS[name])

    # Sheets behind one another: the K kernels of the bank.
    for j in (2, 1, 0):
        box(axes, 6.3 + 0.12 * j, 2.3 + 0.12 * j, 1.5, 'W₁ … W_K' if j == 0 else '', BANK)
    arrow(axes, (5.2, 3.56), (5.9, 2.9))
    arrow(axes, (7.4, 3.56), (6.9, 2.9))
    text = 'one kernel for\nthis image:\nΣⱼ kⱼ (s ⊙ Wⱼ)'
    axes.text(5.3, 2.2, text, ha='right', va='center', fontsize=10)

    box(axes, 2.9, 0.7, 1.3, 'c ⊙ x', COLORS['c'])
    box(axes, 6.3, 0.7, 1.9, 'convolution')
    box(axes, 9.9, 0.7, 1.3, 'f ⊙', COLORS['f'])
    box(axes, 11.4, 0.7, 0.9, 'y')
    arrow(axes, (2.9, 3.56), (2.9, 1.04))
    arrow(axes, (9.9, 3.56), (9.9, 1.04))
    arrow(axes, (6.3, 1.96), (6.3, 1.04))
    for start, end in ((1.25, 2.25), (3.55, 5.35), (7.25, 9.25), (10.55, 10.95)):
        arrow(axes, (start, 0.7), (end, 0.7))

    # Text stays text, and the same drawing gives the same file.
    with mpl.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': path.name}):
        figure.savefig(path, metadata={'Date': None}, facecolor='white')
    plt.close(figure)


if __name__ == '__main__':
    draw(OUT)
