"""Convolutions that carry batch normalisation with them, against a float64 oracle of torch's plain layers.

On a CPU the kernels run in Triton's interpreter. On a GPU (`-m gpu`) the same tests run the compiled kernels.

The inputs are small whole numbers and halves. Every product and sum is then exact in float32. So the kernels' results,
which are rounded to bfloat16, must be equal to the oracle's rounded results, bit for bit. The reference computes in
float32 here, without rounding.

Letters: B clips, C and C' channels, D frames, H, W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dclr.kernels import Normalisation, backend, convolve
from dclr.kernels.convolution import supports
from dclr.kernels.types import CONVOLUTIONS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dclr.kernels import convolution_triton  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One convolution.

    Attributes:
        size: B, D, H, W.
        run: `repeated` and `times` of the result.
    """

    kind: str
    channels: tuple[int, int]
    size: tuple[int, int, int, int]
    normalise: bool = True
    run: tuple[int, int] = (0, 1)

    def __str__(self) -> str:
        words = [self.kind, "to".join(map(str, self.channels)), "x".join(map(str, self.size))]
        return "-".join(words + ["raw"] * (not self.normalise) + [f"{self.run[1]}times"] * (self.run[1] > 1))

    def draw(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return x, weight and the normalisation, then the upstream gradients, in float64.

        The upstream gradient of y is whole numbers.
        """
        rng = torch.Generator().manual_seed(1)

        def whole(least: int, most: int, *shape: int) -> Tensor:
            return torch.randint(least, most + 1, shape, generator=rng).double()

        (B, *rest), (C, out) = self.size, self.channels
        given = [whole(-3, 3, B, C, *rest), whole(-1, 1, out, C, *CONVOLUTIONS[self.kind])]
        if self.normalise:
            # A shift above 0, because a frame of padding must be zero and not relu(shift).
            given += [whole(-1, 1, C), 2.0 ** whole(-1, 1, C), whole(-1, 3, C) / 2]
        count = given[0][:, 0].numel()
        return given, [whole(-2, 2, B, out, *rest), count * whole(-2, 2, out) / 4, count * whole(-2, 2, out) / 4]


def oracle(case: Case, dtype: torch.dtype, x: Tensor, weight: Tensor, *normalisation: Tensor) -> list[Tensor]:
    """Return the result, rounded to dtype, and its statistics, from torch's convolution of all frames in float64."""
    if normalisation:
        mean, scale, shift = (values[:, None, None, None] for values in normalisation)
        x = F.relu((x - mean) * scale + shift)
    y = F.conv3d(x, weight, padding=tuple(n // 2 for n in weight.shape[2:]))
    y = y + (y.to(dtype).double() - y).detach()  # the gradient passes
    number, times = case.run
    every = torch.cat([y, *[y[:, :, number : number + 1]] * (times - 1)], dim=2)
    variance, mean = torch.var_mean(every, (0, 2, 3, 4), correction=0)
    return [y, mean, variance]


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if backend.runs_triton(device) else torch.float32


def by_oracle(case: Case, upstream: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.requires_grad_() for tensor in case.draw()[0]]
    outputs = oracle(case, dtype, *leaves)
    torch.autograd.backward(outputs[: len(upstream)], upstream)
    return [tensor.detach() for tensor in outputs] + [leaf.grad for leaf in leaves]


def by_convolve(case: Case, upstream: list[Tensor], device: torch.device) -> list[Tensor]:
    given = case.draw()[0]
    dtypes = [dtype_on(device)] * 2 + [torch.float32] * 3
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor, dtype in zip(given, dtypes, strict=False)]
    outputs = convolve(leaves[0], leaves[1], Normalisation(*leaves[2:]) if case.normalise else None, *case.run)
    gradients = [u.to(device, y.dtype) for u, y in zip(upstream, outputs, strict=False)]
    torch.autograd.backward(outputs[: len(upstream)], gradients)
    return [tensor.detach().cpu() for tensor in outputs] + [leaf.grad.cpu() for leaf in leaves]


NAMES = ("y", "mean", "variance", "gradient of x", "of the weight", "of the mean", "of the scale", "of the shift")


def check(case: Case, device: torch.device) -> None:
    """Compare results and gradients. The gradient arrives through y only, so that it is exact."""
    upstream = case.draw()[1][:1]
    found, expected = by_convolve(case, upstream, device), by_oracle(case, upstream, dtype_on(device))
    for name, a, b in zip(NAMES, found, expected, strict=False):
        assert a.shape == b.shape, name
        if name in ("mean", "variance"):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        else:
            different = (a != b.to(a.dtype)).float().mean()
            assert not different, f"{name}: {different:.0%} of the values differ"


# Stem, first and second stage of r2plus1d_10. Sizes are no multiples of the rows of a program, and some clips need
# several programs.
CASES = [
    Case("temporal", (48, 64), (2, 3, 5, 7)),
    Case("spatial", (64, 144), (1, 2, 6, 7), normalise=False),
    Case("spatial", (64, 144), (2, 1, 5, 17)),
    Case("temporal", (144, 64), (1, 4, 5, 9), run=(1, 5)),
    Case("spatial", (128, 240), (1, 1, 3, 5), run=(0, 8)),
    Case("temporal", (240, 128), (1, 2, 3, 3)),
    Case("temporal", (16, 32), (3, 1, 1, 50), run=(0, 16)),
    Case("temporal", (80, 16), (1, 2, 2, 3), normalise=False),
    Case("spatial", (96, 208), (1, 1, 1, 1)),
    Case("spatial", (48, 48), (1, 3, 2, 3), run=(2, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_equal_the_oracles(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=str)
def test_the_statistics_send_their_gradient(case: Case, device: torch.device) -> None:
    """The gradient of y is rounded to bfloat16 once, after what the statistics send is added: 2^-9 of a value."""
    upstream = case.draw()[1]
    dtype = dtype_on(device)
    found, expected = by_convolve(case, upstream, device), by_oracle(case, upstream, dtype)
    without = by_oracle(case, upstream[:1], dtype)
    for name, a, b, c in list(zip(NAMES, found, expected, without, strict=True))[3:]:
        assert (a.double() - b).abs().max() <= 0.01 * b.abs().max(), name
        assert (c - b).abs().max() > 0.1 * b.abs().max(), name


@pytest.mark.parametrize(("level", "step"), [(1000.0, 4.0), (1.0, 2.0**-7), (-256.0, 2.0)])
def test_statistics_of_values_far_from_zero(level: float, step: float, device: torch.device) -> None:
    """Few values differ from a large mean by the smallest step of bfloat16. E[y^2] - E[y]^2 would be off by 100 %."""
    x = torch.full((2, 16, 3, 9, 10), level)
    x[0, :, 1, 2, 3] += step
    weight = torch.zeros(16, 16, 3, 1, 1)
    weight[:, :, 1, 0, 0] = torch.eye(16)
    result = convolve(x.to(device, torch.bfloat16), weight.to(device, torch.bfloat16))
    share = 1 / (2 * 3 * 9 * 10)
    mean = torch.full((16,), level + step * share)
    torch.testing.assert_close(result.mean.cpu(), mean, rtol=1e-6, atol=0)
    variance = torch.full((16,), step**2 * share * (1 - share))
    torch.testing.assert_close(result.variance.cpu(), variance, rtol=1e-3, atol=0)


# ---------------------------------------------------------------- planted faults, in the interpreter


@triton.jit
def padding_is_normalised(
    x, i, inside, channels, C: tl.constexpr, mean, scale, shift, NORMALISE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Read rows of an input whose padding is zero before ReLU."""
    tile = convolution_triton._tile(x, i, inside, channels, C)
    if NORMALISE:
        z = tl.maximum((tile.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :], 0.0)
        tile = convolution_triton.rounded(z, tl.bfloat16, INTERPRETED)
    return convolution_triton._operand(tile, INTERPRETED)


@triton.jit
def no_border(i, rows, tap, D, H, W, TEMPORAL: tl.constexpr):
    """Read the neighbouring row, also where it belongs to another line or frame."""
    distance = (tap - 1) * H * W if TEMPORAL else (tap // 3 - 1) * W + tap % 3 - 1
    return i + distance, (i + distance >= 0) & (i + distance < rows)


@pytest.fixture
def interpreter() -> Iterator[torch.device]:
    """Return the CPU, where the kernels run in Triton's interpreter."""
    if not backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    backend.set_backend("triton")
    yield torch.device("cpu")
    backend.set_backend("auto")


@pytest.mark.parametrize(
    ("name", "fault"), [("_input", padding_is_normalised), ("_shifted", no_border)], ids=["padding", "border"]
)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_wrong_kernel_is_found(
    name: str, fault: Callable, kind: str, interpreter: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(kind, (16, 16), (2, 3, 3, 4))
    check(case, interpreter)
    monkeypatch.setattr(convolution_triton, name, fault)
    with pytest.raises(AssertionError, match=r"^y: "):
        check(case, interpreter)


@pytest.mark.parametrize(
    ("argument", "value", "found"), [("times", 4, "mean"), ("repeated", 1, "mean"), ("W", 3, "y"), ("D", 2, "y")]
)
def test_a_wrong_argument_is_found(
    argument: str, value: int, found: str, interpreter: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = convolution_triton.forward_launch

    def wrong(*arguments: Any) -> Any:
        launch, *rest = real(*arguments)
        launch.arguments[argument] = value
        return launch, *rest

    monkeypatch.setattr(convolution_triton, "forward_launch", wrong)
    kind = "temporal" if argument == "D" else "spatial"
    with pytest.raises(AssertionError, match=f"^{found}: "):
        check(Case(kind, (16, 16), (2, 3, 4, 4), run=(0, 5)), interpreter)


# ---------------------------------------------------------------- the function around the kernels


def test_the_op_is_registered_with_its_gradient(interpreter: torch.device) -> None:
    """torch.compile takes both ops as they are: shapes, strides and gradients are known without running them."""
    x, weight, mean, scale, shift = (tensor.float() for tensor in Case("spatial", (16, 32), (2, 1, 2, 3)).draw()[0])
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    torch.library.opcheck(convolution_triton.convolve_op, (x, weight, mean, scale.requires_grad_(), shift, 0, 2))
    upstream = torch.ones(2, 32, 1, 2, 3, dtype=torch.bfloat16)
    given = (upstream, x.detach(), weight.detach(), mean, scale.detach(), shift)
    torch.library.opcheck(convolution_triton.convolve_backward_op, given)


@pytest.mark.parametrize("normalise", [False, True])
def test_compiled_code_has_the_same_gradient(normalise: bool, interpreter: torch.device) -> None:
    case = Case("temporal", (16, 32), (1, 3, 2, 3), normalise)
    upstream = case.draw()[1]
    plain = by_convolve(case, upstream, interpreter)
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "convolve", compiled)
        assert all(torch.equal(a, b) for a, b in zip(by_convolve(case, upstream, interpreter), plain, strict=True))


def test_programs_are_merged_in_one_order(interpreter: torch.device) -> None:
    """Results do not depend on the rows of a program, and clips of another memory format give the same bits."""
    x, weight = torch.randn(2, 16, 2, 4, 5).bfloat16(), torch.randn(32, 16, 1, 3, 3).bfloat16()
    whole = convolve(x, weight)
    strided = convolve(x.transpose(0, 1).contiguous().transpose(0, 1), weight)
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))
    settings = convolution_triton.Settings(16, 4, 1)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    launch, y, partials = convolution_triton.forward_launch(x, weight, None, 0, 1, settings)
    launch()
    assert torch.equal(y, whole.frames)
    for group in (1, 2, 3, 100):
        for found, expected in zip(convolution_triton.merge(partials, group), whole[1:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "shape", "supported"),
    [
        (torch.bfloat16, (64, 144, 3, 1, 1), True),
        (torch.bfloat16, (144, 64, 1, 3, 3), True),
        (torch.float32, (64, 144, 3, 1, 1), False),
        (torch.bfloat16, (64, 45, 3, 1, 1), False),
        (torch.bfloat16, (288, 64, 1, 3, 3), False),
        (torch.bfloat16, (64, 64, 3, 3, 3), False),
        (torch.bfloat16, (64, 64, 1, 1, 1), False),
    ],
)
def test_what_the_kernels_take(dtype: torch.dtype, shape: tuple[int, ...], supported: bool) -> None:
    assert supports(torch.empty(shape, device="meta"), dtype) == supported


@pytest.mark.parametrize("channels", range(16, 257, 16))
def test_sections_hold_all_channels(channels: int) -> None:
    """Both are powers of two. At most 112 channels are empty, and none of them in the first section."""
    first, second = convolution_triton.sections(channels)
    assert first <= channels <= first + second < channels + 113
    assert all(n == 0 or (n >= 16 and n.bit_count() == 1) for n in (first, second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, 2, 4, 4)}, r"x must be \(B, 16, D, H, W\) for this weight, not \(1, 3, 2, 4, 4\)"),
        ({"weight": torch.zeros(16, 16, 3, 3, 3)}, r"weight must be .* not \(16, 16, 3, 3, 3\)"),
        ({"repeated": 2}, "frame 2 cannot stand for 1 frames in clips of 2 frames"),
        ({"times": 0}, "frame 0 cannot stand for 0 frames"),
        ({"weight": torch.zeros(16, 16, 3, 1, 1, device="meta")}, "weight must be on cpu like x, not on meta"),
        ({"normalisation": Normalisation(*[torch.zeros(3)] * 3)}, r"mean must have .* 16 channels, not \(3,\)"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convolve(**{"x": torch.zeros(1, 16, 2, 4, 4), "weight": torch.zeros(16, 16, 3, 1, 1), **change})


def test_a_weight_of_another_dtype_is_refused() -> None:
    x = torch.zeros(1, 16, 2, 4, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"weight must be torch.bfloat16 like x, not torch.float32"):
        convolve(x, torch.zeros(16, 16, 3, 1, 1))
