"""The ways to make a training step, and the float32 step that their first step is compared with.

benchmarks/step.py describes and measures them. This module is not run by itself. All ways begin with the same weights,
the same queue and the same frames on the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torchvision.models.video.resnet import Conv2Plus1D
from torchvision.transforms import v2

from benchmarks import harness, info_nce, view_providers
from benchmarks.harness import RELEASED, Precision
from dclr.config import MethodConfig, ModelConfig, OptimConfig, RunConfig
from dclr.data.augmentation import PRETRAIN
from dclr.kernels import ViewParams, Views, Yuv420, generate_views, set_backend
from dclr.methods import DCLR
from dclr.methods.encoder import KEY_OF_PAIR, PAIRS, ByLetter
from dclr.models import activation_map
from dclr.models.video_resnet import Factored, FactoredStem
from dclr.training.compile import RECOMPUTED_BUDGET, compile_backbone, resolve_compile
from dclr.training.engine import Engine, read_ds_config, resolve_precision

METHOD, OPTIM = MethodConfig(), OptimConfig()
DS_CONFIG = harness.ROOT / RunConfig().ds_config
"""The DeepSpeed configuration that a run has by default."""

Section = Callable[[str], AbstractContextManager[None]]
"""Returns a context that times its content as the section of this name, as `Stopwatch.section` does."""


def untimed(name: str) -> AbstractContextManager[None]:
    """Do nothing: the `Section` of a step whose sections are not timed."""
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


# --------------------------------------------------------------------------------------------------------------- inputs


class Clips(NamedTuple):
    """One clip of each of B videos. All tensors are on the device but `host_params`."""

    planes: Yuv420  # (B, T, H, W), the output of a decoder
    stills: Yuv420
    params: ViewParams
    host_params: ViewParams  # params on the CPU
    cropped: Tensor  # (B, 3, T, h, w) float32 in 0 to 1: the output of the released loader
    cropped_stills: Tensor  # the same for the still, repeated T times


class Inputs(NamedTuple):
    """The clips of a step."""

    query: Clips
    key: Clips


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Return moving smooth noise. A key clip shows another video than its query clip. This does not change the time."""
    shape = view_providers.Cell(precision="bf16", B=2 * cell.B, T=cell.T, H=cell.H, W=cell.W, side=cell.side)
    whole = view_providers.make_inputs(shape, device)
    crop = v2.RandomResizedCrop((cell.side, cell.side), PRETRAIN.scale, PRETRAIN.ratio, antialias=False)

    def clips(rows: slice) -> Clips:
        def half(group: Any) -> Any:  # one of the dataclasses of tensors
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


def make_network(cell: Cell) -> DCLR:
    """Return a network with the same weights and the same queue for every provider."""
    torch.manual_seed(0)
    return DCLR(ModelConfig(backbone=cell.backbone, width=cell.width), METHOD)


# ------------------------------------------------------------------------------------------------------------ providers


def configure(network: DCLR, device: torch.device, recompute: bool = False) -> None:
    """Pad and compile the backbones as pretraining does by default, before DeepSpeed gets the network."""
    defaults = RunConfig()
    compiles = resolve_compile(defaults.compile, device)[0]
    functorch.activation_memory_budget = RECOMPUTED_BUDGET if recompute else 1.0  # read in the provider's first step
    for encoder in (network.query, network.key):
        encoder.backbone.pad_channels(defaults.pad_channels)
        if compiles:
            compile_backbone(encoder.backbone)
        elif recompute:
            encoder.backbone.recompute()


class Stages(nn.Sequential):
    """The stages of a backbone one after another, without what Backbone.forward does before them."""

    def forward(self, x: Tensor, differences: int = 0) -> Tensor:
        return super().forward(x)

    def forward_views(self, views: Sequence[Tensor], frames: int, differences: bool = False) -> list[Tensor]:
        """Compute the feature maps of a step's views in one batch. A view of one frame is repeated `frames` times."""
        whole = [view.expand(-1, -1, frames, -1, -1) for view in views]
        return list(self(torch.cat(whole)).chunk(len(whole)))


def as_torchvision(network: DCLR) -> DCLR:
    """Replace the backbones' modules by torchvision's: 3-D convolutions, in the memory format of their input."""
    theirs: dict[type, type] = {Factored: Conv2Plus1D, FactoredStem: nn.Sequential}
    for encoder in (network.query, network.key):
        for module in encoder.backbone.modules():
            module.__class__ = theirs.get(type(module), type(module))
        stages = Stages(OrderedDict(encoder.backbone.named_children()))
        setattr(encoder, "backbone", stages)  # noqa: B010  (its declared type is Backbone)
    return network


class Provider:
    """One way to make a step.

    Attributes:
        network: holds the encoders, the queue and its pointer.
        precision: arithmetic of the matrix products, for the share of the peak.
        passes: cost of a sample, in forward passes of one view.
        own_draw: True if the provider draws its own augmentations, like the released code.
    """

    network: DCLR
    precision: Precision
    passes = 14
    own_draw = False

    def step(self, section: Section, given: tuple[Views, Views] | None = None) -> Tensor:
        """Make a training step and return its loss. given: views of query and key clips. None: make them."""
        raise NotImplementedError

    @contextmanager
    def encoders_timed(self, section: Section) -> Iterator[None]:
        """Time the encoders inside the context as the sections "query forward" and "keys", within "forward"."""

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                with section(name):
                    return function(*arguments)

            return call

        network, backbone = self.network, self.network.query.backbone
        wrapped: tuple[tuple[nn.Module, str, str], ...] = (
            (network.query, "embed", "query forward"),
            (network, "_look_at_query", "keys"),
            (network, "_encode_key", "keys"),
        )
        for owner, name, title in wrapped:
            setattr(owner, name, timed(title, getattr(owner, name)))
        setattr(network.query, "backbone", _Timed(backbone, section))  # noqa: B010  (a compiled backbone stays so)
        try:
            yield
        finally:
            network.query.backbone = backbone
            for owner, name, _ in wrapped:
                delattr(owner, name)


class _Timed(nn.Module):
    """A backbone whose forward pass is timed as the section "query forward"."""

    def __init__(self, inner: Any, section: Section) -> None:
        super().__init__()
        self.inner, self.section = inner, section

    def forward(self, x: Tensor, differences: int = 0) -> Tensor:
        with self.section("query forward"):
            return self.inner(x, differences)

    def forward_views(self, views: Sequence[Tensor], frames: int, differences: bool = False) -> list[Tensor]:
        with self.section("query forward"):
            return self.inner.forward_views(views, frames, differences)


class Ours(Provider):
    """The step of `train.py pretrain` at its defaults."""

    def __init__(
        self,
        cell: Cell,
        inputs: Inputs,
        device: torch.device,
        bfloat16: bool = True,
        recompute: bool = False,
    ) -> None:
        self.inputs, self.network = inputs, make_network(cell)
        configure(self.network, device, recompute)
        config = read_ds_config(DS_CONFIG)
        if not bfloat16:
            config["torch_autocast"] = {**config.get("torch_autocast", {}), "enabled": False}
        resolve_precision(config, device)
        self.engine = Engine(self.network, config, OptimConfig(batch_size=cell.B), device)
        self.engine.train()
        self.precision = "bf16" if self.engine.view_dtype == torch.bfloat16 else "ieee"

    def step(self, section: Section, given: tuple[Views, Views] | None = None) -> Tensor:
        with section("views"):
            dtype = self.engine.view_dtype
            query, key = given or (
                generate_views(clips.planes, clips.stills, clips.params, dtype=dtype) for clips in self.inputs
            )
        with section("forward"):
            loss = self.engine(query, key, 0).loss
        with section("backward"):
            self.engine.backward(loss)
        with section("optimizer"):
            self.engine.step()
        with section("keys"):
            self.network.update_key()
        return loss.detach()


class Eager(Provider):
    """The same method in plain torch with autocast, reference kernels and torchvision's modules."""

    precision = "bf16"

    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        self.inputs, self.device = inputs, device
        self.network = as_torchvision(make_network(cell)).to(device)
        self.optimizer = sgd(self.network.query)

    def step(self, section: Section, given: tuple[Views, Views] | None = None) -> Tensor:
        with reference_kernels(), cudnn("benchmark", True):
            with section("views"):
                query, key = given or (
                    generate_views(clips.planes, clips.stills, clips.host_params, dtype=torch.bfloat16)
                    for clips in self.inputs
                )
            with section("forward"), torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.network(query, key, 0).loss
            with section("backward"):
                loss.backward()
            with section("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            with section("keys"):
                self.network.update_key()
        return loss.detach()


class Released(Provider):
    """The released code's step, written out. Encoders and queue are those of `DCLR`."""

    passes = 18
    own_draw = True

    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        from kornia import augmentation as K

        self.inputs = inputs
        self.network = as_torchvision(make_network(cell)).to(device)
        self.precision = "tf32" if device.type == "cuda" else "ieee"
        self.optimizer = sgd(self.network.query)
        # The released code draws one sigma of the blur for the whole run.
        self.augment = K.VideoSequential(
            *view_providers.kornia_steps((1.0, 1.0)), data_format="BCTHW", same_on_frame=True
        )

    def step(self, section: Section, given: tuple[Views, Views] | None = None) -> Tensor:
        with harness.float32_products(self.precision), cudnn("benchmark", True):
            with section("views"):
                query, key = given or (self.make_views(clips) for clips in self.inputs)
            with section("forward"):
                loss = self.forward(query, key, section)
            with section("backward"):
                self.optimizer.zero_grad()
                loss.backward()
            with section("optimizer"):
                self.optimizer.step()
        return loss.detach()

    def make_views(self, clips: Clips) -> Views:
        rgb, static = self.augment(clips.cropped), self.augment(clips.cropped_stills)
        return Views(rgb, static, rgb - torch.roll(rgb, 1, 2))

    def forward(self, query: Views, key: Views, section: Section) -> Tensor:
        network = self.network
        with section("keys"), torch.no_grad():
            query_embedded, query_maps = self.key_pass(query)
            for old, new in zip(network.key.parameters(), network.query.parameters(), strict=True):
                old.data = METHOD.key_momentum * old.data + (1 - METHOD.key_momentum) * new.data
            _, key_maps = self.key_pass(key)
            order = torch.randperm(len(key.rgb), device=key.rgb.device)
            shuffled, _ = self.key_pass(Views(*(view[order] for view in key)))
            back = order.argsort()
            keys = torch.stack([shuffled[KEY_OF_PAIR[name]][back] for name in PAIRS])  # (P, B, D)
            mining = torch.stack([query_embedded["sv"], query_embedded["dv"]])
        with section("query forward"):
            rgb, static, dynamic = network.query.backbone(torch.cat(query)).chunk(3)
            embedded = network.query.embed({"v": rgb, "s": static, "d": dynamic}, query_maps)
            queries = torch.stack([embedded[name] for name in PAIRS])
        losses, _ = info_nce.as_released(queries, keys, network.queue, mining)
        with torch.no_grad():
            alignment = (activation_map(rgb) - (key_maps["s"] + key_maps["d"])).square().mean()
        network._enqueue(keys)
        return losses.sum() + METHOD.alignment_weight * alignment

    def key_pass(self, clips: Views) -> tuple[dict[str, Tensor], ByLetter]:
        """Pass three views through the key encoder. Return the embeddings and the two activation maps by name."""
        rgb, static, dynamic = self.network.key.backbone(torch.cat(clips)).chunk(3)
        maps = {"s": activation_map(static), "d": activation_map(dynamic)}
        return self.network.key.embed({"v": rgb, "s": static, "d": dynamic}, maps), maps

    @contextmanager
    def encoders_timed(self, section: Section) -> Iterator[None]:
        yield  # `forward` has these sections itself


PROVIDERS: dict[str, Callable[[Cell, Inputs, torch.device], Provider]] = {
    RELEASED: Released,
    "eager bf16": Eager,
    "ours": Ours,
    "ours, float32": partial(Ours, bfloat16=False),
    "ours, recomputed": partial(Ours, recompute=True),
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
    """Set an attribute of torch.backends.cudnn inside the context. "benchmark" tries the algorithms on new sizes."""
    before = getattr(torch.backends.cudnn, setting)
    setattr(torch.backends.cudnn, setting, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, setting, before)


# ---------------------------------------------------------------------------------------------------------------- truth


class Truth(NamedTuple):
    """The results of a first step in float32."""

    query: Views
    key: Views
    loss: float
    keys: Tensor  # (P, B, D)


@torch.no_grad()
def find_truth(cell: Cell, inputs: Inputs, device: torch.device) -> Truth:
    """Compute a first step in float32 without tf32, in torch's default memory format, with the reference."""
    network = as_torchvision(make_network(cell)).to(device)
    with reference_kernels(), harness.float32_products("ieee"), cudnn("allow_tf32", False):
        query, key = (
            Views(*(view.contiguous() for view in generate_views(clips.planes, clips.stills, clips.host_params)))
            for clips in inputs
        )
        loss = float(network(query, key, 0).loss)
    return Truth(query, key, loss, network.queue[:, : cell.B].clone())
