"""A picture of what the network sees of a video in one training sample.

python -m dclr.evaluation.view_sheet --video FILE --out views.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

from dclr.config import DataConfig, Parser
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
    config = DataConfig()
    length, size = config.clip_length, (config.crop_size, config.crop_size)
    try:
        record = decode.verify_video(video)
        rng = clips.sample_rng(seed, 0, 0)
        pair = clips.draw_pair(rng, record.frames, length, config.clip_stride)
        recipe = augmentation.pretrain_recipe(1.0, form="additive")
        # In the order of the data loader: query clip, key clip, still of the query, still of the key.
        numbers = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        planes = decode.read_planes(video, record, numbers)
    except decode.UnreadableVideo as error:
        raise UserError(f"--video {video}: {error}") from None
    rgb = shown(decode.rgb_of(planes), planes.display)
    # In the order of the data loader: query clip, its still, key clip, its still.
    coded = record.height, record.width
    rows = [augmentation.draw_augmentation(rng, *coded, recipe, record.display) for _ in range(4)]
    outlined = [row.copy() for row in rows]
    for row in outlined:
        row["box"] = record.display.shown_box(row["box"].tolist(), *coded)

    frames = stack_frames([planes.select(slice(0, length)), planes.select(slice(length, 2 * length))])
    stills = stack_frames([planes.select([2 * length]), planes.select([2 * length + 1])]).select(np.s_[:, 0])
    params = ViewParams(augmentation.to_augmentation(rows[0::2]), augmentation.to_augmentation(rows[1::2]), size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = generate_views(frames.to(device), stills.to(device), params)

    samples = []
    for b, (name, numbers) in enumerate((("query", pair.query), ("key", pair.key))):
        clip, still = rgb[b * length : (b + 1) * length], rgb[2 * length + b]
        name += f", frames {numbers[0]} to {numbers[-1]}"
        samples.append((name, clip, still, *outlined[2 * b : 2 * b + 2], augmentation.to_pixels(views, b)))
    space = f"{'BT.709' if planes.bt709 else 'BT.601'}, {'full' if planes.full_range else 'limited'} range"
    title = (
        f"{video.name}: {record.frames} frames of {record.width} x {record.height}, YUV 4:2:0 ({space}); seed {seed}"
    )
    try:
        plot_view_sheet(samples, clips.evenly_spaced(length, augmentation.GRID_FRAMES), title, out)
    except (OSError, ValueError) as error:  # ValueError: not the suffix of a picture
        raise UserError(f"--out {out}: cannot write it ({error}); name a .png file in a folder that exists") from None
    return f"views by {describe(device)}\nwrote {out}"


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
