"""What the attentions of a model's ODConv layers do: how much they depend on the image.

docs/analysis.md says what each number means and what is usual.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from ..functional import Attentions
from ..layers import DynamicConvNd
from ..safe_running import unwrapped

SATURATED = 0.01
"""An attention nearer than this to 0 or 1 counts as saturated: its gradient is almost 0."""


DYNAMIC = 0.003
"""The least standard deviation over the images of an attention that depends on the image."""


@dataclass(frozen=True)
class AttentionStatistics:
    """The statistics of one layer; those of each attention are under the attention's name.

    In most layers a sample is one image. If a head applies a layer to several maps of an image, or
    to regions, each of them is a sample.

    Attributes:
        name (str): Name of the layer in the model.
        samples (int): The number of samples.
        std (dict[str, float]): Standard deviation over the samples, averaged over the channels
            (for 'spatial' over the positions, for 'kernel' over the kernels).
        saturated (dict[str, float]): Share of the values within :data:`SATURATED` of 0 or 1.
        head_weight (dict[str, float]): Mean absolute weight of the head that makes the attention.
            It is 0 at the 'zero' start.
        kernel_entropy (float, optional): Entropy of the kernel attention divided by log K,
            averaged over the samples: 1 if all kernels have the same weight, 0 if a single kernel
            is used. None without a kernel attention.
        kernel_similarity (float, optional): Mean cosine between two kernels of the bank. None
            for a single kernel, or for weights that a sharded model keeps elsewhere.
    """

    name: str
    samples: int
    std: dict[str, float]
    saturated: dict[str, float]
    head_weight: dict[str, float]
    kernel_entropy: float | None
    kernel_similarity: float | None

    @property
    def largest_std(self) -> float:
        """The standard deviation of the attention that varies most; 0 without any attention."""
        return max(self.std.values(), default=0.0)


def odconv_layers(model: nn.Module) -> dict[str, Any]:
    """The ODConv, CondConv and DyConv layers of a model by name, without the names of wrappers.

    Raises:
        ValueError: The model has none.
    """
    model = unwrapped(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DynamicConvNd) and hasattr(module, 'attention')
    }
    if not layers:
        raise ValueError(f'the model ({type(model).__name__}) has no ODConv layer to analyse')
    return layers


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode. After it each module has its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def attention_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
) -> list[AttentionStatistics]:
    """Compute the statistics of each ODConv layer of a model over some images.

    The model is put into evaluation mode for this. For a detector and the test data of its
    runner::

        attention_statistics(runner.model, runner.test_dataloader, runner.model.test_step)

    Args:
        model (nn.Module): Any model with ODConv layers.
        batches (Iterable): The inputs of ``forward``, one for each call.
        forward (Callable, optional): Runs the model on one of them. Default: the model itself.

    Returns:
        list[AttentionStatistics]: One record for each layer that was used, in the model's order.

    Raises:
        ValueError: The model has no ODConv layer, or no layer was used.
    """
    with evaluation_mode(model), AttentionMeter(model) as meter, torch.no_grad():
        for batch in batches:
            (forward or model)(batch)
    statistics = meter.statistics()
    if not statistics:
        raise ValueError('no ODConv layer was used: no images were given, or the model is compiled')
    return statistics


class AttentionMeter:
    """Sums up the attentions of each ODConv layer of a model while it is open.

    Use it as a context, or with :meth:`open` and :meth:`close`. It keeps sums on the CPU and
    nothing of the graph, so it does not change the training. The results do not depend on how the
    images are put into batches.

    Args:
        model (nn.Module): A model, wrapped (DDP) or not.

    Raises:
        ValueError: The model has no ODConv layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = odconv_layers(model)
        self._sums = {
            name: {attention: _Sums(size) for attention, size in layer.attention_sizes().items()}
            for name, layer in self.layers.items()
        }
        self._samples = dict.fromkeys(self.layers, 0)
        self._handles: list[Any] = []

    def open(self) -> None:
        """Begin to count."""
        for name, layer in self.layers.items():
            self._handles.append(layer.attention.register_forward_hook(self._adder(name)))

    def close(self) -> None:
        """Count no more. What was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> 'AttentionMeter':
        self.open()
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    @property
    def samples(self) -> int:
        """The samples of the layer that had the fewest of those that were used at all."""
        return min((n for n in self._samples.values() if n), default=0)

    def all_reduce(self) -> None:
        """Add up what the processes of a distributed run have counted; each of them calls it."""
        parts = [sums.values for by_name in self._sums.values() for sums in by_name.values()]
        counts = torch.tensor(list(self._samples.values()), dtype=torch.float64)
        total = torch.cat([counts, *parts])
        all_reduce(total)
        self._samples = dict(zip(self.layers, total[: len(counts)].int().tolist(), strict=True))
        start = len(counts)
        for part in parts:
            part.copy_(total[start : start + len(part)])
            start += len(part)

    def means(self) -> dict[str, dict[str, Tensor]]:
        """The attentions of each layer that was used, averaged over the samples.

        Returns:
            dict[str, dict[str, Tensor]]: By the name of the layer and of the attention, shape (n,).
        """
        return {
            name: {attention: s.mean(samples) for attention, s in self._sums[name].items()}
            for name, samples in self._samples.items()
            if samples
        }

    def statistics(self) -> list[AttentionStatistics]:
        """The records of the layers that were used, in the model's order.

        In a distributed run each process calls it, as the weights of a layer may be spread.
        """
        return [self._record(name) for name, samples in self._samples.items() if samples]

    def _record(self, name: str) -> AttentionStatistics:
        layer, sums, samples = self.layers[name], self._sums[name], self._samples[name]
        weights = {n: _whole(getattr(layer.attention, f'{n}_fc').weight) for n in sums}
        kernel = sums.get('kernel')
        return AttentionStatistics(
            name,
            samples,
            {n: s.std(samples).mean().item() for n, s in sums.items()},
            {n: s.saturated(samples) for n, s in sums.items()},
            {n: weight.abs().mean().item() for n, weight in weights.items()},
            kernel.entropy(samples) if kernel is not None else None,
            kernel_similarity(layer),
        )

    def _adder(self, name: str) -> Callable[[nn.Module, Any, Attentions], None]:
        def add(module: nn.Module, args: Any, attentions: Attentions) -> None:
            self._samples[name] += len(args[0])
            for attention, sums in self._sums[name].items():
                # On the CPU, because some devices have no float64.
                sums.add(getattr(attentions, attention).detach().cpu().double())

        return add


@contextmanager
def static_attentions(
    model: nn.Module, means: Mapping[str, Mapping[str, Tensor]]
) -> Iterator[None]:
    """A context in which some layers have the same attentions for each image.

    Args:
        model (nn.Module): A model, wrapped (DDP) or not.
        means (Mapping[str, Mapping[str, Tensor]]): The attentions by the names of the layer and of
            the attention, as :meth:`AttentionMeter.means` gives them.

    Raises:
        ValueError: The model has no ODConv layer, or none of such a name.
    """
    layers = odconv_layers(model)
    unknown = sorted(means.keys() - layers.keys())
    if unknown:
        raise ValueError(f'the model has no ODConv layer named {unknown[0]!r}')
    handles = []
    for name, constants in means.items():
        handles.append(layers[name].attention.register_forward_hook(_replacer(constants)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_by_class(values: Tensor, classes: Sequence[str]) -> float | None:
    """How much of the variance of an attention is explained by the class of the image.

    It is the variance between the means of the classes divided by the whole variance, corrected
    for what the same number of random groups would have (ε² of an analysis of variance).

    Args:
        values (Tensor): The attention of each image, shape (N, n).
        classes (Sequence[str]): The class of each image.

    Returns:
        float, optional: 1 if all images of a class have the same attention, 0 if the class explains
        no more than chance does. None if it cannot be computed: there is a single class, there are
        fewer than two images a class on average, or the attention does not vary.
    """
    number, groups = len(classes), len(set(classes))
    total = (values - values.mean(0)).square().sum()
    if not 1 < groups <= number / 2 or total / values.numel() < 1e-12:
        return None
    within = torch.zeros_like(total)
    for name in set(classes):
        rows = values[torch.tensor([other == name for other in classes])]
        within += (rows - rows.mean(0)).square().sum()
    return max(0.0, 1 - (within / (number - groups) / (total / (number - 1))).item())


def kernel_similarity(layer: DynamicConvNd) -> float | None:
    """Mean cosine between two kernels of a layer's bank, None if it has no such bank."""
    kernels = layer.kernel_bank()
    if kernels is None:
        return None
    bank = nn.functional.normalize(kernels.flatten(1).float(), dim=1)
    cosines = bank @ bank.T
    pairs = len(bank) * (len(bank) - 1)
    return ((cosines.sum() - cosines.trace()) / pairs).item()


def _whole(parameter: Tensor) -> Tensor:
    """A parameter's values; those that ``fully_shard`` has spread are gathered."""
    values = parameter.detach()
    return values.full_tensor() if hasattr(values, 'full_tensor') else values


class _Sums:
    """Sums over the samples of one attention, as a single tensor that processes can add up."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values = torch.zeros(2 + 2 * size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add samples, shape (B, size)."""
        near = (rows < SATURATED) | (rows > 1 - SATURATED)
        # A sigmoid kernel attention does not sum to 1.
        shares = rows / rows.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        heads = torch.stack([near.sum(), torch.special.entr(shares).sum()])
        self.values += torch.cat([heads, rows.sum(0), rows.square().sum(0)])

    def mean(self, samples: int) -> Tensor:
        return self.values[2 : 2 + self.size] / samples

    def std(self, samples: int) -> Tensor:
        squares = self.values[2 + self.size :] / samples
        return (squares - self.mean(samples).square()).clamp(min=0).sqrt()

    def saturated(self, samples: int) -> float:
        return self.values[0].item() / (samples * self.size)

    def entropy(self, samples: int) -> float:
        return self.values[1].item() / (samples * math.log(self.size))


def _replacer(
    means: Mapping[str, Tensor],
) -> Callable[[nn.Module, Any, Attentions], Attentions]:
    def replace(module: nn.Module, args: Any, attentions: Attentions) -> Attentions:
        constants: dict[str, Any] = {}
        for name, mean in means.items():
            given = getattr(attentions, name)
            constants[name] = mean.to(given).expand_as(given)
        return attentions._replace(**constants)

    return replace
