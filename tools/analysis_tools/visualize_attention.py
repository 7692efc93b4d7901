#!/usr/bin/env python
"""Show what the attentions of a detector's ODConv layers do with some images, on an HTML page.

The page (OUT_DIR/index.html) holds all it shows, and its figures lie beside it as PNG files.
docs/analysis.md says how to read it.
"""

import argparse
import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import cv2
import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmdet.apis import inference_detector
from mmdet.registry import VISUALIZERS
from mmengine.config import Config
from mmengine.visualization import Visualizer
from torch import Tensor, nn

from mmdet_odconv import cli
from mmdet_odconv.analysis import (
    DYNAMIC,
    AttentionMeter,
    AttentionStatistics,
    share_by_class,
)

NOTHING = 'nothing found'
PICTURE = 360  # longest side of a picture on the page, in pixels
ATTENTIONS = {
    'channel': 'input channel',
    'filter': 'output filter',
    'spatial': 'position in the kernel, row by row',
    'kernel': 'kernel of the bank',
}


@dataclass
class Picture:
    """An image with its detections drawn, and the class of the best of them."""

    name: str
    top_class: str
    jpeg: bytes


@dataclass
class Layer:
    """What the page shows of one layer.

    Attributes:
        module (nn.Module): The layer itself.
        statistics (AttentionStatistics): Its numbers over all images.
        rows (list[int]): The images in which it was used.
        values (dict[str, Tensor]): Each of its attentions in these images, shape (rows, n).
    """

    module: nn.Module
    statistics: AttentionStatistics
    rows: list[int]
    values: dict[str, Tensor]

    @property
    def is_dynamic(self) -> bool:
        """Whether it depends on the image; one image cannot tell, and counts as yes."""
        return len(self.rows) == 1 or self.statistics.largest_std >= DYNAMIC


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', help='folder of images, or one image')
    parser.add_argument('--out-dir', default='outputs/attention', help='folder for the page')
    parser.add_argument('--device', default='cpu', help='for example cpu or cuda:0')
    parser.add_argument(
        '--score-thr', type=float, default=0.3, help='lowest score of a detection that counts'
    )
    parser.add_argument(
        '--limit',
        type=cli.positive,
        default=32,
        help='use only the first images of the folder, at most this number (default: 32)',
    )
    cli.add_config_options(parser)
    return parser.parse_args()


def draw(visualizer: Visualizer, image: np.ndarray, sample: object, score_thr: float) -> np.ndarray:
    """The image with its detections, in the size of the page."""
    scale = PICTURE / max(image.shape[:2])
    found = sample.pred_instances
    if 'masks' not in found:  # boxes drawn on a small image would hide it
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        found.bboxes *= scale
    # matplotlib 3.11 would enlarge the picture to hold boxes that reach beyond the image.
    found.bboxes[:, 0::2].clamp_(0, image.shape[1])
    found.bboxes[:, 1::2].clamp_(0, image.shape[0])
    visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=score_thr)
    drawn = visualizer.get_image()
    scale = PICTURE / max(drawn.shape[:2])
    return cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def look(
    model: nn.Module, config: Config, paths: list[Path], score_thr: float
) -> tuple[list[Picture], list[Layer]]:
    """Detect in each image, and record the attentions of each layer that is used."""
    visualizer = VISUALIZERS.build(dict(config.visualizer, vis_backends=None))
    classes = model.dataset_meta['classes']
    # The config's palette is that of its data set, which can have fewer classes.
    visualizer.dataset_meta = dict(classes=classes, palette='random')
    pictures, attentions = [], []
    whole = AttentionMeter(model)
    for path in paths:
        image = mmcv.imread(str(path))
        if image is None:
            raise SystemExit(f'cannot be read as an image: {path}')
        with whole, AttentionMeter(model) as meter:
            sample = inference_detector(model, str(path))
        attentions.append(meter.means())
        found = sample.pred_instances
        found = found[found.scores >= score_thr]
        top_class = classes[found.labels[found.scores.argmax()]] if len(found) else NOTHING
        drawn = draw(visualizer, mmcv.bgr2rgb(image), sample, score_thr)
        _, jpeg = cv2.imencode('.jpg', mmcv.rgb2bgr(drawn))
        pictures.append(Picture(path.name, top_class, jpeg.tobytes()))

    layers = []
    for record in whole.statistics():
        # A layer of a head can have nothing to do in some images.
        rows = [i for i, means in enumerate(attentions) if record.name in means]
        values = {n: torch.stack([attentions[i][record.name][n] for i in rows]) for n in record.std}
        layers.append(Layer(whole.layers[record.name], record, rows, values))
    return pictures, layers


def plot_attention(name: str, values: Tensor, classes: list[str]) -> bytes:
    """A PNG of one attention: its mean, and how it differs from it in each image, by class.

    Of a single image it has the attention alone.
    """
    if len(values) == 1:
        figure = Figure(figsize=(5.4, 2.4), layout='constrained')
        _bars(figure.subplots(), name, values[0].numpy())
        return png(figure)
    order = sorted(range(len(classes)), key=classes.__getitem__)
    rows = values.numpy()[order]
    mean = rows.mean(0)
    differences = rows - mean
    limit = max(np.abs(differences).max(), DYNAMIC)

    figure = Figure(figsize=(5.4, 4.8))
    grid = figure.add_gridspec(
        2, 2, height_ratios=[1, 3.2], width_ratios=[1, 0.04], hspace=0.08, wspace=0.05,
        left=0.28, right=0.84, bottom=0.11, top=0.97,
    )  # fmt: skip
    top = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0])
    _bars(top, name, mean)
    top.set(ylabel='mean', xlabel='', xticks=[])
    mesh = below.imshow(
        differences, cmap='RdBu_r', vmin=-limit, vmax=limit, aspect='auto', interpolation='nearest'
    )
    below.set_xlabel(ATTENTIONS[name])
    below.xaxis.get_major_locator().set_params(integer=True)
    labels = [classes[i] for i in order]
    starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    ends = [*starts[1:], len(labels)]
    below.set_yticks([(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)])
    below.set_yticklabels([shorten(labels[a], 20) for a in starts], fontsize=9)
    for start in starts[1:]:
        below.axhline(start - 0.5, color='black', linewidth=0.5)
    bar = figure.add_subplot(grid[1, 1])
    figure.colorbar(mesh, cax=bar, label='difference from the mean')
    return png(figure)


def _bars(axes: Axes, name: str, values: np.ndarray) -> None:
    number = len(values)
    axes.bar(range(number), values, width=1.0 if number > 16 else 0.8, color='#4878a8')
    axes.set(ylim=(0, 1), xlim=(-0.5, number - 0.5), xlabel=ATTENTIONS[name])
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_overview(layers: list[Layer]) -> bytes:
    """A PNG of the standard deviations of all layers."""
    figure = Figure(figsize=(6.4, 3.4), layout='constrained')
    axes = figure.subplots()
    for name in ATTENTIONS:
        points = [
            (i, layer.statistics.std[name])
            for i, layer in enumerate(layers, 1)
            if name in layer.statistics.std
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker='o', markersize=4, label=name)
    axes.axhline(DYNAMIC, color='grey', linestyle='--', linewidth=1)
    axes.set(xlabel='number of the layer in the table', ylabel='standard deviation')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yscale('symlog', linthresh=DYNAMIC / 10)
    axes.set_ylim(0, 2 * max(DYNAMIC, *(layer.statistics.largest_std for layer in layers)))
    axes.grid(alpha=0.3)
    if axes.lines[:-1]:
        axes.legend()
    return png(figure)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + '…'


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def summary(layers: list[Layer], pictures: list[Picture], config: str) -> str:
    """The sentence at the top of the page."""
    dynamic = sum(layer.is_dynamic for layer in layers)
    if len(pictures) == 1:
        return (
            f'The attentions of the {len(layers)} ODConv layers of {config} in one image. Whether '
            'they depend on the image, only several images can tell.'
        )
    if dynamic == len(layers):
        verdict = f'all {dynamic} are dynamic, because their attentions depend on the image'
    elif dynamic:
        verdict = (
            f'{dynamic} of the {len(layers)} {"is" if dynamic == 1 else "are"} dynamic, and the '
            'attentions of the rest hardly depend on the image'
        )
    else:
        verdict = 'none is dynamic, so each layer computes what a plain convolution does'
    return (
        f'How the attentions of the {len(layers)} ODConv layers of {config} differ over '
        f'{len(pictures)} images: {verdict}.'
    )


def data_uri(kind: str, content: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def number(value: float | None, digits: int = 3) -> str:
    return '–' if value is None else f'{value:.{digits}f}'


def table_row(i: int, layer: Layer) -> str:
    record = layer.statistics
    cells = [f'<td>{i + 1}</td><th scope="row"><a href="#layer{i}">{escape(record.name)}</a></th>']
    for name in ATTENTIONS:
        std = record.std.get(name) if record.samples > 1 else None
        still = ' class="still"' if std is not None and std < DYNAMIC else ''
        cells.append(f'<td{still}>{number(std)}</td>')
    cells += [
        f'<td>{number(value, 2)}</td>'
        for value in (record.kernel_entropy, record.kernel_similarity)
    ]
    return f'<tr>{"".join(cells)}</tr>'


def layer_section(i: int, layer: Layer, pictures: list[Picture], figures: dict[str, bytes]) -> str:
    record, conv = layer.statistics, layer.module
    size = '×'.join(map(str, conv.kernel_size))
    facts = [
        f'{type(conv).__name__}, {size}, {conv.in_channels} to {conv.out_channels} channels'
        + (f' in {conv.groups} groups' if conv.groups > 1 else ''),
        f'{conv.kernel_num} kernels, of similarity {record.kernel_similarity:.2f}'
        if record.kernel_similarity is not None
        else 'one kernel',
    ]
    if record.kernel_entropy is not None:
        facts.append(f'entropy of the kernel attention {record.kernel_entropy:.2f}')
    if not layer.is_dynamic:
        facts.append('<strong>not dynamic</strong>')
    plots = []
    for name, content in figures.items():
        share = share_by_class(layer.values[name], [pictures[j].top_class for j in layer.rows])
        spread = (
            f'standard deviation {record.std[name]:.3f}; share by class {number(share, 2)}; '
            if len(layer.rows) > 1
            else ''
        )
        caption = (
            f'<b>{name.capitalize()} attention</b>: {spread}saturated '
            f'{record.saturated[name]:.0%}; weight of its head {record.head_weight[name]:.3f}'
        )
        plots.append(
            f'<figure><img src="{data_uri("png", content)}" alt="{name} attention of '
            f'{escape(record.name)}"><figcaption>{caption}</figcaption></figure>'
        )
    return (
        f'<section id="layer{i}" class="layer"><h2>{escape(record.name)}</h2>'
        f'<p>{"; ".join(facts)}.</p><div class="figures">{"".join(plots)}</div>'
        f'{kernel_strips(layer, pictures)}</section>'
    )


def kernel_strips(layer: Layer, pictures: list[Picture]) -> str:
    """For each kernel of the bank the images that use it most."""
    if 'kernel' not in layer.values or len(layer.rows) == 1:
        return ''
    strips = []
    for j, column in enumerate(layer.values['kernel'].T):
        figures = []
        for row in column.argsort(descending=True)[:5].tolist():
            i = layer.rows[row]
            figures.append(
                f'<figure><img data-of="picture{i}" alt="{escape(pictures[i].name)}">'
                f'<figcaption>{column[row]:.2f}</figcaption></figure>'
            )
        strips.append(f'<div class="strip"><b>kernel {j}</b>{"".join(figures)}</div>')
    return f'<h3>Images that use each kernel most, with its attention</h3>{"".join(strips)}'


def page(
    sentence: str,
    pictures: list[Picture],
    layers: list[Layer],
    overview: bytes | None,
    figures: list[dict[str, bytes]],
) -> str:
    """The whole page."""
    names = [escape(layer.statistics.name) for layer in layers]
    gallery = ''.join(
        f'<figure><img id="picture{i}" src="{data_uri("jpeg", p.jpeg)}" alt="{escape(p.name)} with '
        f'its detections"><figcaption>{escape(p.name)}: {escape(p.top_class)}</figcaption></figure>'
        for i, p in enumerate(pictures)
    )
    return PAGE.substitute(
        sentence=escape(sentence),
        least=f'{DYNAMIC:g}',
        options=''.join(f'<option value="layer{i}">{n}</option>' for i, n in enumerate(names)),
        rows=''.join(table_row(i, layer) for i, layer in enumerate(layers)),
        overview=''
        if overview is None
        else f'<h2>All layers</h2><img src="{data_uri("png", overview)}" '
        'alt="standard deviations by layer">',
        gallery=gallery,
        layers=''.join(
            layer_section(i, layer, pictures, plots)
            for i, (layer, plots) in enumerate(zip(layers, figures, strict=True))
        ),
    )


PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attentions of ODConv layers</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
main { max-width: 76rem; margin: 0 auto; padding: 0 1rem 4rem; }
nav { position: sticky; top: 0; z-index: 1; background: #f4f6f8; border-bottom: 1px solid #ccd; }
nav div { max-width: 76rem; margin: 0 auto; padding: .4rem 1rem; display: flex; gap: .5rem; }
nav select { flex: 1; min-width: 0; max-width: 30rem; }
nav select, nav button { font: inherit; padding: .25rem .5rem; }
h1 { font-size: 1.3rem; line-height: 1.35; margin: 1.2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: #444; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #dde; }
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { text-align: left; font-weight: normal; }
thead tr:first-child th:nth-child(2) { text-align: left; }
@media (max-width: 40rem) {
  main { padding: 0 .5rem 4rem; }
  table { font-size: .7rem; width: 100%; }
  th, td { padding: .2rem .15rem; }
  tbody th { overflow-wrap: anywhere; }
}
.still { background: #fde8d8; }
.figures { display: grid; gap: 1rem; }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.gallery { display: grid; gap: .8rem; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.gallery figcaption { overflow-wrap: anywhere; }
.layer { border-top: 1px solid #ccd; margin-top: 2rem; }
.strip { display: flex; gap: .5rem; align-items: center; margin: .3rem 0; }
.strip b { flex: 0 0 4.5rem; font-size: .85rem; }
.strip figure { flex: 0 1 6rem; min-width: 0; }
</style>
</head>
<body>
<nav><div>
<button type="button" data-step="-1" aria-label="previous layer">‹</button>
<select aria-label="go to a layer"><option value="top">Overview</option>$options</select>
<button type="button" data-step="1" aria-label="next layer">›</button>
</div></nav>
<main id="top">
<h1>$sentence</h1>
<p>A layer is dynamic if one of its attentions has a standard deviation over the images of at least
$least. Smaller values are in coloured cells; – stands where a layer lacks the attention, and where
one image gives no deviation.</p>
<div class="wide"><table>
<thead><tr><th rowspan="2">no.</th><th rowspan="2">layer</th>
<th colspan="4">standard deviation of</th>
<th rowspan="2">entropy<br>of kernel</th><th rowspan="2">similarity<br>of kernels</th></tr>
<tr><th>channel</th><th>filter</th><th>spatial</th><th>kernel</th></tr></thead>
<tbody>$rows</tbody>
</table></div>
<details><summary>What the numbers mean</summary>
<p>The <b>standard deviation</b> of an attention is over the images, as mean over its values.
The <b>entropy</b> of the kernel attention is 1 where all kernels count the same and 0 where one is
taken alone. The <b>similarity</b> of the kernels is the mean cosine between two kernels of the
bank. The <b>share by class</b> is how much of an attention's variance goes with the class of the
image's best detection: 1 where it decides, 0 where it does not matter, and – where there are
fewer than two images a class. <b>Saturated</b> is the share of values within 0.01 of 0 or 1.</p>
</details>
$overview
<h2>Images</h2>
<div class="gallery">$gallery</div>
$layers
</main>
<script>
const select = document.querySelector('nav select');
const go = () => { location.hash = select.value; };
select.addEventListener('change', go);
for (const button of document.querySelectorAll('nav button')) {
  button.addEventListener('click', () => {
    const to = select.selectedIndex + Number(button.dataset.step);
    if (to >= 0 && to < select.options.length) { select.selectedIndex = to; go(); }
  });
}
addEventListener('hashchange', () => { select.value = location.hash.slice(1) || 'top'; });
for (const image of document.querySelectorAll('img[data-of]')) {
  image.src = document.getElementById(image.dataset.of).src;
}
</script>
</body>
</html>
""")


def main() -> None:
    args = parse_args()
    paths = cli.find_images(args.images)[: args.limit]
    config = cli.load_config(args.config, args.cfg_options)
    model = cli.load_detector(config, args.checkpoint, args.device, odconv=True)
    cli.require_writable(args.out_dir, 'folder', '--out-dir')
    pictures, layers = look(model, config, paths, args.score_thr)
    if not layers:
        raise SystemExit(f'{args.config}: the detector uses none of its ODConv layers')

    out_dir = Path(args.out_dir)
    (out_dir / 'figures').mkdir(parents=True, exist_ok=True)
    overview = plot_overview(layers) if len(paths) > 1 else None
    if overview is not None:
        (out_dir / 'figures/overview.png').write_bytes(overview)
    figures = []
    for layer in layers:
        classes = [pictures[i].top_class for i in layer.rows]
        plots = {n: plot_attention(n, values, classes) for n, values in layer.values.items()}
        for name, content in plots.items():
            path = out_dir / f'figures/{layer.statistics.name}.{name}.png'
            path.write_bytes(content)
        figures.append(plots)
    sentence = summary(layers, pictures, Path(args.config).name)
    html = page(sentence, pictures, layers, overview, figures)
    (out_dir / 'index.html').write_text(html, encoding='utf-8')
    print(sentence)
    print(f'wrote {out_dir / "index.html"} and the figures in {out_dir / "figures"}')


if __name__ == '__main__':
    main()
