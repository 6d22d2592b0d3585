"""A step of the released code and one of ours on the same weights, clips and queues.

DCLR_RELEASED_CODE names a checkout of github.com/Mark12Ding/DCLR at commit 47adce9. Its code is read from there. It
cannot run as published, so it is repaired in memory. Nothing of it is copied.

The reference is the released code in float64. Our engine computes in float32, as the released code does. So our
distance from the reference may be at most 4 times that of the released code in float32. For the gradients of the
backbone this is about 0.5 %: a rounding error changes the sign of a few inputs of ReLU. The gradients before the
backbone do not have this limit. The test compares them too.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dclr.config import MethodConfig, ModelConfig
from dclr.kernels import Views
from dclr.methods import DCLR
from dclr.methods import dclr as ours
from dclr.methods.encoder import KEY_OF_PAIR, PAIRS

CHECKOUT = os.environ.get("DCLR_RELEASED_CODE", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="DCLR_RELEASED_CODE does not name a checkout of the released code"),
]

B, K, M = 2, 32, 5
# The released code only takes clips whose last feature map is 2 x 7 x 7. These are the smallest ones.
FRAMES, PIXELS = 9, 97


def load(file: str) -> ModuleType:
    """Import a file of the checkout under a name of its own."""
    path = Path(CHECKOUT) / file
    spec = importlib.util.spec_from_file_location("released_" + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def released() -> Iterator[SimpleNamespace]:
    """The modules of the released code: `networks`, `builder` and `main`. Its calls of CUDA do nothing."""
    networks, builder = load("view_resnet.py"), load("moco/builder.py")
    # main_view.py imports modules for data and plots that this test does not use, and some that no longer exist.
    unused = [
        "kornia", "torchvision.io.video", "torchvision.transforms._transforms_video",
        "torchvision.datasets.samplers.clip_sampler", "torch.utils.tensorboard", "dataset", "dataset.kinetics",
        "dataset.ucf101_view", "moco", "moco.loader", "moco.builder", "utils", "utils.train_utils",
    ]  # fmt: skip
    with patch.dict(sys.modules, {**{name: MagicMock() for name in unused}, "view_resnet": networks}):
        main = load("main_view.py")
    main.accuracy = lambda *_, **__: ([0.0], [0.0])
    builder.concat_all_gather = lambda tensor: tensor
    with (
        patch.object(torch, "samplerones", torch.ones, create=True),
        patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
    ):
        yield SimpleNamespace(networks=networks, builder=builder, main=main)


def repaired(released: SimpleNamespace) -> Any:
    """Return the released network with three repairs. It records what its encoders return.

    - Without `train`, the encoder returns five values, of which extract_feature drops the first.
    - The alignment term gets maps of the key clip in place of the sum of two embeddings.
    - Clips are not shuffled over GPUs, because there is one process.
    """

    class Repaired(released.builder.MoCo_View):  # type: ignore[name-defined, misc]
        def extract_feature(
            self, encoder: nn.Module, sample: Tensor, *maps: Tensor, train: bool = True
        ) -> list[Tensor]:
            outputs = encoder(sample, *(maps or (None, None)), train)
            first = 0 if train else 3  # without `train`, three maps come before two embeddings
            embeddings = [F.normalize(output, dim=1) for output in outputs[first:]]
            for embedding in embeddings:
                if embedding.requires_grad:
                    embedding.retain_grad()
            self.encoded.append([*outputs[:first], *embeddings])
            return self.encoded[-1]

        def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, None]:
            return x, None

        def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: None) -> Tensor:
            return x

        def forward(self, q: Tensor, k: Tensor) -> Any:
            self.encoded: list[list[Tensor]] = []
            logits, self.labels, (query_map, _) = self.forward_once(q, k)
            _, static, dynamic, *_ = self.encoded[1]  # the key clip's first pass
            return logits, self.labels, [query_map, static + dynamic]

    # m = 1 keeps the key encoder as it is. The released code updates it in the middle of a step, ours at the end.
    return Repaired(released.networks.r2plus1d_18, dim=128, K=K, m=1.0, T=0.07, topk=M)


def released_step(
    released: SimpleNamespace, network: DCLR, query: Views, key: Views, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return what the released training loop computes in a step from the weights and queues of `network`."""
    other = repaired(released)
    state = {
        name.replace("query.", "encoder_q.")
        .replace("key.", "encoder_k.")
        .replace("backbone.", "")
        .replace("heads.", "f"): t
        for name, t in network.state_dict().items()
        if name not in ("queue", "enqueued")
    }
    for pair, queue in zip(PAIRS, network.queue, strict=True):
        state["queue_" + KEY_OF_PAIR[pair]] = queue.T
    # Two more queues hold the features for mining. They are sv and dv keys of an earlier pass.
    state |= {"queue_rs": state["queue_sv"], "queue_rd": state["queue_dv"]}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name == "queue_ptr" or name.endswith("num_batches_tracked") for name in missing)
    other.to(dtype)

    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
        outputs.append(output)

    for encoder in (other.encoder_q, other.encoder_k):
        encoder.layer4.register_forward_hook(record)
    criterion, losses, meters = released.main.MultiNCELoss(), list[Tensor](), dict[str, MagicMock]()
    criterion.register_forward_hook(lambda module, inputs, output: losses.append(output.detach()))
    with patch.object(released.main, "AverageMeter", lambda name, _: meters.setdefault(name, MagicMock())):
        batch = ([view.to(dtype) for view in (query.rgb, key.rgb, query.static, key.static)], None)
        released.main.train(
            [batch], lambda clip: clip, other, criterion, MagicMock(), 0, SimpleNamespace(gpu=None, print_freq=2), None
        )
    # The key clips pass twice. The first pass gives their maps, and the second one their embeddings.
    look, _, of_query, of_key = (output.view(B, 3, *output.shape[1:]) for output in outputs)
    vv, vs, sv, vd, dv = losses
    found = {
        "features of the query encoder": of_query.detach(),
        "features of the query clips in the key encoder": look,
        "features of the key clips": of_key,
        "queries": torch.stack(other.encoded[2]).detach(),
        "gradients of the queries": torch.stack([q.grad for q in other.encoded[2]]),
        "gradients of the features": outputs[2].grad.view_as(of_query),
        "losses": torch.stack([vv, vs, vd, sv, dv]),
        "mined": torch.stack(other.labels)[:, :, 1:],
        "queues": torch.stack([getattr(other, "queue_" + KEY_OF_PAIR[pair]).T for pair in PAIRS]),
        "queues for mining": torch.stack([other.queue_rs.T, other.queue_rd.T]),
        "loss": torch.tensor(meters["Loss"].update.call_args.args[0], dtype=torch.float64),
    }
    found |= {
        f"gradients of the backbone and the heads: {name}": p.grad for name, p in other.encoder_q.named_parameters()
    }
    found |= {f"running statistics: {name}": b for name, b in other.encoder_q.named_buffers() if "running" in name}
    other.m = network.method.key_momentum
    other._momentum_update_key_encoder()
    return found | {f"moved key encoder: {name}": p.data for name, p in other.encoder_k.named_parameters()}


def our_step(network: DCLR, query: Views, key: Views) -> dict[str, Tensor]:
    """Return the same values of our step, under the same names."""
    passes, mined, queries = list[list[Tensor]](), list[Tensor](), list[Tensor]()

    def run_backbone(*arguments: Any) -> dict[str, Tensor]:
        features = original_run(*arguments)
        passes.append(list(features.values()))
        for feature in features.values():
            if feature.requires_grad:
                feature.retain_grad()
        return features

    def contrast(embeddings: Tensor, *arguments: Any, **options: Any) -> Any:
        embeddings.retain_grad()
        queries.append(embeddings)
        return original_contrast(embeddings, *arguments, **options)

    def mine(mining: Tensor) -> Tensor:
        mined.append(DCLR._mine(network, mining))
        return mined[-1]

    original_run, original_contrast = ours.run_backbone, ours.contrast
    with (
        patch.object(ours, "run_backbone", run_backbone),
        patch.object(ours, "contrast", contrast),
        patch.object(network, "_mine", mine),
    ):
        output = network(query, key, 0)
    output.loss.backward()
    of_query, look, of_key = (torch.stack(views, dim=1).detach() for views in passes)
    rows = torch.zeros(3, B, K).scatter(2, mined[0][:3], 1.0)  # vv, vs, vd; sv and dv have those of vs and vd
    assert torch.equal(mined[0][3:], mined[0][1:3])
    found = {
        "features of the query encoder": of_query,
        "features of the query clips in the key encoder": look,
        "features of the key clips": of_key,
        "queries": output.queries,
        "gradients of the queries": queries[0].grad,
        "gradients of the features": torch.stack([view.grad for view in passes[0]], dim=1),
        "losses": output.losses,
        "mined": rows,
        "queues": network.queue,
        "queues for mining": network.queue[1:3],
        "loss": output.losses.sum() + 0.1 * output.alignment_key_maps,
    }
    rename = {name: name.replace("backbone.", "").replace("heads.", "f") for name in network.query.state_dict()}
    found |= {
        f"gradients of the backbone and the heads: {rename[name]}": p.grad
        for name, p in network.query.named_parameters()
    }
    found |= {
        f"running statistics: {rename[name]}": b for name, b in network.query.named_buffers() if "running" in name
    }
    network.update_key()
    return found | {f"moved key encoder: {rename[name]}": p.data for name, p in network.key.named_parameters()}


def make_views() -> Views:
    rgb, still = torch.randn(B, 3, FRAMES, PIXELS, PIXELS), torch.randn(B, 3, 1, PIXELS, PIXELS)
    return Views(rgb, still.expand_as(rgb), rgb - rgb.roll(1, 2))


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the exact values."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("encoders", ["equal", "different"])
def test_a_step_agrees_with_the_released_code_within_float32(released: SimpleNamespace, encoders: str) -> None:
    """Our settings have the released form. The comments name what is not compared, and why."""
    torch.manual_seed(0)
    # The released alignment term has no gradient, so our weight is 0. The test adds the value of its form to the loss.
    method = MethodConfig(
        queue_length=K, mined_positives=M, key_encoder_views="all", alignment="raw", alignment_weight=0.0
    )
    network = DCLR(ModelConfig(backbone="r2plus1d_10", width=64), method)
    network.enqueued.fill_(K)  # the released code mines from the first step on, ours when the queue is full
    with torch.no_grad():
        for p in network.query.heads.parameters():
            p.copy_(torch.randn_like(p))  # at initialisation all embeddings are nearly equal
        network.reset_key()
        if encoders == "different":
            for p in network.key.parameters():
                p.mul_(1 + 0.1 * torch.randn_like(p))
    query, key = make_views(), make_views()
    with torch.no_grad():  # negatives that are as similar as those of a training run: all losses are well above 0
        centre = network._encode_key(make_views(), 0)[0].mean(1, keepdim=True)
        network.queue.copy_(F.normalize(centre + 0.05 * torch.randn_like(network.queue), dim=2))
    exact, rounded = (released_step(released, network, query, key, t) for t in (torch.float64, torch.float32))
    found = our_step(network, query, key)

    # The key encoder's running statistics are not compared: the released key encoder runs three times, ours twice.
    assert found.keys() == exact.keys()
    if encoders == "different":
        # The released map of the rgb view comes from the key encoder. Ours comes from the query encoder.
        del found["loss"]
    assert torch.equal(found.pop("mined"), exact["mined"].float())
    distances: dict[str, list[tuple[float, float]]] = {}
    for name, values in found.items():
        kind = name.partition(": ")[0]
        distances.setdefault(kind, []).append((distance(values, exact[name]), distance(rounded[name], exact[name])))
    for kind, pairs in distances.items():
        own, theirs = map(max, zip(*pairs, strict=True))
        print(f"{encoders} encoders, {kind}: {own:.1e}, released code in float32 {theirs:.1e}")
        assert own <= 4 * max(theirs, 2.0**-23), kind
