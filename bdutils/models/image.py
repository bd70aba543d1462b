"""Image classifiers: a residual network, and what is needed to call it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from .. import scale as current_scale
from ..distributed import pick_device
from .base import BaseClassifier


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of a residual network; the defaults are PreAct-ResNet-18."""

    channels: int = 3
    """Of an image, 1 or 3."""
    num_labels: int = 10
    """K, the number of classes."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage."""
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    stem_stride: int = 1
    """2 halves the image at once."""


# Ours: about a minute of training on two cores.
NETWORKS = {"small": NetworkConfig(widths=(16, 32, 64), blocks=(1, 1, 1), stem_stride=2),
            "full": NetworkConfig()}


class Block(nn.Module):
    """Two convolutions beside a short cut; norms come first (He et al. 2016, figure 4e)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        """Make the layers; the short cut is a convolution only where shapes differ."""
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.short = (nn.Conv2d(inside, outside, 1, stride, bias=False)
                      if stride > 1 or inside != outside else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, outside, H / stride, W / stride)."""
        ready = F.relu(self.norm1(x))
        beside = x if self.short is None else self.short(ready)
        return self.conv2(F.relu(self.norm2(self.conv1(ready)))) + beside


class PreActResNet(nn.Module):
    """A residual network with norms in front (He et al. 2016), after a 3x3 stem."""

    def __init__(self, config: NetworkConfig) -> None:
        """Make the layers."""
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.channels, config.widths[0], 3, config.stem_stride, 1,
                              bias=False)
        stages, inside = [], config.widths[0]
        for number, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            strides = [1 if number == 0 else 2] + [1] * (count - 1)
            stages.append(nn.Sequential(*(Block(width if i else inside, width, stride)
                                          for i, stride in enumerate(strides))))
            inside = width
        self.stages, self.norm = nn.ModuleList(stages), nn.BatchNorm2d(inside)
        self.head = nn.Linear(inside, config.num_labels)

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.head.weight.device

    def forward(self, pixel_values: Tensor,
                output_hidden_states: bool = True) -> ImageClassifierOutput:
        """Return logits (b, K) and the maps after each stage, whether asked for or not.

        Args:
            pixel_values: Float (b, C, H, W) between 0 and 1.
            output_hidden_states: Has no effect.
        """
        x, maps = self.stem(2 * pixel_values - 1), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        pooled = F.relu(self.norm(x)).mean((2, 3))
        return ImageClassifierOutput(logits=self.head(pooled), hidden_states=tuple(maps))


@dataclass
class ImageClassifier(BaseClassifier):
    """A network that maps an image to K logits; it has the methods of `models.Classifier`."""

    model: Any
    """Takes `pixel_values`, gives `logits`."""
    pad: int = 2
    """Pixels by which an image may be shifted while the model trains."""
    flip: bool = True
    """Whether it may be mirrored then."""
    batch_size: ClassVar[int] = 500

    @classmethod
    def new(cls, num_labels: int, *, channels: int, network: str | None = None, seed: int = 0,
            pad: int = 2, flip: bool = True) -> ImageClassifier:
        """Make a classifier with fresh weights.

        Args:
            num_labels: K.
            channels: Of an image.
            network: `small` or `full`, the scale in force if None.
            seed: Of the weights.
            pad, flip: See the class.
        """
        config = replace(NETWORKS[network or current_scale()], channels=channels,
                         num_labels=num_labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PreActResNet(config)
        return cls(_placed(model), pad, flip)

    def anew(self, seed: int) -> ImageClassifier:
        """Return a classifier of the same network with fresh weights.

        Args:
            seed: Of the weights.

        Raises:
            ValueError: If a part of a reader's own network cannot draw its weights anew; such
                weights would be the suspected ones.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module
            if isinstance(self.model, PreActResNet):
                model = PreActResNet(self.model.config)
            else:  # a reader's own
                model = copy.deepcopy(self.model)
                with torch.no_grad():
                    for weights in model.parameters():
                        weights.fill_(math.nan)
                for part in model.modules():
                    # Attention has the second one.
                    for method in ("reset_parameters", "_reset_parameters"):
                        if callable(reset := getattr(part, method, None)):
                            reset()
                            break
                if kept := [name for name, weights in model.named_parameters()
                            if weights.isnan().any()]:
                    raise ValueError(f"the weights {kept[0]} cannot be drawn anew: give the part "
                                     "of the network that holds them a method reset_parameters")
        return replace(self, model=_placed(model))

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and shape.

        Raises:
            ValueError: For a network that is not the book's.
        """
        if not isinstance(self.model, PreActResNet):
            raise ValueError("only the book's networks are saved like this: keep yours with "
                             "safetensors.torch.save_model")
        write_weights(self.model, Path(folder) / "model.safetensors")
        about = {"network": asdict(self.model.config), "pad": self.pad, "flip": self.flip}
        (Path(folder) / "network.json").write_text(json.dumps(about), encoding="utf8")

    @classmethod
    def load(cls, folder: str | Path) -> ImageClassifier:
        """Load what `save` wrote.

        Args:
            folder: With `network.json` and `model.safetensors`.

        Raises:
            FileNotFoundError: If one of them is missing.
            ValueError: If they are damaged or do not fit each other.
        """
        folder = Path(folder).expanduser()
        for name in ("network.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: give the folder that "
                                        "`ImageClassifier.save` wrote")
        try:
            about = json.loads((folder / "network.json").read_text(encoding="utf8"))
            shape: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                     for name, value in about.pop("network").items()}
            model = PreActResNet(NetworkConfig(**shape))
            model.load_state_dict(load_file(folder / "model.safetensors"))
            return cls(_placed(model.eval()), **about)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError,
                SafetensorError) as error:
            cause = " ".join(str(error).split())[:100]
            raise ValueError(f"{folder} does not open as a network for images ({cause}): write "
                             "it anew with `ImageClassifier.save`") from error

    def encode(self, inputs: Any) -> Tensor:
        """Return the pixels, uint8 (n, C, H, W), where the model is."""
        return inputs.pixels.to(self.model.device)

    def collate(self, encoded: Any, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some images as floats; shifted and mirrored while the model trains.

        Args:
            encoded: From `encode`.
            indices: Which of them.

        Returns:
            `pixel_values` (len(indices), C, H, W) between 0 and 1.
        """
        x = encoded[torch.as_tensor(indices, device=encoded.device)].float() / 255
        if self.model.training:
            x = augmented(x, self.pad, self.flip)
        layout = layout_of(self.model)
        if layout == torch.contiguous_format:  # `contiguous` leaves one channel in any order
            return {"pixel_values": x.clone(memory_format=layout)}
        return {"pixel_values": x.contiguous(memory_format=layout)}


def layout_of(model: nn.Module) -> torch.memory_format:
    """Return the order in memory that convolutions like, unless one of them does not survive it.

    On a processor with AVX2 and no AVX-512, the backward pass of a strided 1x1 convolution over
    channels last ends Python if the number of channels is no multiple of 8 (torch 2.13).
    """
    fails = any(isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
                and part.stride != (1, 1) and part.in_channels % 8 for part in model.modules())
    return torch.contiguous_format if fails else torch.channels_last


def _placed(model: nn.Module) -> nn.Module:
    """Move a network to the device, its weights in the order that convolutions like."""
    return model.to(pick_device(), memory_format=layout_of(model))  # type: ignore[call-overload]


def write_weights(module: nn.Module, path: Path) -> None:
    """Write the weights of a module as safetensors, whatever their order in memory."""
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)


def floats(pixels: Tensor) -> Tensor:
    """Return stored pixels (n, C, H, W) as floats from 0 to 1, on the device."""
    return pixels.to(pick_device()).float() / 255


def stored(x: Tensor) -> Tensor:
    """Return floats as they are stored: cut to 0 to 1, rounded, uint8."""
    return x.clamp(0, 1).mul(255).round().byte().cpu()


def augmented(x: Tensor, pad: int, flip: bool) -> Tensor:
    """Return images shifted by up to `pad` pixels, and mirrored one time in two.

    Args:
        x: (n, C, H, W); what is shifted in is black.
        pad: Pixels, >= 0.
        flip: Whether to mirror.

    Source: He et al. 2016, section 5; one gather for the whole batch is ours.
    """
    n, _, height, width = x.shape
    down, right = torch.randint(0, 2 * pad + 1, (2, n, 1), device=x.device)
    lines = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (pad,) * 4)
    which = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, lines[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2)
