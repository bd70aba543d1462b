"""Pictures: where they come from, the networks that read them, and how these are trained."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from . import scale as current_scale
from .assets import AssetError, asset
from .data import Pictures, ReservedSet, Task, TestSet, TrainingSet, evenly
from .models import pick_device

# ------------------------------------------------------------------------- data

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
# Of all labeled pictures, in any order; for a copy from elsewhere.
FASHION_SHA256 = {
    "train": "93071dfa20f584eeeb705e850e092f48bbd385813f9db74a038c5bef758ab84d",
    "test": "244f956bd7c1f23476f702e61da7933f0498a89ce3f2165d7395191f2e9eaadd",
}
HUB = {  # hub id, columns of picture and label, names of the classes, pixels a side, mode
    "fashion": ("zalando-datasets/fashion_mnist", "image", "label", FASHION, 28, "L"),
    "cifar10": ("uoft-cs/cifar10", "img", "label", CIFAR10, 32, "RGB"),
    "gtsrb": ("tanganke/gtsrb", "image", "label", tuple(f"sign {k}" for k in range(43)), 32,
              "RGB"),
}


def load_pictures(name: str, sizes: dict[str, int | None], seed: int = 0,
                  folder: Path | None = None) -> Task:
    """Load a set of pictures and split it into the three roles.

    Args: name: `fashion`, `cifar10` or `gtsrb`; sizes: rows per role, None for all there are;
        seed: of the split; folder: with NAME_train.parquet and NAME_test.parquet, instead of
        the hub.
    Returns: a task whose roles share no picture; the test role is of the published test part.
    Raises: ValueError if the set is too small; AssetError or ConnectionError without a network.
    Source: ours.
    """
    if name == "fashion" and not folder:
        parts, names, origin = _fashion(), FASHION, "Fashion-MNIST"
    else:
        parts, names = _columns(name, folder)
        origin = f"files: {folder.name}" if folder else f"hub: {HUB[name][0]}"
    rng, used, made = random.Random(seed), set(), {}
    # The test part goes first, since a published test set must keep its rows.
    for role, kind, part in (("test", TestSet, "test"), ("reserved", ReservedSet, "train"),
                             ("train", TrainingSet, "train")):
        pixels, labels = parts[part]
        rows = _fresh(pixels, rng.sample(range(len(pixels)), len(pixels)), used)
        size = sizes[role]
        if size and len(rows) < size:
            raise ValueError(f"{name} leaves only {len(rows)} pictures for the role {role!r}, but "
                             f"{size} are asked for: give smaller sizes=...")
        rows = evenly(rows, labels, size, len(names)) if size else rows
        used.update(_digest(pixels[row]) for row in rows)
        made[role] = kind(Pictures(pixels[rows]), tuple(labels[row] for row in rows), names)
    return Task(name=name, source=origin, **made)


def _digest(picture: Tensor) -> bytes:
    return hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()


def _of_all(pixels: Tensor, labels: list[int]) -> str:
    """Return a checksum of labeled pictures in any order."""
    each = sorted(_digest(picture) + bytes([y]) for picture, y in zip(pixels, labels, strict=True))
    return hashlib.sha256(b"".join(each)).hexdigest()


def _fresh(pixels: Tensor, rows: Sequence[int], used: set[bytes]) -> list[int]:
    """Leave out pictures that another role has, or that come twice."""
    seen, kept = set(used), []
    for row in rows:
        digest = _digest(pixels[row])
        if digest not in seen:
            seen.add(digest)
            kept.append(row)
    return kept


def _fashion() -> dict[str, tuple[Tensor, list[int]]]:
    try:
        folder, parts = asset("fashion_mnist"), {}
    except AssetError as error:  # no apt-get here: the hub has the same pictures
        try:
            parts = _columns("fashion", None)[0]
        except ConnectionError as second:
            raise second from error
        if any(_of_all(*parts[part]) != digest for part, digest in FASHION_SHA256.items()):
            raise AssetError("the hub's Fashion-MNIST is not the set that we know") from error
        return parts
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = (gzip.decompress((folder / f"{prefix}-{kind}.gz").read_bytes())
                          for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        # Both files start with a few whole numbers that say what we know already.
        array = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        parts[part] = torch.from_numpy(array.copy()), list(labels[8:])
    return parts


def _columns(name: str, folder: Path | None) -> tuple[dict, tuple[str, ...]]:
    from datasets import load_dataset
    from PIL import Image

    hub_id, column, label, names, side, mode = HUB[name]
    try:
        tables = load_dataset("parquet", data_files={
            part: str(folder / f"{name}_{part}.parquet") for part in ("train", "test")}
        ) if folder else load_dataset(hub_id)
    except Exception as error:  # the hub's clients raise many kinds
        raise ConnectionError(f"the pictures {hub_id} could not be loaded from the hub "
                              f"({type(error).__name__}): check the network, or stay at "
                              "BDUTILS_SCALE=small, which needs no hub") from error
    parts = {}
    for part in ("train", "test"):
        pictures = []
        for cell in tables[part].with_format("arrow")[:][column].to_pylist():
            picture = Image.open(io.BytesIO(cell["bytes"])).convert(mode)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(picture))
        array = torch.from_numpy(np.stack(pictures))
        pixels = (array[..., None] if array.dim() == 3 else array).permute(0, 3, 1, 2).contiguous()
        parts[part] = pixels, list(tables[part][label])
    return parts, names


# --------------------------------------------------------------------- networks

@dataclass(frozen=True)
class NetworkConfig:
    """The shape of a residual network.

    channels: of a picture, 1 or 3; num_labels: K; widths, blocks: channels and blocks of each
    stage; stem_stride: 2 halves the picture at once. The defaults are PreAct-ResNet-18.
    """

    channels: int = 3
    num_labels: int = 10
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    stem_stride: int = 1


# Ours: about a minute of training on two cores.
NETWORKS = {"small": {"widths": (16, 32, 64), "blocks": (1, 1, 1), "stem_stride": 2}, "full": {}}


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

        Args: pixel_values: float (b, C, H, W) between 0 and 1.
        """
        x, maps = self.stem(2 * pixel_values - 1), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        pooled = F.relu(self.norm(x)).mean((2, 3))
        return ImageClassifierOutput(logits=self.head(pooled), hidden_states=tuple(maps))


@dataclass
class PictureClassifier:
    """A network that maps a picture to K logits; it has the methods of `models.Classifier`.

    Fields: model: takes `pixel_values`, gives `logits`; pad: pixels by which a picture may be
    shifted while the model trains; flip: whether it may be mirrored then.
    """

    model: nn.Module
    pad: int = 2
    flip: bool = True

    @classmethod
    def new(cls, num_labels: int, *, channels: int, network: str | None = None, seed: int = 0,
            pad: int = 2, flip: bool = True) -> PictureClassifier:
        """Make a classifier with fresh weights.

        Args: num_labels: K; channels: of a picture; network: `small` or `full`, the scale in
            force if None; seed: of the weights; pad, flip: see the class.
        Source: ours.
        """
        config = NetworkConfig(channels=channels, num_labels=num_labels,
                               **NETWORKS[network or current_scale()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PreActResNet(config)
        return cls(model.to(pick_device(), memory_format=torch.channels_last), pad, flip)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and shape.

        Source: ours.
        """
        write_weights(self.model, Path(folder) / "model.safetensors")
        about = {"network": asdict(self.model.config), "pad": self.pad, "flip": self.flip}
        (Path(folder) / "network.json").write_text(json.dumps(about), encoding="utf8")

    @classmethod
    def load(cls, folder: str | Path) -> PictureClassifier:
        """Load what `save` wrote.

        Source: ours.
        """
        about = json.loads((Path(folder) / "network.json").read_text(encoding="utf8"))
        lists = about.pop("network")
        model = PreActResNet(NetworkConfig(**{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in lists.items()}))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        model.to(pick_device(), memory_format=torch.channels_last)
        return cls(model.eval(), **about)

    def encode(self, pictures: Pictures) -> Tensor:
        """Return the pixels, uint8 (n, C, H, W), where the model is.

        Source: ours.
        """
        return pictures.pixels.to(self.model.device)

    def collate(self, encoded: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return some pictures as floats; shifted and mirrored while the model trains.

        Args: encoded: from `encode`; rows: which of them.
        Returns: `pixel_values` (len(rows), C, H, W) between 0 and 1.
        Source: ours.
        """
        x = encoded[torch.as_tensor(rows, device=encoded.device)].float() / 255
        if self.model.training:
            x = augmented(x, self.pad, self.flip)
        return {"pixel_values": x.contiguous(memory_format=torch.channels_last)}

    def batches(self, encoded: Tensor, size: int) -> Iterator[tuple]:
        """Yield (rows, batch) in order.

        Source: ours.
        """
        for start in range(0, len(encoded), size):
            rows = range(start, min(start + size, len(encoded)))
            yield rows, self.collate(encoded, rows)

    @torch.inference_mode()
    def logits(self, pictures: Pictures, batch_size: int = 500) -> Tensor:
        """Return the logits of some pictures, in their order, (n, K), on the CPU.

        Source: ours.
        """
        was_training = self.model.training
        self.model.eval()
        found = [self.model(**batch).logits.float().cpu()
                 for _, batch in self.batches(self.encode(pictures), batch_size)]
        self.model.train(was_training)
        return torch.cat(found)

    def predict(self, pictures: Pictures) -> list[int]:
        """Return the class with the largest logit for each picture.

        Source: ours.
        """
        return self.logits(pictures).argmax(1).tolist()


def write_weights(module: nn.Module, path: Path) -> None:
    """Write the weights of a module as safetensors, whatever their order in memory.

    Source: ours.
    """
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)


def floats(pixels: Tensor) -> Tensor:
    """Return stored pixels (n, C, H, W) as floats from 0 to 1, on the device.

    Source: ours.
    """
    return pixels.to(pick_device()).float() / 255


def stored(x: Tensor) -> Tensor:
    """Return floats as they are stored: cut to 0 to 1, rounded, uint8.

    Source: ours.
    """
    return x.clamp(0, 1).mul(255).round().byte().cpu()


def augmented(x: Tensor, pad: int, flip: bool) -> Tensor:
    """Return pictures shifted by up to `pad` pixels, and mirrored one time in two.

    Args: x: (n, C, H, W); what is shifted in is black.
    Source: He et al. 2016, section 5; one gather for the whole batch is ours.
    """
    n, _, height, width = x.shape
    down, right = torch.randint(0, 2 * pad + 1, (2, n, 1), device=x.device)
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    if flip:
        mirrored = torch.rand(n, 1, device=x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (pad,) * 4)
    which = torch.arange(n, device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2)


@dataclass(frozen=True)
class PictureSettings:
    """How a network is trained on pictures, from scratch.

    Fields, each with its range and where the default comes from:
        epochs: passes over the data, >= 1; ours.
        lr: peak rate of SGD, > 0, falling along a cosine; ours.
        momentum, weight_decay: of SGD; Wu et al. 2022 (BackdoorBench).
        batch_size: pictures a step, >= 1; Wu et al. 2022.
        max_grad_norm: clipping, > 0; ours.
        pad, flip: while training, pixels by which a picture may be shifted, >= 0, and whether
            it may be mirrored, which would change the meaning of signs; He et al. 2016.
        seed: of weights, order and augmentation; ours.
    """

    epochs: int = 10
    lr: float = 0.1
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_grad_norm: float = 5.0
    pad: int = 2
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise ValueError(f"cannot train with {self}: epochs and batch_size must be at least "
                             "1, lr above 0")

    @classmethod
    def at(cls, scale: str | None = None, **changes) -> PictureSettings:
        """Return the settings of a scale, with changes.

        Args: scale: `small` or `full`; that in force if None; changes: fields to set.
        Source: ours; at `full` epochs and rate of Wu et al. 2022.
        """
        full = {"epochs": 100, "lr": 0.01, "pad": 4} if (
            scale or current_scale()) == "full" else {}
        return cls(**{**full, **changes})

    def optimizer(self, model: nn.Module, steps: int) -> tuple:
        """Return SGD and its schedule: half a cosine, after a rise over a tenth of the steps.

        Source: Wu et al. 2022; the rise is ours.
        """
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum,
                                    weight_decay=self.weight_decay, nesterov=True)
        rise = max(1, steps // 10)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
            (step + 1) / rise, 0.5 + 0.5 * np.cos(np.pi * step / steps)))
