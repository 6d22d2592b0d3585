"""The views of a step, computed apart with joint BatchNorm statistics, against torchvision's plain modules.

The oracle is built from torchvision's blocks: nn.Conv3d, nn.BatchNorm3d and nn.ReLU. It computes in float64, in the
default memory format, and gets all views as one batch. The static view is repeated to all frames first. Outputs,
gradients of all parameters and running statistics must be equal to 1e-9 of the largest value. Then no rounding error
can hide a wrong weight of a frame.

Letters: B clips, C channels, T frames, H W pixels.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import video
from torchvision.models.video import resnet
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, Conv3DNoTemporal, Conv3DSimple

from dclr.config import MethodConfig, ModelConfig
from dclr.kernels import Views, backend, convolution
from dclr.kernels.space_to_depth import space_to_depth
from dclr.kernels.types import kind_of
from dclr.methods import DCLR
from dclr.models import IMAGENET, KINETICS, Backbone, Statistics, backbone_without_memory, build_backbone
from dclr.models.batch_norm import BatchNorm
from dclr.models.clips import Clips
from dclr.training.compile import INDUCTOR_OPTIONS, compile_backbone

# ---------------------------------------------------------------- the oracle

# name -> convolutions of the four stages, and residual blocks of each stage
STAGES: dict[str, tuple[list[Any], int]] = {
    "r2plus1d_10": ([Conv2Plus1D] * 4, 1),
    "r2plus1d_18": ([Conv2Plus1D] * 4, 2),
    "r3d_10": ([Conv3DSimple] * 4, 1),
    "r3d_18": ([Conv3DSimple] * 4, 2),
    "mc3_18": ([Conv3DSimple, Conv3DNoTemporal, Conv3DNoTemporal, Conv3DNoTemporal], 2),
}


def oracle_stem(width: int, factored: bool) -> nn.Sequential:
    """Build torchvision's stem with another number of channels."""
    if factored:
        between = max(1, 45 * width // 64)
        return nn.Sequential(
            nn.Conv3d(3, between, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(between),
            nn.ReLU(),
            nn.Conv3d(between, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
        )
    conv = nn.Conv3d(3, width, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU())


class Oracle(nn.Module):
    """torchvision's network without a classifier: clips (B, 3, T, H, W) -> feature maps."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        convs, blocks = STAGES[name]
        self.stem = oracle_stem(width, convs[0] is Conv2Plus1D)
        channels = width
        for i, conv in enumerate(convs):
            stage = []
            for block in range(blocks):
                out, stride = width * 2**i, 2 if i and not block else 1
                shortcut = None
                if stride == 2:
                    projection = nn.Conv3d(channels, out, 1, stride=conv.get_downsample_stride(stride), bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm3d(out))
                stage.append(BasicBlock(channels, out, conv, stride, shortcut))
                channels = out
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@dataclass(frozen=True)
class Case:
    """One step of a backbone.

    Attributes:
        views: one letter a view: r (rgb), s (static, passed as one frame), e (static, passed as all frames) or
            d (dynamic).
        channels: see Backbone.pad_channels.
        blocks: whether the views come in the layout of space_to_depth.
        fused: the convolutions that `dclr.kernels.convolution` computes: "all", "spatial", "temporal" or "" for none.
    """

    name: str = "r2plus1d_10"
    views: str = "rsd"
    frames: int = 8
    size: tuple[int, int] = (16, 16)
    batch: int = 2
    width: int = 4
    channels: int = 1
    statistics: Statistics = IMAGENET
    blocks: bool = False
    fused: str = ""

    def __str__(self) -> str:
        words = [self.name, f"w{self.width}", self.views, f"{self.batch}x{self.frames}x{self.size[0]}x{self.size[1]}"]
        words += [f"c{self.channels}"] * (self.channels > 1) + ["kinetics"] * (self.statistics != IMAGENET)
        words += [f"fused-{self.fused}"] * bool(self.fused)
        return "-".join(words + ["blocks"] * self.blocks)

    @property
    def differences(self) -> bool:
        return self.views.endswith("d")

    def draw(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Draw the views. A static view (s) has one frame."""
        rng = torch.Generator().manual_seed(seed)
        drawn = []
        for letter in self.views:
            frames = 1 if letter in "se" else self.frames
            view = torch.randn(self.batch, 3, frames, *self.size, generator=rng, dtype=torch.float64).to(dtype)
            drawn.append(view.expand(-1, -1, self.frames, -1, -1) if letter == "e" else view)
        return drawn

    def networks(self) -> tuple[Oracle, Backbone]:
        """Build the oracle and our backbone in float64 with the same random weights and statistics."""
        torch.manual_seed(1)
        oracle, ours = Oracle(self.name, self.width).double(), build_backbone(self.name, self.width).double()
        for module in oracle.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(17)
        ours.load_state_dict(oracle.state_dict(), strict=True)
        ours.statistics = self.statistics
        ours.pad_channels(self.channels)
        if self.fused:
            ours.fuse([n for n, weight in ours.fusible().items() if self.fused in ("all", kind_of(weight))])
        return oracle, ours

    def by_oracle(self, oracle: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Compute the maps of the views as one batch, from whole clips with the statistics of the weights."""
        whole = [view.expand(-1, -1, self.frames, -1, -1) for view in views]
        (mean, std), (new_mean, new_std) = (
            [torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1, 1) for numbers in statistics]
            for statistics in (IMAGENET, self.statistics)
        )
        if self.statistics != IMAGENET:
            pixels = [(x * std + mean - new_mean) / new_std for x in whole]
            if self.differences:
                pixels[-1] = whole[-1] * std / new_std
            whole = [new.to(old.dtype) for new, old in zip(pixels, whole, strict=True)]
        return list(oracle(torch.cat(whole)).chunk(len(views)))

    def by_ours(self, ours: Backbone, views: Sequence[Tensor]) -> list[Tensor]:
        given = [space_to_depth(view) if self.blocks else view for view in views]
        return ours.forward_views(given, self.frames, differences=self.differences)


Maps = Callable[[], list[Tensor]]


def results(network: nn.Module, maps: Maps) -> dict[str, Tensor]:
    """Return the maps, the gradients of a random linear functional of all maps, and the buffers after the step."""
    outputs = maps()
    rng = torch.Generator().manual_seed(2)
    weights = [torch.randn(m.shape, generator=rng, dtype=torch.float64) for m in outputs]
    sum((m.double() * w).sum() for m, w in zip(outputs, weights, strict=True)).backward()
    found = {f"map {i}": m.detach() for i, m in enumerate(outputs)}
    found |= {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return found | dict(network.named_buffers())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that tensors are equal to 1e-9 of the largest value."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        error, largest = (found[name] - tensor).abs().max(), tensor.abs().max()
        assert error <= 1e-9 * largest, f"{name}: off by {error / largest:.1e} of the largest value"


def named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"map {i}": m for i, m in enumerate(maps)}


def check(case: Case) -> None:
    """Compare a training step, and then the maps in evaluation mode, with the oracle."""
    oracle, ours = case.networks()
    views = case.draw()
    expected = results(oracle, lambda: case.by_oracle(oracle, views))
    assert_equal(results(ours, lambda: case.by_ours(ours, views)), expected)
    with torch.no_grad():
        assert_equal(named(case.by_ours(ours.eval(), views)), named(case.by_oracle(oracle.eval(), views)))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("r2plus1d_10", lambda: resnet.VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1] * 4, resnet.R2Plus1dStem)),
        ("r2plus1d_18", video.r2plus1d_18),
        ("r3d_10", lambda: resnet.VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1] * 4, resnet.BasicStem)),
        ("r3d_18", video.r3d_18),
        ("mc3_18", video.mc3_18),
    ],
)
def test_the_oracle_and_the_backbone_have_the_tensors_of_torchvisions_network(
    name: str, theirs: Callable[[], nn.Module]
) -> None:
    """Checkpoints keep torchvision's names and shapes, also if channels are padded."""
    with torch.device("meta"):
        networks = theirs(), Oracle(name, 64)
    ours = backbone_without_memory(name, 64)
    ours.pad_channels(16)
    expected, *others = (
        [(key, tensor.shape) for key, tensor in network.state_dict().items() if not key.startswith("fc.")]
        for network in (*networks, ours)
    )
    for found in others:
        assert found == expected


# ---------------------------------------------------------------- a step in float64

# Each value of a setting meets most values of the others, but not every combination is tested.
CASES = [
    Case(),
    Case("r2plus1d_18", frames=16, size=(17, 13), channels=8),
    Case("r2plus1d_18", "sd", frames=3, size=(13, 23), width=5, channels=16),
    Case("r2plus1d_18", "r", frames=1, size=(33, 17), batch=3),
    Case("r2plus1d_18", "rs", frames=8, width=2),
    Case("r3d_10", frames=16, size=(16, 17), width=2),
    Case("r3d_10", "rs", frames=3, size=(13, 17), batch=3, width=8),
    Case("r3d_10", "sd", frames=1, size=(17, 23), statistics=KINETICS),
    Case("r3d_18", frames=8, size=(23, 17), batch=1, width=3),
    Case("r3d_18", "s", frames=2, size=(17, 17)),
    Case("mc3_18", frames=16, size=(17, 16), batch=1),
    Case("mc3_18", "sd", frames=2, size=(13, 16), width=6),
    Case("mc3_18", "rd", frames=3, statistics=KINETICS),
    Case("mc3_18", "s", frames=8, size=(16, 33), batch=1),
    Case(frames=16, batch=1, size=(23, 13), width=8, channels=16),
    Case(views="sd", frames=16, size=(17, 22), batch=1, channels=8),
    Case(views="rs", frames=8, size=(13, 13), statistics=KINETICS, channels=8),
    Case(views="rd", frames=2, size=(19, 16), width=1, channels=16),
    Case(views="r", frames=16, size=(16, 17), batch=1, channels=8),
    Case(views="s", frames=16, size=(17, 17), batch=1, width=8),
    Case(views="s", frames=1, size=(17, 33), batch=2),
    Case(frames=8, size=(14, 23), statistics=KINETICS, width=3),
    # The static view as all frames, anywhere, and more than once: what a method may pass.
    Case(views="red", frames=8),
    Case(views="srd", frames=16, size=(13, 16)),
    Case(views="ssrd", frames=2, width=2),
    Case(views="es", frames=3),
    # In the layout of space_to_depth. A difference of frames is not shifted, and neither are pixels outside the view.
    Case(frames=16, blocks=True),
    Case(views="sd", frames=3, size=(17, 13), channels=16, blocks=True),
    Case("r3d_10", frames=8, size=(13, 18), blocks=True),
    # The convolutions normalise their inputs and compute the statistics of their outputs.
    Case(frames=16, size=(17, 13), width=16, fused="all"),
    Case("r2plus1d_18", "sd", frames=3, channels=8, fused="all"),
    Case("r2plus1d_18", "r", frames=1, size=(33, 17), batch=3, fused="all"),
    Case(views="rs", frames=7, size=(13, 17), statistics=KINETICS, fused="spatial"),
    Case("r2plus1d_18", frames=8, size=(13, 16), blocks=True, fused="temporal"),
    Case(views="ssrd", frames=2, width=2, fused="all"),
]
"""The steps that are compared with the oracle."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_torchvisions_on_all_views_at_once(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    ("name", "frames"), [*(("r2plus1d_10", t) for t in range(1, 10)), *(("r3d_10", t) for t in (2, 4, 5, 6, 9))]
)
def test_every_number_of_frames(name: str, frames: int) -> None:
    """The static view has 1, 3, 5 and 7 distinct frames after the convolutions in time, or as many as there are."""
    check(Case(name, "sd", frames=frames, size=(16, 18), width=1))


# ---------------------------------------------------------------- the oracle finds faults


def wrong_count(place: str) -> Callable[[Clips], Tensor]:
    """Return a method that counts one frame of clips with equal frames once too often, or once too little."""
    right = Clips.counts

    def counts(clips: Clips) -> Tensor:
        number = right(clips).clone()
        if place == "border" and clips.repeated:
            number[0] += 1
        if place == "middle" and clips.times > 1:
            number[clips.repeated] -= 1
        return number

    return counts


def border_from_the_middle(clips: Clips, copies: int, right: Callable[..., Tensor] = Clips.stretch) -> Tensor:
    """Return stretched frames, the first of which is a copy of the repeated one."""
    frames = right(clips, copies)
    middle = frames[:, :, clips.repeated : clips.repeated + 1]
    return torch.cat([middle, frames[:, :, 1:]], dim=2)


def biased_variance(
    norm: BatchNorm, mean: Tensor, variance: Tensor, count: int, right: Callable[..., None] = BatchNorm._update
) -> None:
    """Update the running variance with n instead of n - 1: n / (n - 1) of so many values is 1."""
    right(norm, mean, variance, 10**18)


def statistics_without_counts(*args: Any, right: Callable[..., Any] = convolution.convolve) -> convolution.Convolved:
    """Return a convolution whose statistics count each frame once."""
    return right(*args[:3])


def normalised_padding(
    x: Tensor,
    weight: Tensor,
    normalisation: convolution.Normalisation | None,
    repeated: int,
    times: int,
    right: Callable[..., Any] = convolution.convolve,
) -> convolution.Convolved:
    """Return a convolution that also normalises the zeros of its padding in time."""
    if normalisation is None or weight.shape[2] == 1:
        return right(x, weight, normalisation, repeated, times)
    padded = right(nn.functional.pad(x, (0, 0, 0, 0, 1, 1)), weight, normalisation).frames[:, :, 1:-1]
    return right(x, weight, normalisation, repeated, times)._replace(frames=padded)


def without_gradient(*args: Any, right: Callable[..., Any] = convolution.convolve) -> convolution.Convolved:
    """Return a convolution whose variance has no gradient."""
    result = right(*args)
    return result._replace(variance=result.variance.detach())


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (statistics_without_counts, "map 0"),
        (normalised_padding, "map 0"),
        (without_gradient, "gradient of stem.0.weight"),
    ],
)
def test_a_planted_fault_of_a_fused_convolution_is_found(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[..., Any], found: str
) -> None:
    monkeypatch.setattr(convolution, "convolve", planted)
    with pytest.raises(AssertionError, match=rf"^{found}: off by"):
        check(Case(frames=16, fused="all"))


def test_a_network_fuses_the_chosen_convolutions_of_stride_1_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those of the parameters. The channels inside a (2+1)D convolution are multiples of 16."""
    backbone = backbone_without_memory("r2plus1d_10", 64)
    found = {name: tuple(weight.shape[:2]) for name, weight in backbone.fusible().items()}
    assert found == {
        "stem.3": (64, 48),
        "layer1.0.conv1.0.0": (144, 64),
        "layer1.0.conv1.0.3": (64, 144),
        "layer1.0.conv2.0.0": (144, 64),
        "layer1.0.conv2.0.3": (64, 144),
        "layer2.0.conv2.0.0": (240, 128),
        "layer2.0.conv2.0.3": (128, 240),
        "layer3.0.conv2.0.0": (464, 256),
        "layer3.0.conv2.0.3": (256, 464),
        "layer4.0.conv2.0.0": (928, 512),
        "layer4.0.conv2.0.3": (512, 928),
    }
    assert not backbone_without_memory("r3d_18", 64).fusible()
    assert not backbone_without_memory("s3d", 64).fusible()
    calls: list[tuple[int, ...]] = []
    right = convolution.convolve

    def watched(x: Tensor, weight: Tensor, *others: Any) -> convolution.Convolved:
        calls.append(tuple(weight.shape))
        return right(x, weight, *others)

    monkeypatch.setattr(convolution, "convolve", watched)
    small = build_backbone("r2plus1d_10", 4)
    for name, weight in [*small.fusible().items(), ("", torch.empty(0))]:
        small.fuse([name])
        small(torch.zeros(2, 3, 4, 16, 16))
        assert calls == ([tuple(weight.shape)] if name else [])
        calls.clear()


@pytest.mark.parametrize(
    ("owner", "name", "planted", "found"),
    [
        (Clips, "counts", wrong_count("border"), "map 0"),
        (Clips, "counts", wrong_count("middle"), "map 0"),
        (Clips, "stretch", border_from_the_middle, "map 0"),
        (BatchNorm, "_update", biased_variance, "stem.1.running_var"),
    ],
    ids=["count of a border frame", "count of the middle frame", "border frame from the middle", "running variance"],
)
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, planted: Callable[..., Any], found: str
) -> None:
    check(Case(frames=16))
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError, match=rf"^{found}: off by"):
        check(Case(frames=16))


def test_swapped_channels_of_the_stems_layout_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = [1, 0, *range(2, 16)]
    monkeypatch.setitem(globals(), "space_to_depth", lambda view, real=space_to_depth: real(view)[:, swapped])
    with pytest.raises(AssertionError, match=r"^map 0: off by"):
        check(Case(frames=3, blocks=True))


def flop(view: Tensor) -> int:
    """Return the FLOP of a forward pass of one view of 16 frames."""
    backbone = backbone_without_memory("r2plus1d_10", 64)
    with FlopCounterMode(display=False) as counter:
        backbone.forward_views([view], 16)
    return counter.get_total_flops()


def test_equal_frames_of_the_static_view_are_computed_once() -> None:
    """Stem and first stage have 60 % of the FLOP. They compute 1 to 7 frames of 16."""
    whole, once = (flop(torch.empty(2, 3, frames, 112, 112, device="meta")) for frames in (16, 1))
    assert once <= 0.6 * whole


# ---------------------------------------------------------------- what else a step can be


@pytest.mark.parametrize("name", ["r2plus1d_10", "mc3_18"])
def test_the_key_encoders_passes_follow_the_batch_without_a_gradient(name: str) -> None:
    """Two passes in training mode, as a step has them. Parameters have no gradient, and running statistics follow."""
    case = Case(name, frames=9, size=(17, 16), statistics=KINETICS, channels=8)
    oracle, ours = case.networks()
    ours.requires_grad_(False)
    with torch.no_grad():
        for part in (replace(case, views="sd"), case):
            views = part.draw()
            found, expected = part.by_ours(ours, views), part.by_oracle(oracle, views)
            assert_equal(named(found), named(expected))
            assert not any(m.requires_grad for m in found)
    assert_equal(dict(ours.named_buffers()), dict(oracle.named_buffers()))
    assert ours.stem[1].num_batches_tracked == 19  # 17 and two passes


@pytest.mark.parametrize("name", ["r2plus1d_10", "r3d_10", "mc3_18"])
def test_finetuning_takes_one_view_with_the_gradient_of_its_pixels(name: str) -> None:
    case = Case(name, "r", frames=5, size=(23, 18), statistics=KINETICS, channels=16)
    oracle, ours = case.networks()
    ours_clip, oracle_clip = (case.draw()[0].requires_grad_() for _ in range(2))
    found = results(ours, lambda: [ours(ours_clip)])
    expected = results(oracle, lambda: case.by_oracle(oracle, [oracle_clip]))
    assert_equal(found | {"pixels": ours_clip.grad}, expected | {"pixels": oracle_clip.grad})


@pytest.mark.parametrize("differences", [False, True])
def test_a_frozen_backbone_takes_one_view(differences: bool) -> None:
    """Linear probe, embedding and retrieval use it so: in evaluation mode, also for a dynamic view."""
    case = Case("r2plus1d_10", "d" if differences else "r", frames=7, statistics=KINETICS, channels=8)
    oracle, ours = (network.eval().requires_grad_(False) for network in case.networks())
    (clip,) = case.draw()
    before = copy.deepcopy(ours.state_dict())
    (expected,) = case.by_oracle(oracle, [clip])
    assert_equal({"map": ours(clip, differences=differences)}, {"map": expected})
    with torch.inference_mode():
        assert_equal({"map": ours(clip, differences=differences)}, {"map": expected})
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["r2plus1d_10", "r3d_10"])
def test_evaluation_mode_has_a_gradient(name: str) -> None:
    case = Case(name, frames=9, size=(13, 18), channels=8)
    oracle, ours = (network.eval() for network in case.networks())
    views = case.draw()
    expected = results(oracle, lambda: case.by_oracle(oracle, views))
    assert_equal(results(ours, lambda: case.by_ours(ours, views)), expected)


def test_micro_batches_accumulate_gradients_and_statistics() -> None:
    case = Case(frames=8, size=(16, 18), channels=8)
    oracle, ours = case.networks()
    for seed in (0, 1):
        views = case.draw(seed)
        expected = results(oracle, lambda views=views: case.by_oracle(oracle, views))
        found = results(ours, lambda views=views: case.by_ours(ours, views))
    assert_equal(found, expected)


def test_a_copy_of_a_backbone_is_a_network_of_its_own() -> None:
    """The key encoder starts as a copy. Here the original has already taken a step."""
    case = Case(frames=8)
    _, ours = case.networks()
    views = case.draw()
    results(ours, lambda: case.by_ours(ours, views))
    ours.zero_grad()
    twin = copy.deepcopy(ours)
    state = copy.deepcopy(ours.state_dict())
    again = results(twin, lambda: case.by_ours(twin, views))
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
    expected = results(ours, lambda: case.by_ours(ours, views))
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("views", "frames", "batch"), [("r", 8, 1), ("s", 8, 1), ("s", 1, 1)])
def test_one_value_per_channel_fails_as_in_torch(views: str, frames: int, batch: int) -> None:
    case = Case(views=views, frames=frames, batch=batch, size=(16, 16))
    oracle, ours = case.networks()
    for forward in (lambda: case.by_oracle(oracle, case.draw()), lambda: case.by_ours(ours, case.draw())):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            forward()


class Custom(Backbone):
    """A backbone as docs/extend.md shows it: it defines the feature map of clips and nothing else."""

    def __init__(self) -> None:
        super().__init__(feature_dim=6)
        self.conv = nn.Conv3d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(6)

    def feature_map(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def test_a_custom_backbone_gets_all_views_at_once() -> None:
    torch.manual_seed(0)
    ours = Custom().double()
    ours.statistics = KINETICS
    oracle = nn.Sequential(ours.conv, ours.norm, nn.ReLU())
    oracle = copy.deepcopy(oracle)
    case = Case(frames=5, size=(9, 8), statistics=KINETICS)
    views = case.draw()
    expected = results(oracle, lambda: case.by_oracle(oracle, views))
    found = results(ours, lambda: case.by_ours(ours, views))
    assert next(iter(found.values())).shape == (2, 6, 3, 5, 4)
    assert_equal(dict(zip(expected, found.values(), strict=True)), expected)


def test_s3d_equals_torchvisions_on_all_views_at_once() -> None:
    torch.manual_seed(0)
    oracle, ours = video.s3d().features.double(), build_backbone("s3d").double()
    ours.load_state_dict({f"features.{name}": tensor for name, tensor in oracle.state_dict().items()})
    case = Case("s3d", frames=5, size=(17, 33), batch=1)
    views = case.draw()
    found, expected = case.by_ours(ours, views), case.by_oracle(oracle, views)
    assert_equal(named(found), named(expected))
    buffers = {name.removeprefix("features."): buffer for name, buffer in ours.named_buffers()}
    assert_equal(buffers, dict(oracle.named_buffers()))


# ---------------------------------------------------------------- a step of a method


def method_step(settings: dict[str, Any], reference: bool, fused: bool = False) -> dict[str, Tensor]:
    """Return the outputs, gradients and buffers of a DCLR or MoCo step, with backbones in float64.

    Args:
        reference: replace both backbones by oracles, and write the static view for all frames.
        fused: `dclr.kernels.convolution` computes the convolutions that it can.
    """
    torch.manual_seed(0)
    method = MethodConfig(queue_length=16, embedding_dim=32, mined_positives=2, **settings)
    network = DCLR(ModelConfig(backbone="r2plus1d_10", width=4), method)
    network.enqueued.fill_(16)  # a full queue, so that positives are mined
    step = Case(frames=8, size=(32, 32), batch=3, statistics=KINETICS)
    oracles = []
    for encoder in (network.query, network.key):
        encoder.backbone.double().statistics = KINETICS
        encoder.backbone.pad_channels(8)
        encoder.backbone.fuse(encoder.backbone.fusible() if fused else ())
        oracles.append(Oracle("r2plus1d_10", 4).double())
        oracles[-1].load_state_dict(encoder.backbone.state_dict())
        if reference:

            def forward_views(
                views: Sequence[Tensor], frames: int, differences: bool = False, oracle: Oracle = oracles[-1]
            ) -> list[Tensor]:
                return replace(step, frames=frames, views="d" if differences else "r").by_oracle(oracle, views)

            encoder.backbone.forward_views = forward_views
    oracles[1].requires_grad_(False)
    clips = []
    for seed in (0, 1):
        rgb, static, dynamic = step.draw(seed)
        static = static.expand(-1, -1, 8, -1, -1)
        clips.append(Views(rgb, static.contiguous() if reference else static, dynamic))
    output = network(*clips, 0)
    output.loss.backward()
    query, key = oracles if reference else (network.query.backbone, network.key.backbone)
    results = {name: value for name, value in output._asdict().items() if isinstance(value, Tensor)}
    results |= {f"query.{name}": p.grad for name, p in query.named_parameters()}
    results |= {f"heads.{name}": p.grad for name, p in network.query.heads.named_parameters()}
    results |= {f"query.{name}": buffer for name, buffer in query.named_buffers()}
    return results | {f"key.{name}": buffer for name, buffer in key.named_buffers()} | {"queue": network.queue}


@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({"alignment_weight": 1.0}, False),
        ({"static_pairs": False}, False),
        ({"dynamic_pairs": False}, False),
        ({"method": "moco"}, False),
        ({"alignment_weight": 1.0}, True),
        ({"method": "moco"}, True),
    ],
)
def test_a_step_of_a_method_equals_that_with_torchvisions_backbones(settings: dict[str, Any], fused: bool) -> None:
    """Pooling and heads compute in float32. So 1e-5 of the largest value is enough, and the oracles add nothing."""
    expected, found = method_step(settings, reference=True), method_step(settings, reference=False, fused=fused)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error, largest = (found[name].detach() - tensor.detach()).abs().max(), tensor.abs().max()
        assert error <= 1e-5 * largest, f"{name}: off by {error / largest:.1e} of the largest value"


def test_twenty_steps_with_fused_convolutions_are_those_without() -> None:
    """Training amplifies a rounding error about a million times in twenty steps, so 1e-7 of a loss is enough."""
    case, losses = Case(views="rs", frames=3), []
    views = case.draw()
    for fused in (False, True):
        _, network = case.networks()
        network.fuse(network.fusible() if fused else ())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        for _ in range(20):
            optimizer.zero_grad()
            pooled = torch.stack([m.mean((2, 3, 4)) for m in case.by_ours(network, views)])
            loss = nn.functional.cross_entropy(pooled.sum(0), torch.arange(case.batch))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[19] < 0.5 * losses[0]
    assert losses[20:] == pytest.approx(losses[:20], rel=1e-7)


# ---------------------------------------------------------------- other precisions


class Round(torch.autograd.Function):
    """Round float64 values to a precision, and their gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).double(), None


def rounds(oracle: Oracle, dtype: torch.dtype) -> Oracle:
    """Let the oracle round the weights and results of convolutions, and the results of BatchNorm, to a precision.

    torchvision's modules under autocast are no reference: on some CPUs torch 2.11 gives wrong gradients for the weights
    of small 3-D convolutions in bfloat16.
    """
    for module in oracle.modules():
        if isinstance(module, nn.Conv3d):
            weight, own = module.weight, module._conv_forward
            module.forward = lambda x, weight=weight, own=own: own(x, Round.apply(weight, dtype), None)
        if isinstance(module, nn.Conv3d | nn.BatchNorm3d):
            module.register_forward_hook(lambda module, given, result: Round.apply(result, dtype))
    return oracle


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error of each kind of result. Each is the root mean square over all values of the kind."""
    kinds: dict[str, list[str]] = {}
    for name in exact:
        kinds.setdefault(name.split()[0] if " " in name else name.rpartition(".")[2], []).append(name)
    error = {}
    for kind, names in kinds.items():
        off = sum((found[name].double() - exact[name].double()).square().sum() for name in names)
        error[kind] = float((off / sum(exact[name].double().square().sum() for name in names)).sqrt())
    return error


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        (torch.float32, Case(frames=9, size=(32, 24), width=8, channels=8)),
        (torch.float32, Case("r3d_10", "rs", size=(32, 23), width=8)),
        (torch.float32, Case(views="r", size=(32, 32), width=8, channels=8, statistics=KINETICS)),
        (torch.bfloat16, Case(frames=9, size=(32, 24), width=8, channels=8)),
        (torch.bfloat16, Case(views="sd", frames=9, size=(23, 32), width=8, channels=16)),
        (torch.bfloat16, Case(views="r", size=(32, 32), width=8, channels=8, statistics=KINETICS)),
        (torch.bfloat16, Case(frames=9, size=(32, 24), width=8, fused="all")),
    ],
    ids=str,
)
def test_lower_precisions_are_as_exact_as_rounding_allows(dtype: torch.dtype, case: Case) -> None:
    """The error, compared with float64, is close to that of a float64 network that rounds every result.

    A fixed limit would not be justified, because rounding errors grow through a network in training. In float32,
    convolutions also round their sums. In bfloat16 they sum in float32, so a factor of 2 is enough.
    """
    exact, rounded = case.networks()[0], rounds(case.networks()[0], dtype)
    ours = case.networks()[1].float()
    views = case.draw(dtype=dtype)
    wide = [view.double() for view in views]
    truth = results(exact, lambda: case.by_oracle(exact, wide))
    limits = errors(results(rounded, lambda: case.by_oracle(rounded, wide)), truth)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        maps = case.by_ours(ours, views)
    assert {m.dtype for m in maps} == {dtype}
    for kind, error in errors(results(ours, lambda: maps), truth).items():
        limit = (2 if dtype == torch.bfloat16 else 8) * limits[kind] + torch.finfo(torch.float32).eps
        if kind == "gradient" and dtype == torch.float32:
            limit += 0.02  # The error of one value can switch one ReLU, which changes gradients by up to 5e-3.
        assert error <= limit, f"{kind}: {error:.1e}, limit {limit:.1e}"


def test_fused_convolutions_in_triton_are_as_exact_as_rounding_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes four convolutions of two views: those in layer3 and layer4, with multiples of 16 channels."""
    if not backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    monkeypatch.setattr(backend, "_backend", "triton")
    in_triton = pytest.importorskip("dclr.kernels.convolution_triton")
    launches, launch = [], in_triton.forward_launch
    monkeypatch.setattr(in_triton, "forward_launch", lambda *given: launches.append(given) or launch(*given))
    case = Case(views="rs", frames=3, size=(32, 32), fused="all")
    test_lower_precisions_are_as_exact_as_rounding_allows(torch.bfloat16, case)
    assert len(launches) == 2 * 4


# ---------------------------------------------------------------- sizes


class LargestTensor(TorchDispatchMode):
    """Note the largest number of elements of all tensors that operators return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("name", ["r2plus1d_10", "r2plus1d_18"])
def test_no_tensor_of_a_step_of_128_clips_has_2_to_the_31_elements(name: str) -> None:
    """Libraries index with 32 bits up to there, and use slow kernels, or fail, above."""
    backbone = backbone_without_memory(name, 64)
    backbone.pad_channels(16)
    clip, still = (torch.empty(128, 3, frames, 112, 112, device="meta") for frames in (16, 1))
    with LargestTensor() as seen:
        maps = backbone.forward_views([clip, still, clip], 16, differences=True)
        forward = seen.elements
        torch.autograd.backward([m.sum() for m in maps])
    assert all(p.grad is not None for p in backbone.parameters())
    assert 128 * 16 * 144 * 56 * 56 <= forward <= seen.elements < 2**31


# ---------------------------------------------------------------- compiled


@pytest.mark.slow
def test_a_compiled_step_equals_torchvisions() -> None:
    """The stem and layer2 have every kind of normalisation: with ReLU, without, and with a shortcut.

    The backend "aot_eager" runs the compiled form of BatchNorm operator by operator. The maps must be larger than 1 in
    all dimensions: the stride of a dimension of size 1 has no meaning, but torch 2.11 chooses the memory format of a
    convolution's gradients by it, and the traced strides can be others than those at run time.
    """
    case = Case(views="rs", frames=9, size=(17, 19), channels=8)
    torch.compiler.reset()
    oracle, ours = case.networks()
    for network in (oracle, ours):
        network.layer1 = network.layer3 = network.layer4 = nn.Sequential()
    compile_backbone(ours, backend="aot_eager")
    views = case.draw()
    expected = results(oracle, lambda: case.by_oracle(oracle, views))
    assert_equal(results(ours, lambda: case.by_ours(ours, views)), expected)
    with torch.no_grad():
        assert_equal(named(case.by_ours(ours.eval(), views)), named(case.by_oracle(oracle.eval(), views)))


class Norms(nn.Module):
    """Every kind of normalisation: with ReLU, without, and with a shortcut."""

    def __init__(self, norm: type[nn.BatchNorm3d]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(norm(3) for _ in range(3)).double()
        for parameter in self.parameters():
            parameter.data.uniform_(0.5, 1.5)

    def by_torch(self, frames: Tensor) -> Tensor:
        inner = self.layers[0](frames).relu()
        return (self.layers[2](inner) + self.layers[1](inner)).relu()

    def by_ours(self, views: list[Clips]) -> list[Clips]:
        first, second, third = self.layers
        inner = first.normalise(views)
        shortcuts = [view.frames for view in second.normalise(inner, relu=False)]
        return third.normalise(inner, shortcuts=shortcuts)


@pytest.mark.slow
def test_generated_code_normalises_views_as_torchs_layer_does() -> None:
    """The C++ code of batch normalisation for two views: one has 6 frames, of the other 4 are equal."""
    torch.compiler.reset()
    reference, ours = Norms(nn.BatchNorm3d), Norms(BatchNorm)
    rng = torch.Generator().manual_seed(0)
    views = [Clips(torch.randn(2, 3, 6, 4, 5, generator=rng, dtype=torch.float64))]
    views.append(Clips(torch.randn(2, 3, 3, 4, 5, generator=rng, dtype=torch.float64), repeated=1, times=4))
    whole = torch.cat([view.expand() for view in views])

    @torch.compile(dynamic=False, fullgraph=True, options=INDUCTOR_OPTIONS)
    def compiled(*frames: Tensor) -> list[Tensor]:
        given = [view._replace(frames=x) for view, x in zip(views, frames, strict=True)]
        return [view.expand() for view in ours.by_ours(given)]

    found = results(ours, lambda: compiled(*(view.frames for view in views)))
    assert_equal(found, results(reference, lambda: list(reference.by_torch(whole).chunk(2))))
