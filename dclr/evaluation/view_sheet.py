"""A picture of what the network sees of a video in one training sample.

python -m dclr.evaluation.view_sheet --video FILE --out views.png
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dclr.config import MethodConfig, Parser, PretrainConfig, RunConfig
from dclr.data import augmentation, clips, decode
from dclr.data.display import shown
from dclr.data.samples import stack_frames
from dclr.errors import UserError
from dclr.evaluation.figures import plot_view_sheet
from dclr.kernels import ViewParams, describe, generate_views


def write_view_sheet(video: Path, out: Path, seed: int) -> str:
    """Write the picture of one training sample of `video`, query and key. Return the message for the user.

    Training with `seed` and the preset ucf101 draws the same sample from the first video of its data set in epoch 0.

    Raises:
        UserError: the video cannot be read, or the picture cannot be written.
    """
    try:
        record = decode.verify_video(video)
        plot_sample(
            video.name,
            record.frames,
            lambda numbers: decode.read_planes(video, record, numbers),
            PretrainConfig(method=MethodConfig(jitter_form="additive"), run=RunConfig(seed=seed)),
            out,
        )
    except decode.UnreadableVideo as error:
        raise UserError(f"--video {video}: {error}") from None
    return f"views by {describe(_device())}\nwrote {out}"


def plot_sample(
    name: str,
    frames: int,
    read: Callable[[np.ndarray], decode.YuvFrames],
    config: PretrainConfig,
    out: Path,
    same_frames: bool = False,
) -> None:
    """Plot the training sample of a run's first video in epoch 0, query and key, as a picture.

    Args:
        name: of the video, for the title.
        frames: number of frames of the video.
        read: returns the frames with the given numbers, see `decode.read_planes`.
        same_frames: see `clips.draw_pair`.

    Raises:
        UnreadableVideo: see `read`.
        UserError: the picture cannot be written.
    """
    data, method, seed = config.data, config.method, config.run.seed
    length, size = data.clip_length, (data.crop_size, data.crop_size)
    rng = clips.sample_rng(seed, 0, 0)
    pair = clips.draw_pair(rng, frames, length, data.clip_stride, same_frames, method.distinct_starts)
    recipe = augmentation.pretrain_recipe(method.jitter, method.augmentation, method.jitter_form)
    # In the order of the data loader: query clip, key clip, still of the query, still of the key.
    planes = read(np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]]))
    rgb = shown(decode.rgb_of(planes), planes.display)
    # In the order of the data loader: query clip, its still, key clip, its still.
    height, width = planes.y.shape[1:]
    rows = [augmentation.draw_augmentation(rng, height, width, recipe, planes.display) for _ in range(4)]
    outlined = [row.copy() for row in rows]
    for row in outlined:
        row["box"] = planes.display.shown_box(row["box"].tolist(), height, width)

    clip_frames = stack_frames([planes.select(slice(0, length)), planes.select(slice(length, 2 * length))])
    stills = stack_frames([planes.select([2 * length]), planes.select([2 * length + 1])]).select(np.s_[:, 0])
    params = ViewParams(augmentation.to_augmentation(rows[0::2]), augmentation.to_augmentation(rows[1::2]), size)
    boundary: Any = method.boundary
    views = generate_views(clip_frames.to(_device()), stills.to(_device()), params, boundary=boundary)

    samples = []
    for b, (role, numbers) in enumerate((("query", pair.query), ("key", pair.key))):
        clip, still = rgb[b * length : (b + 1) * length], rgb[2 * length + b]
        words = f"{role}, frames {numbers[0]} to {numbers[-1]}"
        samples.append((words, clip, still, *outlined[2 * b : 2 * b + 2], augmentation.to_pixels(views, b)))
    space = f"{'BT.709' if planes.bt709 else 'BT.601'}, {'full' if planes.full_range else 'limited'} range"
    title = f"{name}: {frames} frames of {width} x {height}, YUV 4:2:0 ({space}); seed {seed}"
    try:
        plot_view_sheet(samples, clips.evenly_spaced(length, augmentation.GRID_FRAMES), title, out)
    except (OSError, ValueError) as error:  # ValueError: not the suffix of a picture
        raise UserError(f"--out {out}: cannot write it ({error}); name a .png file in a folder that exists") from None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_parser() -> Parser:
    """Return the parser of this module's command line."""
    what = (
        "Write a picture of what the network sees of a video: the source frames and the rgb, static and dynamic view "
        "of a query clip and of its key clip."
    )
    parser = Parser(prog="python -m dclr.evaluation.view_sheet", description=what, allow_abbrev=False)
    parser.add_argument("--video", type=Path, required=True, help="a video file")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="the picture to write (default: views.png)")
    parser.add_argument(
        "--seed", type=int, default=0, help="change the seed to see other clips and other augmentations (default: 0)"
    )
    return parser


def main() -> None:
    try:
        arguments = make_parser().parse_args()
        if arguments.seed < 0:
            raise UserError(f"--seed is {arguments.seed}, but must be at least 0")
        print(write_view_sheet(arguments.video, arguments.out, arguments.seed))
    except UserError as error:
        print(f"dclr.evaluation.view_sheet: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
