"""The learning rate of each step: equal to torch's schedulers, and refused settings."""

import pytest
import torch

from dclr.config import OptimConfig, flat, resolve
from dclr.errors import UserError
from dclr.training.loop import learning_rate

STEPS_PER_EPOCH = 4


def rates(**settings) -> list[float]:
    optim = OptimConfig(**{"lr": 0.3, "epochs": 6, **settings})
    return [learning_rate(optim, step, STEPS_PER_EPOCH) for step in range(optim.epochs * STEPS_PER_EPOCH)]


def rates_of_torch(scheduler_of) -> list[float]:
    """Return the rates of 24 steps of a torch scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)
    scheduler, found = scheduler_of(optimizer), []
    for _ in range(24):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def warm_up(optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Return torch's linear warm-up to the full rate in the 8th step."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 8, total_iters=7)


def test_steps_with_a_warm_up_equal_torchs_schedulers():
    def of_torch(optimizer):
        falls = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[12, 20])
        return torch.optim.lr_scheduler.ChainedScheduler([warm_up(optimizer), falls])

    found = rates(milestones=(3, 5), warmup_epochs=2)
    assert found == pytest.approx(rates_of_torch(of_torch), rel=1e-12)
    assert rates(milestones=(3, 5))[8:] == found[8:]
    assert rates(milestones=(3, 5))[:12] == [0.3] * 12


def test_a_cosine_equals_torchs_schedulers_and_at_each_epoch_the_released_code():
    def of_torch(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)

    def after_warm_up(optimizer):
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up(optimizer), cosine], milestones=[8])

    found = rates(schedule="cosine")
    assert found == pytest.approx(rates_of_torch(of_torch), rel=1e-9)
    # --cos of the released code changes the rate once an epoch.
    epochs = torch.arange(6, dtype=torch.float64)
    assert found[::STEPS_PER_EPOCH] == pytest.approx((0.15 * (1 + torch.cos(torch.pi * epochs / 6))).tolist())
    assert rates(schedule="cosine", warmup_epochs=2) == pytest.approx(rates_of_torch(after_warm_up), rel=1e-9)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "linear"])
def test_a_cosine_needs_no_milestones_and_refuses_them_by_name(command):
    found = resolve(command, "ucf101", {"schedule": "cosine", "warmup_epochs": 2})
    assert (found.optim.schedule, found.optim.milestones, found.optim.warmup_epochs) == ("cosine", (), 2)
    assert resolve(command, "ucf101", {}, resumed=flat(found)) == found
    message = "^--milestones has no effect with --schedule cosine: leave it out, or use --schedule step$"
    with pytest.raises(UserError, match=message):
        resolve(command, "ucf101", {"schedule": "cosine", "milestones": [3]})
    with pytest.raises(UserError, match=message):
        resolve(command, "ucf101", {}, file={"schedule": "cosine", "milestones": [3]})
    # The settings of a run with milestones can be repeated with a cosine.
    assert resolve(command, "ucf101", {"schedule": "cosine"}, file=flat(resolve(command, "ucf101", {})))
    # A file that a person wrote has no milestones at all, so those of the preset count.
    steps = resolve(command, "ucf101", {"schedule": "step"}, file={"schedule": "cosine"})
    assert steps.optim.milestones == resolve(command, "ucf101", {}).optim.milestones
    # Those of a run with a cosine hold no milestones.
    stored = flat(found)
    message = "^--schedule step needs --milestones here, because a run with --schedule cosine stores none$"
    for settings in ({"resumed": stored}, {"file": stored}):
        with pytest.raises(UserError, match=message):
            resolve(command, "ucf101", {"schedule": "step"}, **settings)
        steps = resolve(command, "ucf101", {"schedule": "step", "milestones": [3]}, **settings)
        assert (steps.optim.schedule, steps.optim.milestones) == ("step", (3,))
