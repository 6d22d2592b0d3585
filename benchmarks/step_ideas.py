"""Ideas to make our step faster or smaller, which `benchmarks/step.py --ideas` measures beside ours; nothing here is run by itself.

Each is a small change of `Ours`, named by what is changed, and computes the same step:
    stem on 12 channels        its first convolution without a stride, on pictures of half the side with four times the channels
    3-D convolutions           the (2+1)D convolutions as F.conv3d, not as those of pictures
    16 channels, not padded    channels between space and time up to a multiple of 16, and as torchvision has them
    not compiled               backbones without torch.compile
    recomputing                half of what the compiled backward pass would keep is computed anew: less memory, more work
    equal frames once          the static view repeats one frame; stem and first stage compute it once
    keys on a second stream    both passes of the key network run beside the query network's forward pass
    CUDA graphs                compiled backbones are replayed from CUDA graphs, without the host's launches
Those that act on compiled backbones, or on a GPU alone, raise UserError where there is nothing to change.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video.resnet import BasicBlock

from benchmarks.step_providers import Cell, Inputs, Ours, Part, Provider, configure
from dclr.config import RunConfig
from dclr.errors import UserError
from dclr.method import DCLR, ByLetter
from dclr.models import Backbone
from dclr.models.backbone import Factored, FactoredStem, _in_space, _in_time, _padded
from dclr.training.compile import settle_compile
from kernels import Views

_Convs = tuple[nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Conv3d]

# -------------------------------------------------------------------------------------- convolutions, padding, compiling


class Factored3d(Factored):
    def forward(self, x: Tensor) -> Tensor:
        return _in_3d(x, self, self.channel_multiple)


class FactoredStem3d(FactoredStem):
    def forward(self, x: Tensor) -> Tensor:
        *_, norm, relu = self
        return relu(norm(_in_3d(x, self, self.channel_multiple)))


def _in_3d(x: Tensor, convs: nn.Sequential, multiple: int) -> Tensor:
    """What the backbone's `_factored` computes, padded alike, by 3-D convolutions."""
    space, between, _, time = cast(_Convs, list(convs)[:4])
    to_more, from_more, extra = _padded(space, time, multiple)
    x = F.conv3d(x, to_more, None, space.stride, space.padding)
    x = F.relu(between(x, extra), inplace=True)
    return F.conv3d(x, from_more, None, time.stride, time.padding)


def in_3d(method: DCLR, device: torch.device) -> None:
    configure(method, device)
    swapped: dict[type, type] = {Factored: Factored3d, FactoredStem: FactoredStem3d}
    for module in (*method.query.backbone.modules(), *method.key.backbone.modules()):
        module.__class__ = swapped.get(type(module), type(module))


class FactoredStem12(FactoredStem):
    """The 7 x 7 convolution of stride 2 on 3 channels as one of 4 x 4 without a stride on 12, each 2 x 2 pixels side by side.

    3 channels leave tensor cores idle: on an H200 the stem's first convolution took a tenth of the step for 3 % of its work (docs/LOG.md).
    A kernel of 8 x 8 whose first row and column are zero reaches from pixel 2o - 4 to 2o + 3, that is blocks o - 2 to o + 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] % 2 or x.shape[4] % 2:
            return super().forward(x)
        space, between, _, time = cast(_Convs, list(self)[:4])
        to_more, from_more, extra = _padded(space, time, self.channel_multiple)
        frames = F.pixel_unshuffle(x.transpose(1, 2).flatten(0, 1), 2)  # (B * T, 12, H/2, W/2)
        frames = F.pad(frames, (2, 1, 2, 1)).contiguous(memory_format=torch.channels_last)
        weight = F.pad(to_more.squeeze(2), (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # (C, 3, 4, 2, 4, 2)
        weight = weight.permute(0, 1, 3, 5, 2, 4).flatten(
            1, 3
        )  # (C, 12, 4, 4), channels as pixel_unshuffle orders them
        frames = F.conv2d(frames, weight)
        x = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        x = F.relu(between(x, extra), inplace=True)
        *_, norm, relu = self
        return relu(norm(_in_time(x, from_more, time)))


def stem_of_12(method: DCLR, device: torch.device) -> None:
    configure(method, device)
    for encoder in (method.query, method.key):
        encoder.backbone.stem.__class__ = FactoredStem12


def padded(method: DCLR, device: torch.device, multiple: int) -> None:
    configure(method, device)
    for encoder in (method.query, method.key):
        encoder.backbone.pad_channels(multiple)


def not_compiled(method: DCLR, device: torch.device) -> None:
    _require_compiled(device)
    for encoder in (method.query, method.key):
        encoder.backbone.pad_channels(RunConfig().pad_channels)


def _require_compiled(device: torch.device) -> None:
    if not settle_compile(RunConfig().compile, device)[0]:
        raise UserError(f"ours is not compiled on {device.type}")


class RecomputedBackbone(Backbone):
    """Nothing but a type of its own: a graph that was compiled for another provider's Backbone is not taken for it."""


class Recomputing(Ours):
    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        _require_compiled(device)
        super().__init__(cell, inputs, device)
        for encoder in (self.method.query, self.method.key):
            encoder.backbone.__class__ = RecomputedBackbone

    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        # Read when a graph is compiled; torch chooses what to compute anew.
        with torch._functorch.config.patch(activation_memory_budget=0.5):
            return super().step(part, given)


# ------------------------------------------------------------------------------------------------------- equal frames once


class EqualFramesOnce(Backbone):
    """A backbone that computes equal frames of the static view once, in the stem and the first stage of a factored network.

    A convolution in time pads with zeros, so after p of them the first p and the last p of T equal frames differ, and those between
    are still equal. 2p + 1 frames are kept, the middle one for T - 2p. Batch statistics are those of all frames of all views.
    Clips too short for that, and a backbone in eval mode, are computed whole.
    """

    clips: int  # B: the batch is (rgb,) static, dynamic, B clips each

    def forward(self, x: Tensor) -> Tensor:
        B, T, distinct = self.clips, x.shape[2], 2 * (1 + 2 * len(self.layer1)) + 1
        if not self.training or distinct > T:
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        others, still = torch.cat([x[: -2 * B], x[-B:]]), x[-2 * B : -B, :, :1]
        others, still = (F.relu(x) for x in _apart(others, still, self.stem, cast(nn.BatchNorm3d, self.stem[4]), T))
        for block in cast(list[BasicBlock], self.layer1):
            before, still_before = others, still
            others, still = (F.relu(x) for x in _apart(others, still, block.conv1[0], block.conv1[1], T))
            others, still = _apart(others, still, block.conv2[0], block.conv2[1], T)
            others, still = F.relu(others + before), F.relu(still + _stretch(still_before, still.shape[2]))
        x = torch.cat([others[:-B], _stretch(still, T), others[-B:]])
        return self.layer4(self.layer3(self.layer2(x)))


def _apart(others: Tensor, still: Tensor, convs: Any, norm: nn.BatchNorm3d, T: int) -> tuple[Tensor, Tensor]:
    """Convolution in space, in time and normalisation after both; the still clip comes back with two frames more."""
    space, between, _, time = cast(_Convs, list(convs)[:4])
    to_more, from_more, extra = _padded(space, time, convs.channel_multiple)
    others, still = _in_space(others, to_more, space), _in_space(still, to_more, space)
    others, still = (F.relu(x) for x in _normalise_jointly(others, still, between, T, extra))
    others, still = _in_time(others, from_more, time), _in_time(_stretch(still, still.shape[2] + 2), from_more, time)
    return _normalise_jointly(others, still, norm, T)


def _stretch(still: Tensor, frames: int) -> Tensor:
    """The middle frame repeated, until there are so many."""
    middle, missing = still.shape[2] // 2, frames - still.shape[2]
    repeated = still[:, :, middle : middle + 1].expand(-1, -1, missing + 1, -1, -1)
    whole = torch.cat([still[:, :, :middle], repeated, still[:, :, middle + 1 :]], dim=2)
    return whole.contiguous(memory_format=torch.channels_last_3d)


def _normalise_jointly(
    others: Tensor,  # (N, C + extra, T, H, W)
    still: Tensor,  # (B, C + extra, 2p + 1, H, W)
    norm: nn.BatchNorm3d,  # of C channels, in training
    T: int,
    extra: int = 0,
) -> tuple[Tensor, Tensor]:
    """Batch normalisation of both as of one batch in which the middle frame of `still` stands as often as it takes to have T frames."""
    wide = norm.weight.dtype  # statistics are not rounded to bfloat16
    times = torch.ones(still.shape[2], dtype=wide, device=still.device)
    times[still.shape[2] // 2] = T - still.shape[2] + 1
    variance_o, mean_o = torch.var_mean(others.to(wide), (0, 2, 3, 4), correction=0)  # (C,)
    variance_s, mean_s = torch.var_mean(still.to(wide), (0, 3, 4), correction=0)  # (C, 2p + 1)
    of_others, of_frame = others[:, 0].numel(), still[:, 0, 0].numel()
    count = of_others + of_frame * T
    mean = (of_others * mean_o + of_frame * (mean_s * times).sum(1)) / count
    square_o = variance_o + (mean_o - mean).square()
    square_s = ((variance_s + (mean_s - mean[:, None]).square()) * times).sum(1)
    variance = (of_others * square_o + of_frame * square_s) / count
    with torch.no_grad():
        momentum, own = cast(float, norm.momentum), slice(norm.num_features)
        cast(Tensor, norm.running_mean).lerp_(mean[own], momentum)
        cast(Tensor, norm.running_var).lerp_(variance[own] * (count / (count - 1)), momentum)
        cast(Tensor, norm.num_batches_tracked).add_(1)
    scale = F.pad(norm.weight, (0, extra)) * torch.rsqrt(variance + norm.eps)
    shift = F.pad(norm.bias, (0, extra)) - mean * scale
    scale, shift = scale[:, None, None, None], shift[:, None, None, None]
    return (others.to(wide) * scale + shift).to(others.dtype), (still.to(wide) * scale + shift).to(still.dtype)


class StillOnce(Ours):
    def __init__(self, cell: Cell, inputs: Inputs, device: torch.device) -> None:
        super().__init__(cell, inputs, device)
        for encoder in (self.method.query, self.method.key):
            encoder.backbone.__class__ = EqualFramesOnce
            cast(EqualFramesOnce, encoder.backbone).clips = cell.B


# ------------------------------------------------------------------------------------------------- streams and CUDA graphs


class KeysBeside(DCLR):
    """The key network's two passes on a stream of their own. Its memory is used anew only in its next turn, which waits for all that
    the main stream was given before, reading included; so the allocator need not be told of the second reader."""

    beside: torch.cuda.Stream
    looked: tuple[ByLetter, Tensor | None]
    encoded: tuple[Tensor, Tensor, ByLetter]

    def forward(self, query: Views, key: Views, step: int) -> Any:
        self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):
            self.looked = super()._look_at_query(query)
            self.encoded = super()._encode_key(key, step)
        return super().forward(query, key, step)

    def _look_at_query(self, query: Views) -> tuple[ByLetter, Tensor | None]:
        """Called after the query network's forward pass: from here on keys are needed."""
        torch.cuda.current_stream().wait_stream(self.beside)
        return self.looked

    def _encode_key(self, key: Views, step: int) -> tuple[Tensor, Tensor, ByLetter]:
        return self.encoded


def keys_beside(method: DCLR, device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"{device.type} has no streams")
    configure(method, device)
    method.__class__ = KeysBeside
    cast(KeysBeside, method).beside = torch.cuda.Stream()


class Captured(Ours):
    def step(self, part: Part, given: tuple[Views, Views] | None = None) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what a graph gave in the last step may be overwritten
        return super().step(part, given)


def captured(method: DCLR, device: torch.device) -> None:
    _require_compiled(device)
    configure(method, device)
    for encoder in (method.query, method.key):
        encoder.backbone.compile(mode="reduce-overhead", dynamic=False, fullgraph=True)


# Those that could end the process, or keep memory from the rest, come last.
IDEAS: dict[str, Callable[[Cell, Inputs, torch.device], Provider]] = {
    "ours, stem on 12 channels": partial(Ours, configure=stem_of_12),
    "ours, 3-D convolutions": partial(Ours, configure=in_3d),
    "ours, 16 channels": partial(Ours, configure=partial(padded, multiple=16)),
    "ours, not padded": partial(Ours, configure=partial(padded, multiple=1)),
    "ours, not compiled": partial(Ours, configure=not_compiled),
    "ours, recomputing": Recomputing,
    "ours, equal frames once": StillOnce,
    "ours, keys on a second stream": partial(Ours, configure=keys_beside),
    "ours, CUDA graphs": partial(Captured, configure=captured),
}
