"""Do twenty training steps with fused convolutions follow those with the library's convolutions?

    TRITON_INTERPRET=1 python -m experiments.convolutions            three seeds: about half an hour without a GPU
    TRITON_INTERPRET=1 python -m experiments.convolutions --quick    three steps: checks that it runs

A fused convolution normalises its input and sums the statistics of its output (`--convolutions triton`). DCLR trains a
small network (r2plus1d_10 of width 16, 2 samples of 4 x 16 x 16) in bfloat16 in four ways, from the same weights and on
the same synthetic clips:

- library: torch computes all convolutions and batch normalisations.
- fused: Triton kernels compute the convolutions of the stem and of the first stage that they support. Without a GPU the
  kernels run in Triton's interpreter.
- perturbed: as library, but each weight is multiplied by 1 + 2^-9 u at the start, with a random u from -1 to 1. This is
  the size of the rounding errors of bfloat16.
- fused, no gradient of the statistics: as fused, with a planted fault.

Pre-registered, before the first run:

- The first two losses with fused convolutions differ from the library's by at most those of the perturbed network, in
  the mean over seeds. The second loss follows the first update.
- Over all steps, the fused network is on average no further from the library than the perturbed one, within two
  standard errors and in powers of ten.
- The planted fault is found: without the gradient that the statistics send, the first two losses or the mean over all
  steps differ by more than these claims allow.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from dclr import kernels
from dclr.config import MethodConfig, ModelConfig
from dclr.errors import UserError
from dclr.kernels import Views, convolution_triton
from dclr.kernels.backend import INTERPRETED
from dclr.methods import DCLR
from experiments import evidence, runs
from experiments.evidence import Finding
from experiments.precision import powers_of_ten, relative_differences

STEPS, QUICK_STEPS, BATCH, FRAMES, PIXELS = 20, 3, 2, 4, 16
LIBRARY, FUSED, PERTURBED, FAULTY = CURVES = ("library", "fused", "perturbed", "fused, no gradient of the statistics")
FUSED_STAGES = ("stem", "layer1")
MODEL = ModelConfig(backbone="r2plus1d_10", width=16)
LOSS_PANEL = "loss in bfloat16, by convolutions"
METHOD = MethodConfig(queue_length=16, embedding_dim=32, mined_positives=1)


def draw_views(rng: torch.Generator, device: torch.device) -> Views:
    """Draw the views of clips: a smooth pattern, which moves with its own speed in each clip."""
    coarse = torch.randn(BATCH, 3, 1, 4, 4, generator=rng)
    picture = torch.nn.functional.interpolate(coarse, (1, PIXELS, PIXELS), mode="trilinear")
    speeds = torch.randint(-2, 3, (BATCH, 2), generator=rng).tolist()
    rgb = torch.cat(
        [
            torch.cat([clip.roll((t * down, t * right), (3, 4)) for t in range(FRAMES)], dim=2)
            for clip, (down, right) in zip(picture.split(1), speeds, strict=True)
        ]
    ).to(device, torch.bfloat16)
    static = rgb[:, :, :1].expand(-1, -1, FRAMES, -1, -1)
    return Views(rgb, static, rgb - rgb.roll(1, 2))


@contextlib.contextmanager
def no_gradient_of_statistics() -> Iterator[None]:
    """Drop the gradient that mean and variance send to a fused convolution's result."""
    real = convolution_triton.convolve_op

    def without(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        frames, mean, variance = real(*arguments)
        return frames, mean.detach(), variance.detach()

    with mock.patch.object(convolution_triton, "convolve_op", without):
        yield


def curve(name: str, seed: int, steps: int, device: torch.device) -> list[float]:
    """Train and return the loss of each step."""
    torch.manual_seed(seed)
    network = DCLR(MODEL, METHOD, seed).to(device)
    rng = torch.Generator().manual_seed(seed)
    if name == PERTURBED:
        noise = torch.Generator().manual_seed(1000 + seed)
        for parameter in network.query.parameters():
            rounding = 2.0**-9 * (2 * torch.rand(parameter.shape, generator=noise) - 1)
            parameter.data *= 1 + rounding.to(device)
        network.reset_key()
    if name in (FUSED, FAULTY):
        for encoder in (network.query, network.key):
            encoder.backbone.fuse([name for name in encoder.backbone.fusible() if name.startswith(FUSED_STAGES)])
    optimizer = torch.optim.SGD(network.query.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    with no_gradient_of_statistics() if name == FAULTY else contextlib.nullcontext():
        for step in range(steps):
            query, key = draw_views(rng, device), draw_views(rng, device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = network(query, key, step).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            network.update_key()
            losses.append(loss.item())
    return losses


def distances(curves: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Return the relative differences from the library's losses, {name: [[one for each step] for each seed]}."""
    return {
        name: [relative_differences(*pair) for pair in zip(curves[name], curves[LIBRARY], strict=True)]
        for name in CURVES[1:]
    }


def findings(result: evidence.Result) -> list[Finding]:
    """Return the claims about the losses; [] for one seed."""
    lines = next(panel["lines"] for panel in result["panels"] if panel["title"] == LOSS_PANEL)
    differences = distances({name: lines[name]["values"] for name in CURVES})
    if len(differences[FUSED]) < 2:
        return []
    first = {name: statistics.mean(max(by_step[:2]) for by_step in by_seed) for name, by_seed in differences.items()}
    along = {
        name: [statistics.mean(powers_of_ten(by_step)) for by_step in by_seed] for name, by_seed in differences.items()
    }
    gap, error = evidence.difference(along[FUSED], along[PERTURBED])
    limit = evidence.STANDARD_ERRORS * error
    fault = statistics.mean(along[FAULTY]) - statistics.mean(along[PERTURBED])
    return [
        evidence.finding(
            "the first two losses with fused convolutions equal the library's up to rounding errors",
            first[FUSED] <= first[PERTURBED],
            f"mean relative difference {first[FUSED]:.1e}, perturbed weights {first[PERTURBED]:.1e}",
        ),
        evidence.finding(
            "fused convolutions are no further from the library than perturbed weights",
            gap <= limit,
            f"mean over the steps 10^{statistics.mean(along[FUSED]):.2f} and "
            f"10^{statistics.mean(along[PERTURBED]):.2f}: {gap:+.2f} powers of ten, threshold at most {limit:.2f}",
        ),
        evidence.finding(
            "a missing gradient of the statistics is found",
            first[FAULTY] > first[PERTURBED] or fault > limit,
            f"first two losses {first[FAULTY]:.1e}, threshold {first[PERTURBED]:.1e}; "
            f"along the steps {fault:+.2f} powers of ten, threshold {limit:.2f}",
        ),
    ]


def panels(curves: dict[str, list[list[float]]]) -> list[dict[str, object]]:
    """Return the panel of the losses, and the panel of their distance from the library's."""
    steps = list(range(1, len(curves[LIBRARY][0]) + 1))
    away = {name: [powers_of_ten(by_step) for by_step in by_seed] for name, by_seed in distances(curves).items()}
    return [
        {"title": title, "ylabel": label, "lines": {k: {"steps": steps, "values": v} for k, v in values.items()}}
        for title, label, values in (
            (LOSS_PANEL, "nats", curves),
            ("distance from the library", "log10 of the relative difference", away),
        )
    ]


def result_of(curves: dict[str, list[list[float]]]) -> evidence.Result:
    result: evidence.Result = {
        "question": "do twenty steps with fused convolutions follow those with the library's?",
        "recipe": {"steps": STEPS, "batch": BATCH, "clips": [FRAMES, PIXELS, PIXELS], "width": MODEL.width},
        "figures": {},
        "rows": {},
        "panels": panels(curves),
    }
    return result | {"findings": findings(result)}


def main(arguments: Sequence[str]) -> None:
    options, _ = runs.parse(__doc__, arguments)
    device = evidence.here()
    if device.type == "cpu" and not INTERPRETED:
        raise UserError("without a GPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1")
    kernels.set_backend("triton")
    curves: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for seed in options.seeds:
        for name in CURVES:
            curves[name].append(curve(name, seed, QUICK_STEPS if options.quick else STEPS, device))
            print(f"seed {seed}, {name}: " + " ".join(f"{loss:.4f}" for loss in curves[name][-1]), flush=True)
    evidence.publish("convolutions", result_of(curves), [], options)


if __name__ == "__main__":
    sys.exit(runs.entry(main))
