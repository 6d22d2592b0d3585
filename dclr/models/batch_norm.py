"""Batch normalisation of several views with joint statistics, and ReLU.

With mean m and variance v of all frames of all views, normalisation with ReLU and an optional shortcut r is

    y = relu(scale * x + shift + r),  scale = weight / sqrt(v + eps),  shift = bias - m * scale.

The backward pass takes the mask of ReLU from its input x, which it reads anyway, and not from its output y. Only with a
shortcut it reads y. With g = dy where the mask is true (else 0), n values of a channel in all views, and c the number
of equal frames that a frame stands for, the gradients are

    dbias = sum g,   dweight = sum g (x - m) / sqrt(v + eps),   dr = g,
    dx = scale * (g - c / n * (dbias + (x - m) / sqrt(v + eps) * dweight)).

Where m and v are computed apart (kernels/convolution.py), they have gradients of their own instead:

    dm = -scale * sum g,   dv = -scale / 2 * sum g (x - m) / (v + eps),   dx = scale * g.

The gradient dy of a frame that stands for c frames is already the sum over these c frames. Source of the formulas:
Ioffe and Szegedy, ICML 2015, arXiv 1502.03167, section 3.

Letters: B clips, C channels, D frames in memory, H, W pixels, N = B * D frames of all clips of a view.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dclr.kernels.convolution import Normalisation
from dclr.models.clips import Clips

_CHUNK = 2**19
"""Values that are computed at once where the code is not compiled. Intermediate results of so many values stay in a
CPU's cache."""


class BatchNorm(nn.BatchNorm3d):
    """Batch normalisation that takes several views, and whose statistics are exact to float32 on a CPU.

    torch's CPU kernel for channels_last_3d sums each channel in one float32 number. With 6 x 64 x 16 x 56 x 56 values
    its result is off by 4e-5 of the largest value (torch 2.11). Such an error differs between CPUs, and training
    amplifies it. Here sums are taken frame by frame and added in float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, T, H, W)."""
        return self.normalise([Clips(x)], relu=False)[0].frames

    def normalise(
        self,
        views: Sequence[Clips],
        relu: bool = True,
        shortcuts: Sequence[Tensor] = (),
        extra: int = 0,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> list[Clips]:
        """Normalise views, in training with the statistics of all their frames. Then add shortcuts and apply ReLU.

        Args:
            views: clips of C + extra channels. The last `extra` channels are zero and stay zero.
            shortcuts: one tensor for each view, with the shape of its frames; or none.
            statistics: the mean and the biased variance (C + extra,) over all views. None computes them.

        Raises:
            ValueError: in training, all views together have only one value per channel.
        """
        frames = [_channels_last(view.frames) for view in views]
        shortcuts = [_channels_last(shortcut) for shortcut in shortcuts]
        weight, bias = _padded(self.weight, extra), _padded(self.bias, extra)
        if self.training:
            count = _count(views)
            runs = [number for view in views for number in (view.repeated, view.times)]
            given = (None, None) if statistics is None else statistics
            *outputs, mean, variance = cast(
                tuple[Tensor, ...],
                _Normalise.apply(weight, bias, *given, self.eps, relu, len(views), *runs, *frames, *shortcuts),
            )
            self._update(mean, variance, count)
        else:
            mean, variance = _padded(self.running_mean, extra), _padded(self.running_var, extra, 1.0)
            outputs = [F.batch_norm(x, mean, variance, weight, bias, eps=self.eps) for x in frames]
            if shortcuts:
                outputs = [y + shortcut for y, shortcut in zip(outputs, shortcuts, strict=True)]
            outputs = [F.relu(y, inplace=True) for y in outputs] if relu else outputs
        return [view._replace(frames=y) for view, y in zip(views, outputs, strict=True)]

    def normalisation(
        self, views: Sequence[Clips], extra: int = 0, statistics: tuple[Tensor, Tensor] | None = None
    ) -> Normalisation:
        """Return the normalisation for a convolution that applies it itself. The arguments are those of `normalise`.

        In training its gradient reaches the views through their statistics.

        Raises:
            ValueError: see `normalise`.
        """
        if self.training:
            count = _count(views)
            if statistics is None:
                runs = [number for view in views for number in (view.repeated, view.times)]
                frames = [_channels_last(view.frames) for view in views]
                statistics = cast(tuple[Tensor, Tensor], _Statistics.apply(len(views), *runs, *frames))
            mean, variance = statistics
            self._update(mean, variance, count)
        else:
            mean, variance = _padded(self.running_mean, extra), _padded(self.running_var, extra, 1.0)
        weight, bias = _padded(self.weight, extra), _padded(self.bias, extra)
        scale = weight.double() * torch.rsqrt(variance.double() + self.eps)
        return Normalisation(mean.to(weight.dtype), scale.to(weight.dtype), bias)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards those (C + extra,) of `count` values per channel."""
        if not self.track_running_stats:  # see recompute.py
            return
        running_mean, running_var, batches = cast(
            tuple[Tensor, Tensor, Tensor], (self.running_mean, self.running_var, self.num_batches_tracked)
        )
        momentum = 0.1 if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        running_mean.lerp_(mean[: self.num_features].to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased[: self.num_features].to(running_var.dtype), momentum)
        batches.add_(1)


def replace_norms(module: nn.Module) -> None:
    """Replace every nn.BatchNorm3d inside a module of torchvision by a BatchNorm with the same eps and momentum."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm3d:
            setattr(module, name, BatchNorm(child.num_features, child.eps, child.momentum))
        else:
            replace_norms(child)


def count_values(views: Sequence[Clips]) -> int:
    """Return the number of values per channel in all frames of all views. Each of several equal frames counts."""
    return sum(view.frames[:, 0, 0].numel() * view.length for view in views)


def _count(views: Sequence[Clips]) -> int:
    """Return `count_values(views)`. Raises ValueError below 2: training needs a variance."""
    count = count_values(views)
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {count}")
    return count


def batch_statistics(views: Sequence[Clips]) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel over all frames of all views, both (C,) float64.

    The frames are in channels_last_3d memory. Each frame's mean and variance are computed first, so that a large mean
    does not cancel. They are merged by the number of frames that each frame stands for.
    """
    means, variances, weights = [], [], []
    for view in views:
        mean, variance = _frame_statistics(view.frames)  # (N, C)
        means.append(mean)
        variances.append(variance)
        weights.append((view.counts() * view.frames[0, 0, 0].numel()).repeat(len(view.frames)))  # (N,)
    weight = torch.cat(weights)[:, None].double() / count_values(views)
    return _merge(weight, torch.cat(means), torch.cat(variances))


def merge_statistics(
    views: Sequence[Clips], means: Sequence[Tensor], variances: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of all views, both (C,) float64, from those of each view."""
    shares = [count_values([view]) / count_values(views) for view in views]
    weights = [torch.full_like(mean, share, dtype=torch.float64) for mean, share in zip(means, shares, strict=True)]
    return _merge(torch.stack(weights), torch.stack([*means]), torch.stack([*variances]))


def _merge(weight: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of n groups together, both (C,) float64.

    Args:
        weight: the share of each group in the number of values, (n, 1) or (n, C) float64.
        means: the mean of each group, (n, C).
        variances: the biased variance of each group, (n, C).
    """
    means, variances = means.double(), variances.double()
    mean = (weight * means).sum(0)
    return mean, (weight * (variances + (means - mean).square())).sum(0)


class _Normalise(torch.autograd.Function):
    """Normalisation of several views in training, with its gradient. The formulas are at the top of the file."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        relu: bool,
        count: int,
        *runs_and_tensors: Any,
    ) -> tuple[Tensor, ...]:
        """Return one output for each view, then the batch's mean and variance (C,) float64.

        Args:
            mean, variance: (C,) float64, and then they get gradients. Both None: they are computed from the frames, and
                the gradient of the frames includes the part that flows through them.
            count: number of views.
            runs_and_tensors: `repeated` and `times` of each view, then the frames of the views, then their shortcuts,
                if there are any. torch.compile would not keep lists.
        """
        runs, tensors = runs_and_tensors[: 2 * count], runs_and_tensors[2 * count :]
        frames, shortcuts = tensors[:count], tensors[count:]
        views = [Clips(frames[i], runs[2 * i], runs[2 * i + 1]) for i in range(count)]
        ctx.given = mean is not None
        # An autograd.Function may not return its inputs, so they are copied.
        mean, variance = batch_statistics(views) if mean is None else (mean.clone(), cast(Tensor, variance).clone())
        rate = torch.rsqrt(variance + eps)
        scale = (weight.double() * rate).to(weight.dtype)[:, None, None]
        shift = (bias.double() - mean * weight.double() * rate).to(weight.dtype)[:, None, None]

        def output(out: Tensor | None, x: Tensor, *shortcut: Tensor) -> Tensor:
            y = _affine(x.to(shift.dtype), scale, shift, out)
            y = y.add_(shortcut[0]) if shortcut else y
            return F.relu_(y) if relu else y

        if _native(frames[0]) and not shortcuts:
            outputs = [_native_affine(x, scale, shift) for x in frames]
            outputs = [F.relu_(y) for y in outputs] if relu else outputs
        else:
            outputs = [_by_frames(output, frames[i], *shortcuts[i : i + 1]) for i in range(count)]
        ctx.save_for_backward(scale, shift, mean, rate, *frames, *(outputs if relu and shortcuts else ()))
        ctx.relu, ctx.shortcuts, ctx.count, ctx.runs = relu, len(shortcuts), count, runs
        ctx.mark_non_differentiable(mean, variance)
        return *outputs, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of weight, bias, given mean and variance, frames and shortcuts."""
        scale, shift, mean, rate, *saved = ctx.saved_tensors
        frames, outputs = saved[: ctx.count], saved[ctx.count :]
        views = [Clips(frames[i], ctx.runs[2 * i], ctx.runs[2 * i + 1]) for i in range(ctx.count)]
        upstreams = [_channels_last(gradient) for gradient in gradients[: ctx.count]]
        if len(outputs) > 0:
            upstreams = [
                _by_frames(lambda _, dy, y: _passed(dy, y), upstreams[i], outputs[i]) for i in range(ctx.count)
            ]
        masked = ctx.relu and not ctx.shortcuts
        if masked and _native(frames[0]):  # a mask selects, so bfloat16 loses nothing
            upstreams = [_passed(dy, _native_affine(x, scale, shift)) for x, dy in zip(frames, upstreams, strict=True)]
            masked = False

        def passed(x: Tensor, upstream: Tensor) -> Tensor:
            """Return the gradient that passes ReLU, from its input."""
            upstream = upstream.to(scale.dtype)
            # The factors are in another order than in `forward`. Else torch.compile would take the product for the same
            # value and keep it for the backward pass, in float32.
            return _passed(upstream, _affine(scale, x.to(scale.dtype), shift)) if masked else upstream

        sums = []
        for x, upstream in zip(frames, upstreams, strict=True):
            if _native(x):
                sums.append(_native_sums(x, upstream, mean))
                continue
            for chunk, dy in _chunks(x, upstream):
                g = _precise(passed(chunk, dy))
                centred = _precise(chunk) - mean.to(g.dtype)[:, None, None]
                sums.append(torch.stack([g.sum((2, 3)), (g * centred).sum((2, 3))]))
        total, product = torch.cat(sums, dim=1).double().sum(1)  # (C,): sum g, sum g (x - m)

        # dx = scale * g + c * (offset + slope * x)
        wide = scale.flatten().double()
        slope = -wide * product * rate.square() / count_values(views)
        offset = (-wide * total / count_values(views) - slope * mean).to(scale.dtype)[:, None, None]
        slope = slope.to(scale.dtype)[:, None, None]

        def gradient(out: Tensor | None, x: Tensor, upstream: Tensor, *count: Tensor) -> Tensor:
            if ctx.given:
                return torch.mul(passed(x, upstream), scale, out=out)
            common = _affine(x.to(scale.dtype), slope, offset)
            return _affine(passed(x, upstream), scale, common * count[0] if count else common, out)

        inputs = []
        for view, upstream in zip(views, upstreams, strict=True):
            counts = (_counts(view),) if view.times > 1 else ()
            inputs.append(_by_frames(gradient, view.frames, upstream, *counts))
        weights = (product * rate).to(scale.dtype), total.to(scale.dtype)
        given = (-wide * total, -0.5 * wide * product * rate.square()) if ctx.given else (None, None)
        return *weights, *given, *[None] * (3 + 2 * ctx.count), *inputs, *(upstreams if ctx.shortcuts else ())


class _Statistics(torch.autograd.Function):
    """`batch_statistics` with its gradient dx = c / n * (dm + 2 (x - m) dv)."""

    @staticmethod
    def forward(ctx: Any, count: int, *runs_and_frames: Any) -> tuple[Tensor, Tensor]:
        """Return the mean and the biased variance, both (C,) float64.

        Args:
            count: number of views.
            runs_and_frames: `repeated` and `times` of each view, then the frames of the views. torch.compile would not
                keep lists.
        """
        runs, frames = runs_and_frames[: 2 * count], runs_and_frames[2 * count :]
        mean, variance = batch_statistics([Clips(frames[i], runs[2 * i], runs[2 * i + 1]) for i in range(count)])
        ctx.save_for_backward(mean, *frames)
        ctx.count, ctx.runs = count, runs
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Return the gradients of the frames."""
        of_mean, of_variance = gradients
        mean, *frames = ctx.saved_tensors
        views = [Clips(frames[i], ctx.runs[2 * i], ctx.runs[2 * i + 1]) for i in range(ctx.count)]
        precise = torch.promote_types(frames[0].dtype, torch.float32)
        slope = 2 * of_variance / count_values(views)
        offset = (of_mean / count_values(views) - slope * mean).to(precise)[:, None, None]
        slope = slope.to(precise)[:, None, None]

        def gradient(out: Tensor | None, x: Tensor, count: Tensor) -> Tensor:
            return torch.mul(_affine(x.to(precise), slope, offset), count, out=out)

        inputs = [_by_frames(gradient, view.frames, _counts(view)) for view in views]
        return *[None] * (1 + 2 * ctx.count), *inputs


def _counts(view: Clips) -> Tensor:
    """Return how many frames of its clip each frame of all clips stands for, (N, 1, 1, 1) int64."""
    return view.counts().repeat(len(view.frames))[:, None, None, None]


def _affine(a: Tensor, b: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a * b + c, written to `out` if it is given."""
    # addcmul is faster on a CPU. torch.compile makes of it a product with 1, which it keeps for the backward pass.
    return a * b + c if torch.compiler.is_compiling() else torch.addcmul(c, a, b, out=out)


def _native(x: Tensor) -> bool:
    """Return whether torch's own kernels are used, which read bfloat16, compute in float32 and write bfloat16."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _native_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * x + shift in bfloat16, in one pass."""
    scale = scale.flatten()
    return torch.batch_norm(
        x, scale, shift.flatten(), torch.zeros_like(scale), torch.ones_like(scale), False, 0.0, 0.0, False
    )


def _native_sums(x: Tensor, g: Tensor, mean: Tensor) -> Tensor:
    """Return sum g and sum g (x - mean) of each frame, (2, N, C) float32."""
    mean = mean.float()
    one = torch.ones_like(mean)
    sums = []
    for frame, dy in zip(_frames(x).split(1), _frames(g).split(1), strict=True):
        _, product, total = torch.ops.aten.native_batch_norm_backward(
            dy, frame, one, mean, one, mean, one, True, 0.0, [False, True, True]
        )
        sums.append(torch.stack([total, product]))
    return torch.stack(sums, dim=1)


def _passed(upstream: Tensor, reference: Tensor) -> Tensor:
    """Return the gradient where `reference` is above 0, and 0 elsewhere."""
    return torch.ops.aten.threshold_backward(upstream, reference, 0)


def _frame_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each frame, both (N, C)."""
    means, variances = [], []
    if _native(x):
        running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])  # their dtype makes the results float32
        found = [torch.ops.aten.batch_norm_update_stats(frame, *running, 0.0) for frame in _frames(x).split(1)]
        return torch.stack([mean for mean, _ in found]), torch.stack([variance for _, variance in found])
    for (chunk,) in _chunks(x):
        chunk = _precise(chunk)
        if torch.compiler.is_compiling():  # one pass over the values
            variance, mean = torch.var_mean(chunk, (2, 3), correction=0)
        else:  # var_mean takes 9 times as long on a CPU
            mean = chunk.mean((2, 3))
            variance = (chunk - mean[:, :, None, None]).square_().mean((2, 3))
        means.append(mean)
        variances.append(variance)
    return torch.cat(means), torch.cat(variances)


def _precise(frames: Tensor) -> Tensor:
    """Return the frames in the dtype for sums: float32 for bfloat16, and float64 for float32 on a CPU."""
    if frames.dtype == torch.float32 and frames.device.type == "cpu" and not torch.compiler.is_compiling():
        return frames.double()
    return frames.to(torch.promote_types(frames.dtype, torch.float32))


def _frames(x: Tensor) -> Tensor:
    """Return (B, C, D, H, W) in channels_last_3d memory as (N, C, H, W), without a copy. (N, 1, 1, 1) stays."""
    return x if x.dim() == 4 else x.transpose(1, 2).view(-1, x.shape[1], *x.shape[3:])


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield chunks of frames of all tensors: (n, C, H, W) each. Compiled code gets all frames at once."""
    frames = [_frames(tensor) for tensor in tensors]
    if torch.compiler.is_compiling() or tensors[0].device.type != "cpu" or frames[0].numel() <= _CHUNK:
        yield tuple(frames)
        return
    size = max(1, _CHUNK // frames[0][0].numel())
    yield from zip(*(tensor.split(size) for tensor in frames), strict=True)


def _by_frames(compute: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """Return `compute` of all tensors' frames with the shape, the memory format and the dtype of x.

    Args:
        compute: gets a tensor for its result, or None, and then chunks of all tensors.
    """
    if torch.compiler.is_compiling():
        y = compute(None, *(_frames(tensor) for tensor in (x, *others))).to(x.dtype)
        return y.view(x.shape[0], x.shape[2], *y.shape[1:]).transpose(1, 2)
    result = torch.empty_like(x)
    same = x.dtype in (torch.float32, torch.float64)  # else the arithmetic has another dtype than the result
    for *chunk, out in _chunks(x, *others, result):
        y = compute(out if same else None, *chunk)
        if y is not out:
            out.copy_(y)
    return result


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _padded(values: Tensor | None, extra: int, value: float = 0.0) -> Tensor:
    """Return (C,) values with `extra` more."""
    assert values is not None
    return F.pad(values, (0, extra), value=value) if extra else values
