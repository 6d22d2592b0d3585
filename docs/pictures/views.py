"""The README's picture: the rgb, static and dynamic view of one clip of a demo video.

    python docs/pictures/views.py      writes docs/pictures/views.jpg within seconds

The augmentation is that of pretraining. Its seed is chosen so that the crop keeps most of the frame.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from dclr.data import augmentation, clips, decode
from dclr.data.demo import render_demo
from dclr.kernels import ViewParams, generate_views

PICTURE = Path(__file__).parent / "views.jpg"
VIDEO = "videos/across/across_0000.mp4"
START, LENGTH, STRIDE, SIZE = 7, 16, 2, 112  # the published clip: 16 frames, every second one, 112 x 112 pixels
STILL = 23  # the source frame of the static view
SEED = 328
SHOWN = range(4, 16, 2)  # frames of the clip, one a column


def plot_views(path: Path) -> None:
    """Write the picture: a row for each view, a column for each shown frame."""
    with tempfile.TemporaryDirectory() as folder:
        video = render_demo(Path(folder), train_per_class=1, test_per_class=0, progress=False) / VIDEO
        record = decode.verify_video(video)
        numbers = clips.window(START, record.frames, LENGTH, STRIDE)
        planes = decode.read_planes(video, record, [*numbers, STILL])
    frames = torch.from_numpy(decode.rgb_of(planes))  # (T + 1, H, W, 3)
    rng = np.random.default_rng(SEED)
    rows = [augmentation.draw_augmentation(rng, record.height, record.width, augmentation.PRETRAIN) for _ in range(2)]
    clip, still = (augmentation.to_augmentation([row]) for row in rows)
    views = generate_views(frames[None, :-1], frames[None, -1], ViewParams(clip, still, (SIZE, SIZE)))

    figure, grid = plt.subplots(3, len(SHOWN), figsize=(1.2 * len(SHOWN) + 0.7, 3.9))
    for line, name, pixels in zip(grid, views._fields, augmentation.to_pixels(views, 0), strict=True):
        for axes, t in zip(line, SHOWN, strict=True):
            axes.imshow(pixels[t])
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=11)
    for axes, t in zip(grid[0], SHOWN, strict=True):
        axes.set_title(f"frame {t}", fontsize=9)
    figure.tight_layout(pad=0.4, h_pad=0.3, w_pad=0.3)
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})
    plt.close(figure)


if __name__ == "__main__":
    plot_views(PICTURE)
