"""dclr/models: backbones against torchvision's networks, heads against numbers by hand, every kind of weight file."""

import argparse
import gzip
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.video import resnet

from dclr.errors import UserError
from dclr.models import (
    BACKBONES,
    IMAGENET,
    KINETICS,
    Classifier,
    ProjectionHead,
    activation_map,
    build_backbone,
    load_backbone,
    load_classifier,
    load_pretrained,
    pool,
    save_backbone,
    save_classifier,
    video_resnet,
)
from dclr.models.batch_norm import BatchNorm


def authors_network(classes: int = 400) -> nn.Module:
    """Build the network that the DCLR authors call r2plus1d_18 from torchvision's blocks."""
    return resnet.VideoResNet(
        resnet.BasicBlock, [resnet.Conv2Plus1D] * 4, [1, 1, 1, 1], resnet.R2Plus1dStem, num_classes=classes
    )


# our name -> the same network with a classifier, built by torchvision
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "r2plus1d_10": authors_network,
    "r2plus1d_18": video.r2plus1d_18,
    "r3d_18": video.r3d_18,
    "mc3_18": video.mc3_18,
    "s3d": video.s3d,
}


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """Set batch normalisation to random values, so that the initial ones do not hide wrong parameters."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                tensor.data.normal_(0, 0.2, generator=generator)
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.fill_(17)
    return network


def without_fc(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in network.state_dict().items() if not name.startswith(("fc.", "classifier."))
    }


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- backbones ----


@pytest.mark.parametrize("name", [name for name in TORCHVISION if name != "s3d"])
def test_backbone_is_torchvisions(name: str) -> None:
    theirs = randomized(TORCHVISION[name]()).eval()
    ours = build_backbone(name).eval()
    ours.load_state_dict(without_fc(theirs), strict=True)

    clip = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = ours(clip)
        assert features.shape == (2, 512, 8 if name == "mc3_18" else 1, 2, 2)
        classifier = theirs.get_submodule("fc")
        torch.testing.assert_close(classifier(pool(features)), theirs(clip))


def test_s3d_is_torchvisions_in_evaluation_and_training() -> None:
    """Features, and after a step's forward pass the running statistics, which follow torchvision's momentum of 0.001.

    In float64 a rounding error cannot hide a wrong eps.
    """
    theirs = randomized(video.s3d()).double().eval()
    ours = build_backbone("s3d").double().eval()
    assert ours.feature_dim == 1024
    ours.load_state_dict(without_fc(theirs), strict=True)
    clip = torch.randn(2, 3, 9, 40, 49, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs.features(clip))
        torch.testing.assert_close(ours.train()(clip), theirs.train().features(clip))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize(("frames", "pixels"), [(5, 17), (4, 17), (5, 16)])
def test_s3d_refuses_clips_exactly_if_torchvision_fails(frames: int, pixels: int) -> None:
    clip = torch.zeros(1, 3, frames, pixels, 64)
    ours, theirs = build_backbone("s3d").eval(), video.s3d().eval().features
    if (frames, pixels) == (5, 17):
        assert ours(clip).shape == (1, 1024, 1, 1, 2)
        return
    with pytest.raises(RuntimeError, match="Output size is too small"):
        theirs(clip)
    with pytest.raises(UserError, match=f"at least 5 frames of 17 x 17 pixels, not {frames} of {pixels} x 64: raise"):
        ours(clip)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("r2plus1d_10", 12_487_005),  # 12.7 M with a classifier of 400 classes
        ("r2plus1d_18", 31_505_325 - 513 * 400),  # torchvision's published counts without the classifier
        ("r3d_18", 33_371_472 - 513 * 400),
        ("mc3_18", 11_695_440 - 513 * 400),
        ("s3d", 8_320_048 - 1025 * 400),
    ],
)
def test_parameter_count(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in build_backbone(name).parameters()) == parameters


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "s3d"])
def test_narrow_backbone(name: str) -> None:
    backbone = build_backbone(name, width=8)
    assert (backbone.name, backbone.width, backbone.feature_dim) == (name, 8, 64)
    features = backbone(torch.randn(2, 3, 16, 48, 32))
    assert features.shape == (2, 64, 16 if name == "mc3_18" else 2, 3, 2)
    assert features.min() >= 0
    assert list(backbone.state_dict()) == list(build_backbone(name).state_dict())
    first = backbone.stem[0]
    assert isinstance(first, nn.Conv3d)
    assert first.out_channels == (5 if name.startswith("r2plus1d") else 8)  # an eighth of torchvision's 45 or 64
    blocks = 1 if name.endswith("_10") else 2
    assert [len(getattr(backbone, f"layer{i}")) for i in range(1, 5)] == [blocks] * 4


def test_batch_normalisation_on_a_cpu_is_as_exact_as_float32_allows() -> None:
    """Result, gradients and running statistics in channels_last_3d against float64.

    Every value is rounded once, so it is off by at most half a unit in the last place of the largest value, 6e-8 of it.
    torch's own kernel sums in float32 and is off by 1e-5 to 6e-5 here (torch 2.11).
    """
    rng = torch.Generator().manual_seed(0)
    clip, upstream = (torch.randn(6, 16, 16, 56, 56, generator=rng) * 0.7 + 0.3 for _ in range(2))
    scale, shift = torch.rand(16, generator=rng) + 0.5, torch.randn(16, generator=rng)
    found = []
    for norm, dtype in ((BatchNorm(16), torch.float32), (nn.BatchNorm3d(16), torch.float64)):
        with torch.no_grad():
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        norm.to(dtype)
        x = clip.to(dtype, memory_format=torch.channels_last_3d).requires_grad_()
        y = norm(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        y.backward(upstream.to(dtype))
        assert norm.num_batches_tracked == 1
        found.append((y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    for ours, exact in zip(*found, strict=True):
        assert (ours.double() - exact).abs().max() <= 1.2e-7 * exact.abs().max()


def gradients(network: nn.Module, clip: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss that depends on every feature, in training mode."""
    features = network.train()(clip)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=features.dtype)
    (features * weight).sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None} | {"features": features}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9 * b[name].abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("name", "multiple"),
    [("r2plus1d_10", 1), ("r2plus1d_10", 8), ("r2plus1d_10", 16), ("r2plus1d_18", 1), ("r2plus1d_18", 16)],
)
def test_gradients_and_statistics_are_torchvisions_also_with_padded_channels(name: str, multiple: int) -> None:
    """In float64 a rounding error cannot hide a wrong channel. torchvision convolves in 3-D, our networks in 2-D."""
    theirs = randomized(TORCHVISION[name]()).double()
    # Identities, so that it returns features.
    theirs.avgpool, theirs.fc, theirs.flatten = nn.Identity(), nn.Identity(), nn.Identity()
    ours = build_backbone(name).double()
    ours.load_state_dict(without_fc(theirs), strict=True)
    ours.pad_channels(multiple)
    theirs.forward = lambda x: nn.Sequential(*list(theirs.children())[:5])(x)  # stem and stages, without flattening
    clip = torch.randn(2, 3, 8, 24, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(gradients(ours, clip), gradients(theirs, clip))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    with torch.no_grad():  # evaluation mode uses the running statistics
        torch.testing.assert_close(ours.eval()(clip), theirs.eval()(clip))


@pytest.mark.parametrize("layer", ["stem.0", "layer4.0.conv1.0", "layer4.0.conv2.0"])
def test_3_d_convolutions_of_two_frames_have_the_right_gradient_in_bfloat16(layer: str) -> None:
    """torch 2.11 computes a wrong weight gradient on some CPUs. Bfloat16 rounds to 4e-3."""
    conv = build_backbone("r3d_10", 8).get_submodule(layer)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, conv.weight.shape[1], 2, 8, 8, generator=rng).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        conv.zero_grad()
        conv.double() if dtype == torch.float64 else conv.bfloat16()
        y = video_resnet._in_three(x.to(dtype), conv.weight, conv)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        y.backward(upstream.to(dtype))
        found.append(conv.weight.grad.double())
    assert (found[0] - found[1]).norm() <= 1e-2 * found[1].norm()


@pytest.mark.parametrize("width", [4, 64])
def test_padded_channels_stay_zero_through_training_with_weight_decay(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Tensor]] = []
    convolve = video_resnet.in_time

    def watched(x: Tensor, weight: Tensor, conv: nn.Conv3d) -> Tensor:
        seen.append((conv.in_channels, x.detach().clone()))
        return convolve(x, weight, conv)

    monkeypatch.setattr(video_resnet, "in_time", watched)
    network = randomized(build_backbone("r2plus1d_10", width))
    before = {name: tensor.shape for name, tensor in network.state_dict().items()}
    network.pad_channels(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        gradients(network, torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(step)))
        optimizer.step()
    assert len(seen) == 3 * 9
    assert {x.shape[1] % 8 for _, x in seen} == {0}
    assert any(x.shape[1] > own for own, x in seen)
    assert not any(x[:, own:].any() for own, x in seen)
    assert all(x[:, :own].any() for own, x in seen)
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == before


def test_initialisation() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("r2plus1d_10")
    for module in backbone.modules():
        if isinstance(module, nn.Conv3d):
            assert module.bias is None
            kernel = module.kernel_size[0] * module.kernel_size[1] * module.kernel_size[2]
            expected = (2 / (module.out_channels * kernel)) ** 0.5
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(expected, rel=4 / (2 * n) ** 0.5)
        elif isinstance(module, nn.BatchNorm3d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_unknown_backbone() -> None:
    with pytest.raises(UserError, match="'resnet50': choose one of r2plus1d_10, r2plus1d_18, r3d_10, r3d_18, mc3_18"):
        build_backbone("resnet50")
    with pytest.raises(UserError, match="width must be 1 to 1024, not 0"):
        build_backbone("r3d_18", width=0)
    with pytest.raises(UserError, match=r"^--width is 16, but s3d has only the width 64: pass --width 64$"):
        build_backbone("s3d", width=16)


# ---- heads ----


def test_activation_map_and_pool_by_hand() -> None:
    # (B=1, C=2, T=1, H=1, W=2)
    features = torch.tensor([[[[[1.0, 3.0]]], [[[5.0, 7.0]]]]])
    assert activation_map(features).tolist() == [[[[[6.0, 10.0]]]]]
    assert pool(features).tolist() == [[2.0, 6.0]]
    # A = (6, 10), A / mean(A) = (0.75, 1.25): channel 0: (0.75 * 1 + 1.25 * 3) / 2 = 2.25, channel 1: (3.75 + 8.75) / 2
    assert pool(features, activation_map(features)).tolist() == [[2.25, 6.25]]
    # Only the map's relative values matter.
    assert pool(features, 100 * activation_map(features)).tolist() == [[2.25, 6.25]]


def test_pool_divides_each_clip_by_its_own_mean() -> None:
    features = torch.rand(3, 4, 2, 3, 3)
    maps = torch.rand(3, 1, 2, 3, 3) * torch.tensor([1.0, 10.0, 1000.0]).view(3, 1, 1, 1, 1)
    expected = torch.stack([(f * a / a.mean()).mean(dim=(1, 2, 3)) for f, a in zip(features, maps, strict=True)])
    torch.testing.assert_close(pool(features, maps), expected)


def test_pool_of_an_empty_map_is_zero_and_has_a_finite_gradient() -> None:
    features = torch.rand(2, 4, 1, 2, 2, requires_grad=True)
    maps = torch.zeros(2, 1, 1, 2, 2, requires_grad=True)
    pooled = pool(features, maps)
    assert (pooled == 0).all()
    pooled.sum().backward()
    assert features.grad is not None
    assert maps.grad is not None
    assert features.grad.isfinite().all()
    assert maps.grad.isfinite().all()


def test_pool_and_map_are_float32_for_bfloat16_features() -> None:
    features = torch.rand(2, 64, 2, 3, 3).bfloat16()
    wide = features.float()
    torch.testing.assert_close(activation_map(features), activation_map(wide))
    torch.testing.assert_close(pool(features), pool(wide))
    torch.testing.assert_close(pool(features, activation_map(features)), pool(wide, activation_map(wide)))


def test_pool_refuses_a_map_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match="is not the activation map"):
        pool(torch.rand(2, 4, 1, 2, 2), torch.rand(1, 1, 1, 2, 2))


def test_projection_head() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(64, 32)
    x = torch.randn(5, 64)
    first, second = head[0], head[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    expected = hidden @ second.weight.T + second.bias
    torch.testing.assert_close(head(x), expected / expected.norm(dim=1, keepdim=True))
    assert head(x).shape == (5, 32)
    assert ProjectionHead(64)(x).shape == (5, 128)

    assert first.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert second.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (first.bias == 0).all()
    assert (second.bias == 0).all()


def test_projection_head_has_length_one_in_float32_under_autocast() -> None:
    head = ProjectionHead(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(torch.randn(5, 64))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


# ---- weights ----


def authors_checkpoint(network: nn.Module) -> dict:
    """Return a checkpoint with the layout of the authors' checkpoint_*.pth.tar.

    The layout has both encoders with five heads each, the queues and the optimizer.
    """
    state = {}
    for encoder, scale in (("encoder_q", 1), ("encoder_k", 0)):
        for name, tensor in without_fc(network).items():
            state[f"module.{encoder}.{name}"] = tensor * scale
        for head in ("fvv", "fvs", "fvd", "fsv", "fdv"):
            for layer in ("0.weight", "0.bias", "2.weight", "2.bias"):
                state[f"module.{encoder}.{head}.{layer}"] = torch.zeros(4)
    state |= {"module.queue_vv": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    return {"epoch": 200, "arch": "r2plus1d_18", "state_dict": state, "optimizer": optimizer.state_dict()}


def test_save_and_load(tmp_path: Path) -> None:
    saved = build_backbone("r2plus1d_10", width=8)
    randomized(saved)
    path = tmp_path / "run" / "backbone.safetensors"
    save_backbone(saved, path)
    save_backbone(saved, path)  # overwrites the file
    assert [file.name for file in path.parent.iterdir()] == ["backbone.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "dclr",
            "backbone": "r2plus1d_10",
            "width": "8",
            "mean": "[0.485, 0.456, 0.406]",
            "std": "[0.229, 0.224, 0.225]",
        }
        assert sorted(file.keys()) == sorted(authors_network().state_dict().keys() - {"fc.weight", "fc.bias"})

    for given in (path, path.parent):  # the file, or the folder of its run
        loaded = build_backbone("r2plus1d_10", width=8)
        assert load_backbone(given, loaded) == f"{path}: r2plus1d_10 (width 8), written by dclr"
        assert_equal_states(loaded.state_dict(), saved.state_dict())


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "backbone.safetensors"
    save_backbone(build_backbone("r3d_10", width=4), path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dclr.files.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_backbone(build_backbone("r3d_10", width=4), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", TORCHVISION)
def test_load_torchvisions_weights(name: str, tmp_path: Path) -> None:
    theirs = randomized(TORCHVISION[name]())
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    backbone = build_backbone(name)
    line = load_backbone(tmp_path / "weights.pth", backbone)
    published = name != "r2plus1d_10"
    kind = "torchvision's weights (mean and standard deviation of Kinetics)" if published else "a state dict"
    assert line == f"{tmp_path / 'weights.pth'}: {name} (width 64), {kind}"
    assert backbone.statistics == (KINETICS if published else IMAGENET)
    assert_equal_states(backbone.state_dict(), without_fc(theirs))


def test_load_the_authors_checkpoint(tmp_path: Path) -> None:
    theirs = randomized(authors_network(128))
    path = tmp_path / "checkpoint_0199.pth.tar"
    torch.save(authors_checkpoint(theirs), path)
    backbone = build_backbone("r2plus1d_10")
    line = "r2plus1d_10 (width 64), the query encoder of a MoCo checkpoint"
    prefix = "state_dict/module.encoder_q."
    assert load_backbone(path, backbone) == f"{path}: {line} (names without the prefix {prefix})"
    assert_equal_states(backbone.state_dict(), without_fc(theirs))


def test_unusual_heads_are_not_used_and_named(tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=4))
    state = {f"module.module.encoder_q.{name}": tensor for name, tensor in theirs.state_dict().items()}
    heads = {"fc.0.weight": 32, "fc_p.0.weight": 32, "fc_p.0.bias": 32, "fc_n.weight": 32}
    state |= {f"module.module.encoder_q.{name}": torch.zeros(size) for name, size in heads.items()}
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pth.tar")
    backbone = build_backbone("r3d_10", width=4)
    line = load_backbone(tmp_path / "checkpoint.pth.tar", backbone)
    assert line.endswith("module.module.encoder_q.); not used: fc_n (1 tensor), fc_p (2 tensors)")
    assert load_pretrained(tmp_path / "checkpoint.pth.tar").loaded.startswith(line)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())

    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({**wrapped, "_orig_mod.fc_p.weight": torch.zeros(32)}, tmp_path / "wrapped.pth")
    assert "; not used: fc_p (1 tensor)" in load_backbone(tmp_path / "wrapped.pth", build_backbone("r3d_10", width=4))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_a_nested_state_dict(prefix: str, tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=8))
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state |= {prefix + "fc.weight": torch.zeros(3, 64), prefix + "fc.bias": torch.zeros(3)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "nested.pt")
    backbone = build_backbone("r3d_10", width=8)
    load_backbone(tmp_path / "nested.pt", backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())


def test_load_foreign_safetensors_and_old_files_without_step_counters(tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=8))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "num_batches_tracked" not in name}
    save_file({**state, "fc.weight": torch.zeros(3, 64)}, tmp_path / "foreign.safetensors")
    backbone = build_backbone("r3d_10", width=8)
    load_backbone(tmp_path / "foreign.safetensors", backbone)
    for name, tensor in state.items():
        assert torch.equal(backbone.state_dict()[name], tensor)


def refused(path: Path, message: str, name: str = "r3d_10", width: int = 8) -> None:
    """Check that load_backbone raises a one-line UserError that names the path, and does not change the backbone."""
    backbone = build_backbone(name, width)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(path, backbone)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_equal_states(backbone.state_dict(), before)


def test_another_backbone_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_backbone(build_backbone("mc3_18", width=8), run / "backbone.safetensors")
    refused(run, r"holds mc3_18 \(width 8\), but --backbone is r3d_10: pass --backbone mc3_18")
    save_backbone(build_backbone("r3d_10", width=16), run / "backbone.safetensors")
    refused(run, r"holds r3d_10 \(width 16\), but --width is 8: pass --width 16")

    torch.save(video.r2plus1d_18().state_dict(), tmp_path / "r2plus1d_18-91a641e6.pth")
    refused(
        tmp_path / "r2plus1d_18-91a641e6.pth",
        r"holds r2plus1d_18 \(width 64\), but --backbone is r2plus1d_10: pass --backbone r2plus1d_18",
        name="r2plus1d_10",
        width=64,
    )


def test_weights_of_no_known_network(tmp_path: Path) -> None:
    state = build_backbone("r3d_10", width=8).state_dict()
    path = tmp_path / "weights.pth"

    torch.save({name: t for name, t in state.items() if name != "layer2.0.conv1.0.weight"}, path)
    refused(path, r"does not hold r3d_10 \(width 8\): it lacks layer2.0.conv1.0.weight$")
    torch.save({**state, "layer5.weight": torch.zeros(1)}, path)
    refused(path, "it has an unknown layer5.weight$")
    torch.save({**state, "layer4.0.conv1.1.bias": torch.zeros(3)}, path)
    refused(path, r"it has layer4.0.conv1.1.bias of shape \(3,\), not \(64,\)$")
    torch.save({"a": torch.zeros(1)}, path)
    refused(path, r"it lacks stem.0.weight \(and \d+ more differences\)")

    # In files that dclr wrote no parameter is ignored, so a classifier in one is an error.
    ours = tmp_path / "backbone.safetensors"
    save_file({**state, "fc.bias": torch.zeros(3)}, ours, {"format": "dclr", "backbone": "r3d_10", "width": "8"})
    refused(ours, "it has an unknown fc.bias")


def test_missing_files_and_files_without_weights(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.pth", "no such file")
    refused(tmp_path, "holds no backbone.safetensors, classifier.safetensors, model.safetensors or checkpoint: give")

    state = build_backbone("r3d_10", width=8).state_dict()
    torch.save(state, tmp_path / "torn.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "torn.pth").read_bytes()[:5000])
    refused(tmp_path / "torn.pth", "cannot be read by torch.load")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", "is empty")
    (tmp_path / "text.pth").write_text("not weights")
    refused(tmp_path / "text.pth", "is a text file, not weights: it begins with 'not weights'")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    refused(tmp_path / "torn.safetensors", "cannot be read as safetensors")

    for content in ([torch.zeros(1)], {"state_dict": 3}, {"epoch": 3}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "other.pth")
        refused(tmp_path / "other.pth", "holds no state dict")


OTHER_FILES = {
    "page.pth": (b"\n<!DOCTYPE html>\n<html lang='en'><head>", "is an HTML page, not weights: the download failed"),
    "old-page.pth": (b"<HTML><BODY>404</BODY></HTML>", "is an HTML page"),
    "page.safetensors": (b"<!-- saved --><html>", "is an HTML page"),
    "error.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is an XML document"),
    "error.json.pth": (b'{"error": "Repository not found"}', "is JSON text"),
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        "is a Git LFS pointer, not weights: run git lfs pull",
    ),
    "utf-16.pth": ("Zugriff verweigert".encode("utf-16"), "is a text file"),
    "text.pth": ("Fehler: Datei nicht gefunden, \u00fc".encode(), "is a text file"),
    "packed.pth": (gzip.compress(b"weights"), "is compressed by gzip: unpack it"),
    "packed.pth.tar": (tarfile.TarInfo("weights.pth").tobuf(), "is a tar archive: unpack it"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
    "array.npy": (b"\x93NUMPY\x01\x00" + bytes(100), "is a numpy array"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_of_another_kind_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    content, message = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path / name)


def test_a_zip_archive_of_something_else_is_called_that(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bundle.pth", "w") as archive:
        archive.writestr("weights/r3d.pth", b"")
    refused(tmp_path / "bundle.pth", r"is a zip archive that holds weights/r3d\.pth, not weights")
    torch.jit.trace(nn.Linear(1, 1), torch.zeros(1)).save(str(tmp_path / "program.pt"))
    refused(tmp_path / "program.pt", "is a TorchScript program, not weights")


def test_the_content_decides_how_a_file_of_weights_is_read(tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=8))
    torch.save(theirs.state_dict(), tmp_path / "torch.safetensors")
    save_backbone(theirs, tmp_path / "safetensors.pth")
    for name in ("torch.safetensors", "safetensors.pth"):
        backbone = build_backbone("r3d_10", width=8)
        load_backbone(tmp_path / name, backbone)
        assert_equal_states(backbone.state_dict(), theirs.state_dict())


PREFIXES = (
    "backbone.", "model.", "module.", "module.module.", "_orig_mod.", "encoder.", "encoder_q.", "encoder_q.0.", "net.",
    "model.backbone.", "_orig_mod.module.backbone.", "some_name_nobody_knows.", "teacher.backbone.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_prefix_of_foreign_weights_is_removed_and_named(prefix: str, suffix: str, tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=4))
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state |= {prefix + "fc.weight": torch.zeros(3, 32)}
    if prefix != "_orig_mod.":
        state |= {"cls_head.fc_cls.weight": torch.zeros(3, 32)}
    path = tmp_path / f"foreign{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = build_backbone("r3d_10", width=4)
    line = load_backbone(path, backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())
    assert all(name in line for name in prefix.split("_orig_mod.")), line
    assert ("_orig_mod." in line) == ("_orig_mod." in prefix)

    wider = {"r3d_10": 8, "r3d_18": 4}
    for name, width in wider.items():
        refused(path, r"holds r3d_10 \(width 4\), but .* \(names without the prefix .*\)$", name, width)


@pytest.mark.parametrize(
    "containers", [["model"], ["model_state"], ["net"], ["student"], ["state", "model_state_dict"]]
)
def test_weights_inside_dictionaries_are_found(containers: list[str], tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=4))
    content: dict = {"module." + name: tensor for name, tensor in theirs.state_dict().items()}
    for container in containers:
        content = {container: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}
    torch.save(content, tmp_path / "nested.pth")
    backbone = build_backbone("r3d_10", width=4)
    assert containers[0] + "/module." in load_backbone(tmp_path / "nested.pth", backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())


def test_wrappers_inside_names_are_removed(tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=4))
    inner = {
        name.replace("layer1.", "layer1._checkpoint_wrapped_module."): t for name, t in theirs.state_dict().items()
    }
    torch.save(inner, tmp_path / "wrapped.pth")
    backbone = build_backbone("r3d_10", width=4)
    load_backbone(tmp_path / "wrapped.pth", backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("average", ["encoder_k.", "teacher.", "model_ema/", "target_encoder.", "key.backbone."])
def test_of_a_network_and_its_moving_average_the_trained_one_is_loaded(average: str, tmp_path: Path) -> None:
    theirs, other = (randomized(build_backbone("r3d_10", width=4), seed) for seed in (0, 1))
    state = {average + name: tensor for name, tensor in other.state_dict().items()}
    state |= {"trained." + name: tensor for name, tensor in theirs.state_dict().items()}
    torch.save(state, tmp_path / "both.pth")
    backbone = build_backbone("r3d_10", width=4)
    assert "prefix trained." in load_backbone(tmp_path / "both.pth", backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())


def test_a_file_with_two_networks_that_fit_is_refused(tmp_path: Path) -> None:
    rgb, flow = (randomized(build_backbone("r3d_10", width=8), seed) for seed in (0, 1))
    state = {"rgb." + name: tensor for name, tensor in rgb.state_dict().items()}
    state |= {"flow." + name: tensor for name, tensor in flow.state_dict().items()}
    torch.save(state, tmp_path / "two.pth")
    refused(tmp_path / "two.pth", r"holds 2 networks that fit, under the prefixes rgb\. and flow\.: give a file")
    many = {f"{number}.stem.0.weight": torch.zeros(1) for number in range(101)}
    torch.save(many, tmp_path / "many.pth")
    refused(tmp_path / "many.pth", "holds 101 networks: give a file that holds only one")
    same = {"other_name." + name: tensor.clone() for name, tensor in rgb.state_dict().items()}
    torch.save(
        {name: tensor for name, tensor in state.items() if name.startswith("rgb.")} | same, tmp_path / "same.pth"
    )
    assert "prefix rgb." in load_backbone(tmp_path / "same.pth", build_backbone("r3d_10", width=8))


def test_the_first_name_of_a_foreign_network_is_in_the_message(tmp_path: Path) -> None:
    torch.save({"backbone.conv1.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "it lacks stem.0.weight .* its first tensor is backbone.conv1.conv.weight")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    network = randomized(build_backbone("r3d_10", width=8))
    save_backbone(network, tmp_path / "good.safetensors")
    network.state_dict()["layer1.0.conv1.0.weight"].flatten()[:3] = value
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    metadata = {"format": "dclr", "backbone": "r3d_10", "width": "8"}
    save_file(network.state_dict(), tmp_path / "backbone.safetensors", metadata)
    message = r"layer1\.0\.conv1\.0\.weight holds 3 values that are not finite: the run diverged"
    refused(tmp_path / "weights.pth", message)
    refused(tmp_path / "backbone.safetensors", message)
    with pytest.raises(UserError, match=message):  # a run that diverged in its last step
        save_backbone(network, tmp_path / "good.safetensors")
    load_backbone(tmp_path / "good.safetensors", build_backbone("r3d_10", width=8))


def test_variances_below_zero_and_numbers_that_are_no_float32_are_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.pth", randomized(build_backbone("r3d_10", width=8)).state_dict()
    name = "layer2.0.conv1.1.running_var"
    torch.save({**state, name: state[name] - 100}, path)
    refused(path, rf"{name} holds 16 negative variances")
    torch.save({**state, name: torch.zeros(16)}, path)
    load_backbone(path, build_backbone("r3d_10", width=8))  # the variance of a dead channel is 0
    torch.save({**state, name: torch.full((16,), 1e300, dtype=torch.float64)}, path)
    refused(path, rf"{name} holds 16 values that are not finite")
    torch.save({**state, name: state[name].to(torch.int8)}, path)
    refused(path, rf"{name} holds int8 numbers, not floats")


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias", "layer4.0.conv2.1.running_mean"])
def test_a_classifier_that_is_not_finite_is_refused(name: str, tmp_path: Path) -> None:
    classifier = Classifier(build_backbone("r3d_10", width=4), classes=2)
    save_classifier(classifier, ("a", "b"), tmp_path / "classifier.safetensors")
    load_classifier(tmp_path)
    state = {**classifier.backbone.state_dict(), **{f"fc.{k}": v for k, v in classifier.fc.state_dict().items()}}
    state[name].flatten()[0] = torch.nan
    with pytest.raises(UserError, match=f"{name} holds 1 value that is not finite"):
        save_classifier(classifier, ("a", "b"), tmp_path / "classifier.safetensors")
    load_classifier(tmp_path)
    metadata = {"format": "dclr", "backbone": "r3d_10", "width": "4", "classes": '["a", "b"]'}
    save_file(state, tmp_path / "classifier.safetensors", metadata)
    with pytest.raises(UserError, match=f"{name} holds 1 value that is not finite"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_and_a_namespace_next_to_the_weights_are_skipped(legacy: bool, tmp_path: Path) -> None:
    theirs = randomized(build_backbone("r3d_10", width=4))
    beside = {"best": np.float64(88.9), "epoch": np.int64(3), "top": {"f": np.float32(0.5), "yes": np.bool_(True)}}
    options = argparse.Namespace(lr=np.float64(0.1), schedule=[6, 8], device=torch.device("cpu"))
    content = {"state_dict": theirs.state_dict(), "args": options, **beside}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if legacy:  # as NumPy before version 2 names its module
        path.write_bytes(path.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    backbone, safe = build_backbone("r3d_10", width=4), set(torch.serialization.get_safe_globals())
    load_backbone(path, backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())
    assert set(torch.serialization.get_safe_globals()) == safe

    # An array in the file, or an object in a Namespace, is still refused.
    torch.save({**content, "args": argparse.Namespace(model=Bomb(tmp_path / "exploded"))}, path)
    refused(path, r"\(it holds [\w.]+\), and reading other objects could run code: give a file that holds only a state")
    torch.save({**content, "accuracy": np.zeros(3)}, path)
    refused(path, r"\(it holds numpy\.[\w.]+\), and reading other objects could run code")
    assert not (tmp_path / "exploded").exists()


def test_a_number_of_numpy_with_an_address_of_memory_is_not_made(tmp_path: Path) -> None:
    """A pickled dtype may say that its bytes are no objects. NumPy itself would take the bytes for an address."""
    theirs = randomized(build_backbone("r3d_10", width=4))

    class Forged:
        def __reduce__(self) -> tuple:
            return np.float64(0).__reduce__()[0], (ForgedType(), b"\x08" * 8)

    class ForgedType:
        def __reduce__(self) -> tuple:
            state = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
            return np.dtype, ("V8", False, True), state

    torch.save({"state_dict": theirs.state_dict(), "best": Forged()}, tmp_path / "forged.pth")
    backbone = build_backbone("r3d_10", width=4)
    load_backbone(tmp_path / "forged.pth", backbone)
    assert_equal_states(backbone.state_dict(), theirs.state_dict())


class Bomb:
    """An object that calls Path(target).touch() when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    state = build_backbone("r3d_10", width=8).state_dict()
    path = tmp_path / "bomb.pth.tar"
    torch.save({"state_dict": state, "extra": Bomb(target)}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"is not a file of plain tensors \(it holds [\w.]+\), and reading other objects could run code")
    assert not target.exists()

    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # so the test file does contain working code
