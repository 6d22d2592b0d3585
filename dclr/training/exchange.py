"""The exchange of clips between ranks before they are encoded: each clip goes to the one rank that encodes it.

A clip travels in the form that has fewer bytes, which all ranks compute alike:

- Crops: the uint8 pixels that the clip's augmentation reads, in planes of YUV 4:2:0, and the parameters of the
  augmentation. The rank that receives the clip makes its views. They are the same bit for bit.
- Views: the finished views that the method uses. Videos with large frames travel like this.

Bytes of a clip of 16 frames and a still, with views of 112 x 112 pixels. Random crops of 0.2 to 1 of the frame's area
that fit into the frame cover half of it on average.

    crops of frames of 171 x 128     281,000     whole frames  559,232
    crops of frames of 320 x 240     976,000     whole frames  1,958,400
    three views in bfloat16        2,483,712     in float32    4,967,424

Crops have different sizes. So the parameters travel first, from host to host, and both sides compute the sizes from
them. The host does not wait for its device.

Letters: B clips in a batch, F frames in a sample, T frames in a clip, H, W pixels of the padded buffer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dclr.config import PretrainConfig
from dclr.data.augmentation import AugmentRecipe, to_augmentation
from dclr.data.display import Box
from dclr.data.samples import PairBatch
from dclr.data.store_files import frame_bytes
from dclr.data.videos import VideoSet
from dclr.kernels import Augmentation, ViewParams, Views, Yuv420
from dclr.kernels.backend import to_device
from dclr.kernels.types import AUGMENTATION
from dclr.methods.shuffle import Shuffle

PARAMETERS = np.dtype([("clip", AUGMENTATION), ("still", AUGMENTATION), ("bt709", "?"), ("full_range", "?")])
"""What a clip needs next to its pixels to become views."""


class Clips(NamedTuple):
    """B clips from which views are made: the arguments of `kernels.generate_views`."""

    frames: Yuv420  # (B, T, H, W)
    stills: Yuv420  # (B, H, W)
    params: ViewParams


class Region(NamedTuple):
    """A box in consecutive frames of a sample."""

    sample: int
    first: int  # number of the first frame in the sample
    frames: int
    box: Box  # top and left are even


def clips_of(batch: PairBatch) -> dict[str, Clips]:
    """Return the clips of a batch by their kind, "query" and "key"."""
    return {
        "query": Clips(batch.query_frames, batch.query_stills, batch.query_params),
        "key": Clips(batch.key_frames, batch.key_stills, batch.key_params),
    }


def crops_are_smaller(config: PretrainConfig, recipe: AugmentRecipe, videos: VideoSet, dtype: torch.dtype) -> bool:
    """Return whether crops of these videos have fewer bytes than views, or as many. All ranks return the same.

    The mean share of a frame that a crop covers is taken as the middle of the recipe's scale. The true mean is smaller,
    because boxes that do not fit into the frame are drawn again.
    """
    auxiliary, length = config.method.auxiliary_views, config.data.clip_length
    stills = int("static" in auxiliary)
    values = 3 * config.data.crop_size**2 * (length * (1 + ("dynamic" in auxiliary)) + stills)
    pixels = float((videos.heights.astype(np.float64) * videos.widths).mean())
    return 1.5 * pixels * sum(recipe.scale) / 2 * (length + stills) <= values * dtype.itemsize


# ---------------------------------------------------------------- crops


def send_crops(shuffle: Shuffle, batch: PairBatch, kinds: Sequence[str], stills: bool) -> dict[str, Clips]:
    """Send clips of a micro-batch to the ranks that `shuffle` chooses, and return the received clips by their kind.

    The received boxes begin at the top left of the frame, or next to it: chroma has one value for 2 x 2 pixels, so a
    crop keeps the parity of its box.

    Args:
        kinds: the clips that travel, "query", "key" or both.
        stills: whether the method uses the static view. Without it no still travels. The first frame of a clip is then
            returned as its still, because `kernels.generate_views` needs a still.
    """
    clips, size = clips_of(batch), len(batch.indices)
    length = clips["query"].frames.y.shape[1]
    own = np.concatenate([_to_table(clips[kind]) for kind in kinds])
    rows = shuffle.send(torch.from_numpy(own.view(np.uint8).reshape(len(own), -1)))
    arrived = rows.numpy().view(PARAMETERS)[:, 0]

    # A sample has the frames of the query clip, of the key clip, the query still and the key still.
    starts = {"query": (0, 2 * length), "key": (length, 2 * length + 1)}
    leaving = [
        _regions(own[row], row % size, *starts[kinds[row // size]], length, stills) for row in shuffle.leaving.tolist()
    ]
    arriving = [_regions(arrived[row], row, 0, length, length, stills, moved=True) for row in shuffle.arriving.tolist()]
    frames = batch.frames
    here = _Layout(*frames.y.shape)
    there = _Layout(len(arrived), length + stills, *frames.y.shape[2:])
    device = frames.y.device
    memory = torch.cat([plane.flatten() for plane in (frames.y, frames.u, frames.v)])
    crops = memory[here.numbers(leaving, device)]
    crops = shuffle.send_bytes(
        crops, *([sum(map(_bytes, regions)) for regions in each] for each in (leaving, arriving))
    )
    memory = torch.empty(there.bytes, dtype=torch.uint8, device=device)
    memory[there.numbers(arriving, device)] = crops

    received = {}
    for number, kind in enumerate(kinds):
        part = slice(number * size, (number + 1) * size)
        received[kind] = _to_clips(there.view(memory), arrived[part], part, length, clips[kind].params.size)
    return received


def _to_table(clips: Clips) -> np.ndarray:
    """Return the parameters of B clips, (B,) of dtype PARAMETERS."""
    table = np.zeros(len(clips.frames.y), PARAMETERS)
    for name in ("clip", "still"):
        rows: Augmentation = getattr(clips.params, name)
        for field in fields(rows):
            table[name][field.name] = getattr(rows, field.name).numpy()
    table["bt709"], table["full_range"] = clips.frames.bt709.numpy(), clips.frames.full_range.numpy()
    return table


def _to_clips(planes: Sequence[Tensor], table: np.ndarray, part: slice, length: int, size: tuple[int, int]) -> Clips:
    """Return received clips: a part of the planes, each (n, T or T + 1, H, W), and their parameters."""
    bt709, full_range = (torch.from_numpy(table[name].copy()) for name in ("bt709", "full_range"))
    y, u, v = (plane[part] for plane in planes)
    frames = Yuv420(y, u, v, bt709, full_range)
    has_stills = y.shape[1] > length
    rows = table.copy()
    for name in ("clip", "still"):
        box = rows[name]["box"]
        box[:, :2] %= 2
        rows[name]["size"] = box[:, :2] + box[:, 2:]
    clip = to_augmentation(rows["clip"])
    still = to_augmentation(rows["still"]) if has_stills else clip
    stills = frames.select(np.s_[:, length if has_stills else 0])
    return Clips(frames.select(np.s_[:, :length]), stills, ViewParams(clip, still, size))


def _regions(
    row: np.void, sample: int, first: int, still: int, length: int, stills: bool, moved: bool = False
) -> list[Region]:
    """Return the regions of a clip that travel. `moved`: they are at the top left of the received frames."""
    ranges = [("clip", first, length), *([("still", still, 1)] if stills else [])]
    return [Region(sample, start, count, _even_box(row[name]["box"], moved)) for name, start, count in ranges]


def _even_box(box: np.ndarray, moved: bool) -> Box:
    """Return the smallest box that holds `box` and begins at an even row and column; `moved`: the same box at 0, 0."""
    top, left, height, width = box.tolist()
    above, before = top % 2, left % 2
    return (0 if moved else top - above), (0 if moved else left - before), height + above, width + before


def _bytes(region: Region) -> int:
    """Return the bytes of a region in planes of YUV 4:2:0."""
    return region.frames * frame_bytes(*region.box[2:])


class _Layout:
    """Samples of F frames in one flat memory: the planes y (B, F, H, W), u and v, one after the other."""

    def __init__(self, samples: int, frames: int, height: int, width: int) -> None:
        chroma = ((height + 1) // 2, (width + 1) // 2)
        self.shapes = [(samples, frames, *size) for size in ((height, width), chroma, chroma)]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.bytes = sum(self.sizes)

    def view(self, memory: Tensor) -> list[Tensor]:
        """Return y, u and v as views of the memory."""
        return [part.view(shape) for part, shape in zip(memory.split(self.sizes), self.shapes, strict=True)]

    def numbers(self, clips: Sequence[Sequence[Region]], device: torch.device) -> Tensor:
        """Return the number in the memory of every byte of the regions, (N,) int64.

        The host only lists the boxes. The device counts their rows of pixels, and then the bytes of each row.
        """
        boxes = np.array([box for regions in clips for region in regions for box in self._boxes(region)])
        rows, total = int(boxes[:, 1:3].prod(1).sum()), int(boxes[:, 1:4].prod(1).sum())
        start, frames, height, width, pitch, frame = to_device(torch.from_numpy(boxes), device).unbind(1)
        box = torch.arange(len(boxes), device=device).repeat_interleave(frames * height, output_size=rows)
        row = torch.arange(rows, device=device) - _before(frames * height)[box]  # in its box
        start = start[box] + row // height[box] * frame[box] + row % height[box] * pitch[box]
        width = width[box]
        shift = (start - _before(width)).repeat_interleave(width, output_size=total)
        return torch.arange(total, device=device) + shift

    def _boxes(self, region: Region) -> Iterator[tuple[int, ...]]:
        """Yield for each plane where a region starts in the memory, its frames, rows and columns, and two distances.

        The distances are those from a row to the next one and from a frame to the next one, in bytes.
        """
        base = 0
        for (_, frames, height, width), size, step in zip(self.shapes, self.sizes, (1, 2, 2), strict=True):
            top, left = region.box[0] // step, region.box[1] // step
            rows, columns = -(-region.box[2] // step), -(-region.box[3] // step)
            first = (region.sample * frames + region.first) * height + top
            yield base + first * width + left, region.frames, rows, columns, width, height * width
            base += size


def _before(counts: Tensor) -> Tensor:
    """Return the sum of the counts before each count."""
    return counts.cumsum(0) - counts


# ---------------------------------------------------------------- views


def send_views(
    shuffle: Shuffle, views: dict[str, Views], kinds: Sequence[str], used: Sequence[str]
) -> dict[str, Views]:
    """Send views of clips to the ranks that `shuffle` chooses, and return the received views by their kind.

    Args:
        views: this rank's views by kind, each (B, 3, T, H, W), or in the layout of `dclr.kernels.space_to_depth`.
        kinds: the clips that travel, "query", "key" or both.
        used: the auxiliary views that the method uses. The rgb view replaces each view that is not used.
    """
    length = views[kinds[0]].rgb.shape[2]
    size = len(views[kinds[0]].rgb)

    def send(name: str, frames: int) -> list[Tensor]:
        rows = torch.cat([getattr(views[kind], name)[:, :, :frames] for kind in kinds])
        # In memory the channels are last, and they stay last.
        received = shuffle.send(rows.movedim(1, -1)).movedim(-1, 1)
        return list(received.expand(-1, -1, length, -1, -1).split(size))

    rgb = send("rgb", length)
    static = send("static", 1) if "static" in used else rgb
    dynamic = send("dynamic", length) if "dynamic" in used else rgb
    return {kind: Views(*each) for kind, *each in zip(kinds, rgb, static, dynamic, strict=True)}
