"""--recompute: the same losses, gradients and running statistics bit for bit, with less memory, and its refusals."""

import copy

import pytest
import torch
from helpers import OPTIM, float32_config, make_network, make_views
from torch import Tensor

from dclr.config import check_resume, make_config, read_config, resolve, write_config
from dclr.errors import UserError
from dclr.models import BACKBONES, Backbone, Classifier, build_backbone
from dclr.training.engine import Engine
from dclr.training.finetune import finetune


class KeptBytes:
    """Counts the bytes that a forward pass keeps for the backward pass. Shared memory counts once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor


def step(backbone: Backbone, bfloat16: bool) -> int:
    """Compute the gradients of a step with an rgb, a static and a dynamic view. Return the bytes that were kept."""
    rng = torch.Generator().manual_seed(1)
    rgb, still, dynamic = (torch.randn(2, 3, frames, 32, 32, generator=rng) for frames in (8, 1, 8))
    kept = KeptBytes()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16), kept.hooks:
        maps = backbone.forward_views([rgb, still, dynamic], 8, differences=True)
    sum(each.float().square().mean() for each in maps).backward()
    return sum(kept.sizes.values())


@pytest.mark.parametrize(
    ("name", "bfloat16", "fused"),
    [
        ("r2plus1d_18", False, False),
        ("r2plus1d_10", True, False),
        ("r2plus1d_10", False, True),
        ("mc3_18", False, False),
        ("s3d", False, False),
    ],
)
def test_a_backbone_computes_the_same_bit_for_bit_and_keeps_less(name, bfloat16, fused):
    torch.manual_seed(0)
    plain = build_backbone(name, 64 if name == "s3d" else 4).train()
    if fused:
        plain.fuse(plain.fusible())
    again = copy.deepcopy(plain)
    assert again.recompute()
    assert step(again, bfloat16) < 0.5 * step(plain, bfloat16)
    for (key, found), expected in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), key
    for (key, found), expected in zip(again.named_buffers(), plain.buffers(), strict=True):  # running statistics
        assert torch.equal(found, expected), key
    assert {found.item() for key, found in again.named_buffers() if key.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "moco", "symmetric_loss": True},
        {"method": "dclr-simclr"},
        {"method": "simsiam"},
        {"method": "videomoco", "adversarial_from": 0},
    ],
    ids=lambda settings: settings.get("method", "dclr"),
)
def test_a_method_trains_the_same_bit_for_bit(settings):
    """VideoMoCo passes backward through the query encoder twice, so it is computed again twice."""
    ends = []
    for again in (False, True):
        network = make_network(**settings).train()
        for module in network.modules():
            if again and isinstance(module, Backbone):
                module.recompute()
        loss = network(make_views(0), make_views(1), 0).loss
        loss.backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        ends.append({"loss": loss.detach(), **network.state_dict(), **{f"grad {k}": v for k, v in gradients.items()}})
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulated_steps_under_deepspeed_are_the_same_bit_for_bit(one_process, stage):
    ends = []
    for again in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone("r3d_10", 4)
        if again:
            backbone.recompute()
        engine = Engine(
            Classifier(backbone, 3, dropout=0.5), float32_config(stage) | {"gradient_accumulation_steps": 2}, OPTIM,
            one_process,
        )  # fmt: skip
        engine.train()
        torch.manual_seed(1)  # of dropout
        for number in range(4):
            engine.backward(engine(make_views(number).rgb[:2]).square().mean())
            engine.step()
        ends.append(engine.module.state_dict())
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_the_flag_is_refused_where_it_has_no_effect(tiny, one_process, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^--recompute has no effect in linear, .*: leave the flag out$"):
        resolve("linear", "demo", {"recompute": True})
    assert resolve("finetune", "demo", {"recompute": True}).run.recompute

    class Plain(Backbone):
        def __init__(self, width: int) -> None:
            super().__init__(3)
            self.scale = torch.nn.Conv3d(3, 3, 1)

        def feature_map(self, x: Tensor) -> Tensor:
            return self.scale(x)

    monkeypatch.setitem(BACKBONES, "plain", Plain)
    settings = {**tiny, "backbone": "plain", "recompute": True, "out": str(tmp_path / "run")}
    settings["data"] = str(tmp_path / "gone")  # the flag is refused before the videos are opened
    with pytest.raises(UserError, match=r"^--recompute has no effect on plain, .* or use --compile on$"):
        finetune("finetune", make_config("finetune", settings), "demo", one_process)


def test_a_configuration_without_the_setting_has_it_off_and_a_resumed_run_may_turn_it_on(tmp_path):
    write_config(tmp_path / "config.json", "finetune", "demo", resolve("finetune", "demo", {}))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('    "recompute": false,\n', ""))
    command, preset, values = read_config(tmp_path / "config.json")
    assert "recompute" not in values
    assert resolve(command, preset, {}, resumed=values).run.recompute is False
    check_resume(tmp_path, {"recompute": True}, values)
    assert resolve(command, preset, {"recompute": True}, resumed=values).run.recompute is True
