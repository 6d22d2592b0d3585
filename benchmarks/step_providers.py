"""The ways to make a training step that benchmarks/step.py measures, and what they are held against; nothing here is run by itself.

All of them begin with the same weights, the same queue and the same frames, which are on the device: `Provider.step` makes views,
passes them through both networks, computes the loss and its gradient, steps, moves the key network and enqueues the keys.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia import augmentation as K
from torch import Tensor, nn
from torchvision.models.video.resnet import Conv2Plus1D
from torchvision.transforms import v2

from benchmarks import harness, info_nce, views
from benchmarks.harness import Precision
from dclr.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from dclr.data.augmentation import PRETRAIN
from dclr.method import DCLR, KEY_OF_PAIR, PAIRS, ByLetter
from dclr.models import activation_map
from dclr.models.backbone import Factored, FactoredStem
from dclr.training.compile import compile_backbone, settle_compile
from dclr.training.engine import Engine, read_ds_config, settle_precision
from kernels import ViewParams, Views, Yuv420, generate_views, set_backend

METHOD, OPTIM = MethodConfig(), OptimConfig()
DS_CONFIG = Path(__file__).resolve().parents[1] / RunConfig().ds_config
"""The one that a run takes by default."""

Part = Callable[[str], AbstractContextManager[None]]
"""Times what is done inside as the part of that name."""


def unwatched(name: str) -> AbstractContextManager[None]:
    """The `Part` that does nothing."""
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    backbone: str = "r2plus1d_10"
    B: int
    T: int = 16
    side: int = 112
    H: int = 240
    W: int = 320
    width: int = 64

    def __str__(self) -> str:
        return f"{self.backbone}, B {self.B}, {self.T} x {self.side} x {self.side}"


# ----------------------------------------------------------------------------------------------------------------- inputs


class Clips(NamedTuple):
    """One clip of each of B videos, on the device."""

    planes: Yuv420  # (B, T, H, W), as a decoder gives them
    stills: Yuv420
    params: ViewParams
    host_params: ViewParams  # the same on the CPU
    cropped: Tensor  # (B, 3, T, h, w) float32 in 0 to 1: what the released loader hands over
    cropped_stills: Tensor  # likewise, the still repeated


class Inputs(NamedTuple):
    query: Clips
    key: Clips


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Smooth noise that drifts; a key clip is of another video than its query clip, which makes no step faster or slower."""
    shape = views.Cell(precision="bf16", B=2 * cell.B, T=cell.T, H=cell.H, W=cell.W, side=cell.side)
    whole = views.make_inputs(shape, device)
    crop = v2.RandomResizedCrop((cell.side, cell.side), PRETRAIN.scale, PRETRAIN.ratio, antialias=False)

    def clips(rows: slice) -> Clips:
        def half(group: Any) -> Any:  # a dataclass of tensors
            return type(group)(**{name: tensor[rows].contiguous() for name, tensor in vars(group).items()})

        def cropped(frames: Tensor) -> Tensor:  # (T, H, W, 3) uint8 -> (3, T, h, w)
            return crop(frames.permute(3, 0, 1, 2).float() / 255)

        params, host = (
            ViewParams(half(both.clip), half(both.still), both.size) for both in (whole.params, whole.host_params)
        )
        return Clips(
            half(whole.planes),
            half(whole.still_planes),
            params,
            host,
            torch.stack([cropped(clip) for clip in whole.frames[rows]]),
            torch.stack([cropped(still.expand(cell.T, -1, -1, -1)) for still in whole.stills[rows]]),
        )

    return Inputs(clips(slice(cell.B)), clips(slice(cell.B, None)))


def make_method(cell: Cell) -> DCLR:
    """The same weights and the same queue for every provider."""
    torch.manual_seed(0)
    return DCLR(ModelConfig(backbone=cell.backbone, width=cell.width), METHOD)


# -------------------------------------------------------------------------------------------------------------- providers


def configure(method: DCLR, device: torch.device) -> None:
    """What pretraining does to the networks before DeepSpeed has them, by the defaults of its flags."""
    defaults = RunConfig()
    for encoder in (method.query, method.key):
        encoder.backbone.pad_channels(defaults.pad_channels)
        if settle_compile(defaults.compile, device)[0]:
            compile_backbone(encoder.backbone)


def as_torchvision(method: DCLR) -> DCLR:
    """The same weights in torchvision's own modules: 3-D convolutions, in whatever memory the views come."""
    theirs: dict[type, type] = {Factored: Conv2Plus1D, FactoredStem: nn.Sequential}
    for encoder in (method.query, method.key):
        for module in encoder.backbone.modules():
            module.__class__ = theirs.get(type(module), type(module))
        stages = nn.Sequential(OrderedDict(encoder.backbone.named_children()))
        setattr(encoder, "backbone", stages)  # noqa: B010  (no Backbone any more)
    return method


class Provider:
    """One way to make a step.

    Attributes:
        method: holds the networks, the queue and its pointer.
        precision: of the products, for the share of the peak.
        passes: forward equivalents of a view that a sample costs.
        own_draw: it draws the views by itself, as the released code does.
    """

    method: DCLR
    precision: Precision
    passes = 14
    own_draw = False

    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        """A training step; returns its loss. `given`: these views instead of its own."""
        raise NotImplementedError

    @contextmanager
    def watched(self, part: Part) -> Iterator[None]:
        """Inside, `step` times the query network and the key network as parts of their own within "forward"."""

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                with part(name):
                    return function(*arguments)

            return call

        method, backbone = self.method, self.method.query.backbone
        wrapped: tuple[tuple[nn.Module, str, str], ...] = (
            (method.query, "embed", "query forward"),
            (method, "_look_at_query", "keys"),
            (method, "_encode_key", "keys"),
        )
        for owner, name, of_part in wrapped:
            setattr(owner, name, timed(of_part, getattr(owner, name)))
        setattr(method.query, "backbone", _Watched(backbone, part))  # noqa: B010  (a compiled one stays as it is)
        try:
            yield
        finally:
            method.query.backbone = backbone
            for owner, name, _ in wrapped:
                delattr(owner, name)


class _Watched(nn.Module):
    def __init__(self, inner: nn.Module, part: Part) -> None:
        super().__init__()
        self.inner, self.part = inner, part

    def forward(self, x: Tensor) -> Tensor:
        with self.part("query forward"):
            return self.inner(x)


class Ours(Provider):
    def __init__(
        self,
        cell: Cell,
        inputs: Inputs,
        device: torch.device,
        bfloat16: bool = True,
    ) -> None:
        self.inputs, self.method = inputs, make_method(cell)
        configure(self.method, device)
        config = read_ds_config(DS_CONFIG)
        if not bfloat16:
            config["torch_autocast"] = {**config.get("torch_autocast", {}), "enabled": False}
        settle_precision(config, device)
        self.engine = Engine(self.method, config, OptimConfig(batch_size=cell.B), device)
        self.engine.train()
        self.precision = "bf16" if self.engine.view_dtype == torch.bfloat16 else "ieee"

    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        with part("views"):
            dtype = self.engine.view_dtype
            query, key = given or (
                generate_views(clips.planes, clips.stills, clips.params, dtype=dtype) for clips in self.inputs
            )
        with part("forward"):
            loss = self.engine(query, key, 0).loss
        with part("backward"):
            self.engine.backward(loss)
        with part("optimizer"):
            self.engine.step()
        with part("keys"):
            self.method.update_key()
        return loss.detach()


class Eager(Provider):
    precision = "bf16"

    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        self.method = as_torchvision(make_method(cell)).to(device)
        self.optimizer = sgd(self.method.query)

    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        with reference_kernels(), cudnn("benchmark", True):
            with part("views"):
                query, key = given or (
                    generate_views(clips.planes, clips.stills, clips.host_params, dtype=torch.bfloat16)
                    for clips in self.inputs
                )
            with part("forward"), torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.method(query, key, 0).loss
            with part("backward"):
                loss.backward()
            with part("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            with part("keys"):
                self.method.update_key()
        return loss.detach()


class Released(Provider):
    """Networks and queue are the method's; what is done with them is written out here."""

    passes = 18
    own_draw = True

    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        self.inputs = inputs
        self.method = as_torchvision(make_method(cell)).to(device)
        self.precision = "tf32" if device.type == "cuda" else "ieee"
        self.optimizer = sgd(self.method.query)
        self.augment = K.VideoSequential(
            *views._kornia_steps((1.0, 1.0)), data_format="BCTHW", same_on_frame=True
        )  # its sigma is one for the whole run

    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        with harness.float32_products(self.precision), cudnn("benchmark", True):
            with part("views"):
                query, key = given or (self.make_views(clips) for clips in self.inputs)
            with part("forward"):
                loss = self.forward(query, key, part)
            with part("backward"):
                self.optimizer.zero_grad()
                loss.backward()
            with part("optimizer"):
                self.optimizer.step()
        return loss.detach()

    def make_views(self, clips: Clips) -> Views:
        rgb, static = self.augment(clips.cropped), self.augment(clips.cropped_stills)
        return Views(rgb, static, rgb - torch.roll(rgb, 1, 2))

    def forward(self, query: Views, key: Views, part: Part) -> Tensor:
        method = self.method
        with part("keys"), torch.no_grad():
            of_query, query_maps = self.look(query)
            for old, new in zip(method.key.parameters(), method.query.parameters(), strict=True):
                old.data = METHOD.key_momentum * old.data + (1 - METHOD.key_momentum) * new.data
            _, key_maps = self.look(key)
            order = torch.randperm(len(key.rgb), device=key.rgb.device)
            shuffled, _ = self.look(Views(*(view[order] for view in key)))
            back = order.argsort()
            keys = torch.stack([shuffled[KEY_OF_PAIR[name]][back] for name in PAIRS])  # (P, B, D)
            mining = torch.stack([of_query["sv"], of_query["dv"]])
        with part("query forward"):
            rgb, static, dynamic = method.query.backbone(torch.cat(query)).chunk(3)
            embedded = method.query.embed({"v": rgb, "s": static, "d": dynamic}, query_maps)
            queries = torch.stack([embedded[name] for name in PAIRS])
        losses, _ = info_nce.as_released(queries, keys, method.queue, mining)
        with torch.no_grad():
            alignment = (activation_map(rgb) - (key_maps["s"] + key_maps["d"])).square().mean()
        method._enqueue(keys)
        return losses.sum() + METHOD.alignment_weight * alignment

    def look(self, clips: Views) -> tuple[dict[str, Tensor], ByLetter]:
        """A pass of the key network over three views: five embeddings, static and dynamic activation map."""
        rgb, static, dynamic = self.method.key.backbone(torch.cat(clips)).chunk(3)
        maps = {"s": activation_map(static), "d": activation_map(dynamic)}
        return self.method.key.embed({"v": rgb, "s": static, "d": dynamic}, maps), maps

    @contextmanager
    def watched(self, part: Part) -> Iterator[None]:
        yield  # its parts are in its own code


PROVIDERS: dict[str, Callable[[Cell, Inputs, torch.device], Provider]] = {
    "as released": Released,
    "eager bf16": Eager,
    "ours": Ours,
    "ours, float32": partial(Ours, bfloat16=False),
}


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, weight_decay=OPTIM.weight_decay)


@contextmanager
def reference_kernels() -> Iterator[None]:
    set_backend("reference")
    try:
        yield
    finally:
        set_backend("auto")


@contextmanager
def cudnn(setting: str, value: bool) -> Iterator[None]:
    """Inside, a setting of torch.backends.cudnn: "benchmark" tries its algorithms on each new size, as the released code lets it."""
    before = getattr(torch.backends.cudnn, setting)
    setattr(torch.backends.cudnn, setting, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, setting, before)


# ------------------------------------------------------------------------------------------------------------------ truth


class Truth(NamedTuple):
    query: Views
    key: Views
    loss: float
    keys: Tensor  # (P, B, D)


@torch.no_grad()
def find_truth(cell: Cell, inputs: Inputs, device: torch.device) -> Truth:
    """The first step's loss and keys in float32, no tf32, default memory, reference kernels."""
    method = as_torchvision(make_method(cell)).to(device)
    with reference_kernels(), harness.float32_products("ieee"), cudnn("allow_tf32", False):
        query, key = (
            Views(*(view.contiguous() for view in generate_views(clips.planes, clips.stills, clips.host_params)))
            for clips in inputs
        )
        loss = float(method(query, key, 0).loss)
    return Truth(query, key, loss, method.queue[:, : cell.B].clone())
