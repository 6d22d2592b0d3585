"""One training sample of a video as a picture (`python -m dclr.evaluation.view_sheet`)."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dclr.config import DataConfig, Parser
from dclr.data import augmentation, clips, decode
from dclr.errors import UserError
from dclr.evaluation.figures import view_sheet
from kernels import ViewParams, Yuv420, describe, generate_views


def to_yuv420(parts: Sequence[decode.YuvFrames]) -> Yuv420:
    """Frames of B clips of one size (T frames each) -> a batch."""
    y, u, v = (torch.from_numpy(np.stack([getattr(part, plane) for part in parts])) for plane in "yuv")
    bt709, full_range = (torch.tensor([getattr(part, flag) for part in parts]) for flag in ("bt709", "full_range"))
    return Yuv420(y, u, v, bt709, full_range)


def draw_view_sheet(video: Path, out: Path, seed: int) -> str:
    """Write the picture of one training sample of `video`, query and key; returns what to tell the user.

    Raises UserError: the video cannot be read, the picture cannot be written.
    """
    config = DataConfig()
    length, size = config.clip_length, (config.crop_size, config.crop_size)
    try:
        record = decode.verify_video(video)
        rng = clips.sample_rng(seed, 0, 0)
        pair = clips.draw_pair(rng, record.frames, length, config.clip_stride)
        numbers = np.concatenate([pair.query, pair.key, [pair.query_still, pair.key_still]])
        planes = decode.read_planes(video, record, numbers)
    except decode.UnreadableVideo as error:
        raise UserError(f"--video {video}: {error}") from None
    rgb = decode.rgb_of(planes)
    rows = [augmentation.draw_augmentation(rng, record.height, record.width, augmentation.PRETRAIN) for _ in range(4)]

    def part(numbers: slice) -> decode.YuvFrames:
        return decode.YuvFrames(
            planes.y[numbers], planes.u[numbers], planes.v[numbers], planes.bt709, planes.full_range
        )

    # As the loader draws them: query, its still, key, its still.
    frames = to_yuv420([part(slice(0, length)), part(slice(length, 2 * length))])
    stills = to_yuv420([part(slice(2 * length, 2 * length + 1)), part(slice(2 * length + 1, None))])
    stills = stills.select(np.s_[:, 0])
    params = ViewParams(
        augmentation.to_augmentation([rows[0], rows[2]]), augmentation.to_augmentation([rows[1], rows[3]]), size
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = generate_views(frames.to(device), stills.to(device), params)

    samples = []
    for b, (name, numbers) in enumerate((("query", pair.query), ("key", pair.key))):
        clip, still = rgb[b * length : (b + 1) * length], rgb[2 * length + b]
        name += f", frames {numbers[0]} to {numbers[-1]}"
        samples.append((name, clip, still, rows[2 * b], rows[2 * b + 1], augmentation.to_pixels(made, b)))
    space = f"{'BT.709' if planes.bt709 else 'BT.601'}, {'full' if planes.full_range else 'limited'} range"
    title = (
        f"{video.name}: {record.frames} frames of {record.width} x {record.height}, YUV 4:2:0 ({space}); seed {seed}"
    )
    try:
        view_sheet(samples, augmentation.spread(length), title, out)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise UserError(f"--out {out}: cannot write it ({error}); name a .png file in a folder that exists") from None
    return f"views by {describe(device)}\nwrote {out}"


def make_parser() -> Parser:
    what = "A picture of what the network sees of a video: source, rgb, static and dynamic view of a query clip and its key clip."
    parser = Parser(prog="python -m dclr.evaluation.view_sheet", description=what, allow_abbrev=False)
    parser.add_argument("--video", type=Path, required=True, help="a video file")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="the picture to write (default: views.png)")
    parser.add_argument("--seed", type=int, default=0, help="change it to see other windows and other draws")
    return parser


def main() -> None:
    try:
        arguments = make_parser().parse_args()
        if arguments.seed < 0:
            raise UserError(f"--seed is {arguments.seed}, but must be at least 0")
        print(draw_view_sheet(arguments.video, arguments.out, arguments.seed))
    except UserError as error:
        print(f"dclr.evaluation.view_sheet: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
