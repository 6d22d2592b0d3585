"""BatchNorm's statistics: those of a micro-batch need two values, and running statistics are averaged over ranks.

Training does not read the running statistics, so each rank keeps those of its own clips. A checkpoint holds the mean
over ranks, which an evaluation uses. It also holds the statistics of each rank, so that a resumed run continues bit for
bit.
"""

import torch
from torch import Tensor, nn

from dclr import distributed
from dclr.config import Config, PretrainConfig
from dclr.errors import UserError
from dclr.models import backbone_without_memory, map_size


def check_batch_statistics(config: Config, micro_batch: int) -> None:
    """Raise UserError if BatchNorm gets only one value per channel in training, whose variance is not defined.

    The last feature map is the smallest. Clips that are too small for the backbone are refused too.
    `micro_batch`: number of samples that a rank computes at once.
    """
    views = len(config.method.auxiliary_views) if isinstance(config, PretrainConfig) else 1
    if views and isinstance(config, PretrainConfig) and config.method.key_encoder_views == "all":
        views += 1
    backbone = backbone_without_memory(config.model.backbone, config.model.width)
    frames, pixels = config.data.clip_length, config.data.crop_size
    time, height, width = map_size(backbone, frames, pixels)
    if micro_batch * max(views, 1) * time * height * width > 1:
        return
    larger = next((n for n in range(pixels + 1, pixels + 65) if map_size(backbone, frames, n)[1] > 1), None)
    longer = next((n for n in range(frames + 1, frames + 65) if map_size(backbone, n, pixels)[0] > 1), None)
    flags = {"--batch-size": 2 * config.optim.batch_size, "--crop-size": larger, "--clip-length": longer}
    *remedies, last = [f"{flag} {value}" for flag, value in flags.items() if value is not None]
    raise UserError(
        f"--batch-size {config.optim.batch_size} gives micro-batches of 1 clip, and the last feature map of a clip is "
        "1 x 1 x 1, but BatchNorm needs 2 values per channel: "
        f"use at least {', '.join(remedies)}{' or ' if remedies else ''}{last}"
    )


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return running means and variances by their names in the state dict. They are the module's own buffers."""
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }


def gather_statistics(module: nn.Module) -> Tensor:
    """Return every rank's statistics on all ranks: (ranks, N) float32, in the order of `running_statistics`."""
    own = [buffer.flatten() for buffer in running_statistics(module).values()]
    device = next(module.parameters()).device
    return distributed.gather_batch(torch.cat([torch.empty(0, device=device), *own])[None])


def count_statistics(module: nn.Module) -> int:
    """Return N, the number of values in one rank's statistics."""
    return sum(buffer.numel() for buffer in running_statistics(module).values())


def name_statistics(module: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """Split one rank's statistics (N,) into tensors by their names in the module's state dict."""
    own = running_statistics(module)
    split = flat.split([buffer.numel() for buffer in own.values()])
    return {name: values.view_as(buffer) for (name, buffer), values in zip(own.items(), split, strict=True)}


@torch.no_grad()
def set_statistics(module: nn.Module, flat: Tensor) -> None:
    """Copy one rank's statistics (N,), or the mean over ranks, into the module's buffers."""
    for name, values in name_statistics(module, flat).items():
        module.get_buffer(name).copy_(values)


def average_statistics(module: nn.Module) -> None:
    """Replace each rank's statistics by the mean over ranks. Call it when training has ended."""
    set_statistics(module, gather_statistics(module).mean(0))
