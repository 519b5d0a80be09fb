"""The table of sites: where ResNet-50 carries a BAM, and what is measured there.

Orders matter: a run that is short of time measures the head of each list and leaves the tail out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch

INFERENCE, TRAINING = "inference", "training"
NCHW, CHANNELS_LAST = "nchw", "channels_last"

# Passes over x-sized memory that the fused module must make: pool + reduce reads x, the gate reads
# x and writes out; backward reads (dout, x) for the reductions, and (dout, x) again to write dx.
FORWARD_PASSES = 3
BACKWARD_PASSES = 5


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a network: the feature map's channels, height and width."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        """H * W."""
        return self.height * self.width

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


# The ends of ResNet-50's stages at 224 x 224, each followed by a BAM in the paper (Sec. 3).
RESNET50 = (
    Site("layer1", 256, 56, 56),
    Site("layer2", 512, 28, 28),
    Site("layer3", 1024, 14, 14),
)
TINY = (Site("tiny", 32, 4, 5),)


@functools.cache
def _generator(device: torch.device) -> torch.Generator:
    # Not torch's own: a CUDA graph whose capture failed may leave that one unusable.
    generator = torch.Generator(device)
    generator.seed()
    return generator


def normal(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal values, other ones in every run."""
    return torch.randn(size, dtype=dtype, device=device, generator=_generator(device))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A feature map: a site at a batch size, as it lies in memory.

    Args:
        site: C, H and W.
        batch: N.
        dtype: "float16", "bfloat16", "float32" or "float64".
        layout: "nchw" or "channels_last".
    """

    site: Site
    batch: int
    dtype: str
    layout: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == CHANNELS_LAST else torch.contiguous_format

    @property
    def size(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        return (self.batch, self.site.channels, self.site.height, self.site.width)

    @property
    def x_bytes(self) -> int:
        """|x|, the bytes of the feature map."""
        n, c, h, w = self.size
        return n * c * h * w * self.torch_dtype.itemsize

    def random(self, device: torch.device) -> torch.Tensor:
        """A map of standard normal values: zeros would time faster than data does."""
        return normal(self.size, self.torch_dtype, device).contiguous(
            memory_format=self.memory_format
        )

    def sets(self, cache_bytes: int) -> int:
        """How many such maps hold three times the cache: rotating among them reads from memory."""
        return max(2, min(32, 1 + 3 * cache_bytes // self.x_bytes))

    def record(self) -> dict[str, object]:
        """The shape as a JSON object."""
        return {
            "site": self.site.name,
            "channels": self.site.channels,
            "height": self.site.height,
            "width": self.site.width,
            "batch": self.batch,
            "dtype": self.dtype,
            "layout": self.layout,
            "x_bytes": self.x_bytes,
        }

    def __str__(self) -> str:
        return f"{self.site} N={self.batch} {self.dtype} {self.layout}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to time: a whole BAM on a shape, in inference or in a training step."""

    shape: Shape
    mode: str
    preset: str = "paper"

    @property
    def moved_bytes(self) -> int:
        """The fewest bytes of x-sized memory that the fused module can move."""
        passes = FORWARD_PASSES + (BACKWARD_PASSES if self.mode == TRAINING else 0)
        return passes * self.shape.x_bytes

    def record(self) -> dict[str, object]:
        """The case as a JSON object."""
        return {**self.shape.record(), "mode": self.mode, "preset": self.preset}

    def __str__(self) -> str:
        return f"{self.shape} {self.mode} {self.preset}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a run looks at, most valuable first in every field."""

    sites: tuple[Site, ...] = RESNET50
    batches: tuple[int, ...] = (256, 32)
    dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")
    layouts: tuple[str, ...] = (CHANNELS_LAST, NCHW)
    modes: tuple[str, ...] = (TRAINING, INFERENCE)
    presets: tuple[str, ...] = ("paper", "official")

    def shapes(self) -> list[Shape]:
        """Every shape: by dtype, then batch, then layout, then site."""
        return [
            Shape(site, batch, dtype, layout)
            for dtype, batch, layout, site in itertools.product(
                self.dtypes, self.batches, self.layouts, self.sites
            )
        ]

    def cases(self) -> list[Case]:
        """The first preset on every shape; the others on the first dtype and layout alone."""
        cases = []
        for preset in self.presets:
            narrow = preset != self.presets[0]
            chosen = dataclasses.replace(
                self,
                dtypes=self.dtypes[:1] if narrow else self.dtypes,
                layouts=self.layouts[:1] if narrow else self.layouts,
            )
            for shape in chosen.shapes():
                cases += [Case(shape, mode, preset) for mode in self.modes]
        return cases


QUICK = Selection(
    batches=(32,), dtypes=("float16",), layouts=(CHANNELS_LAST, NCHW), presets=("paper",)
)
SMOKE = Selection(sites=TINY, batches=(2,), dtypes=("float32",), presets=("paper", "official"))
