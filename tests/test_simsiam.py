"""SimSiam: its loss and gradients by a separate computation, its spread, and refused settings.

test_monitor.py makes a run.
"""

from dataclasses import replace

import pytest
import torch
from helpers import METHOD, MODEL, make_views

from dclr.config import resolve
from dclr.errors import UserError
from dclr.methods import SimSiam
from dclr.methods.simsiam import spread


def make_simsiam() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(MODEL, replace(METHOD, method="simsiam"))


def test_the_loss_is_the_published_one_and_its_gradient_flows_through_the_predictions_only() -> None:
    network, plain = make_simsiam(), make_simsiam()
    query, key = make_views(1), make_views(2)
    output = network(query, key, 0)
    output.loss.backward()

    projections = [plain.project(plain.query.backbone(views.rgb).mean((2, 3, 4))) for views in (query, key)]
    predictions = [plain.predict(z) for z in projections]
    total = torch.zeros(())
    for p, z in zip(predictions, projections[::-1], strict=True):
        z = z.detach()
        total = total - ((p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))).mean() / 2
    total.backward()
    assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert network.metrics(output) == {"loss": output.loss.item(), "spread": output.spread.item()}
    assert 0 < output.spread.item() <= 1
    for (name, found), p in zip(network.named_parameters(), plain.parameters(), strict=True):
        tolerance = 1e-3 * p.grad.abs().max().item() + 1e-8
        torch.testing.assert_close(found.grad, p.grad, rtol=0, atol=tolerance, msg=name)


def test_spread_is_0_for_equal_projections_and_1_for_a_sphere() -> None:
    assert spread(torch.ones(8, 16)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))).item() == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("flag", ["temperature", "key_momentum", "negatives"])
def test_settings_of_contrastive_methods_are_refused(flag: str) -> None:
    message = f"^--{flag.replace('_', '-')} has no effect with --method simsiam: leave the flag out$"
    with pytest.raises(UserError, match=message):
        resolve("pretrain", "demo", {"method": "simsiam", flag: {"negatives": "all"}.get(flag, 0.5)})
