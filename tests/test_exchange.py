"""Clips that travel to the rank that encodes them: crops, views, and which of the two."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import on_two_ranks

from dclr import distributed
from dclr.config import DataConfig, MethodConfig, PretrainConfig
from dclr.data.augmentation import PRETRAIN, draw_augmentation, to_augmentation
from dclr.data.samples import PairBatch
from dclr.kernels import ViewParams, Views, Yuv420, generate_views
from dclr.methods.shuffle import Shuffle
from dclr.training.exchange import clips_of, crops_are_smaller, send_crops, send_views

LENGTH, HEIGHT, WIDTH, VIEW = 3, 25, 31, 8


def make_batch(samples: slice) -> PairBatch:
    """Return some of 6 samples of random pixels, whose frames have different sizes and lie in all orientations."""
    rng = np.random.default_rng(0)
    shapes = [(HEIGHT, WIDTH), *[((HEIGHT + 1) // 2, (WIDTH + 1) // 2)] * 2]
    y, u, v = (torch.from_numpy(rng.integers(0, 256, (6, 2 * LENGTH + 2, *size), np.uint8)) for size in shapes)
    sizes = [(HEIGHT, WIDTH), (14, 20), (13, 21), (20, 11), (HEIGHT, 7), (9, WIDTH)]
    rows = np.stack([[draw_augmentation(rng, *size, PRETRAIN) for _ in range(4)] for size in sizes])
    rows["orientation"] = np.arange(24).reshape(6, 4) % 8
    flags = torch.arange(6) % 2 == 0, torch.arange(6) % 3 == 0
    frames = Yuv420(*(tensor[samples] for tensor in (y, u, v, *flags)))
    params = [to_augmentation(rows[samples, column]) for column in range(4)]
    size = (VIEW, VIEW)
    indices = torch.arange(6)[samples]
    return PairBatch(frames, ViewParams(*params[:2], size), ViewParams(*params[2:], size), indices, {})


def views_of(batch: PairBatch) -> dict[str, Views]:
    return {kind: generate_views(*clips) for kind, clips in clips_of(batch).items()}


def exchange(rank: int, folder: Path) -> None:
    """Send clips in both forms and compare what arrives with the clips of one process, bit for bit."""
    dist.init_process_group("gloo")
    own = slice(3 * rank, 3 * rank + 3)
    batch, every = make_batch(own), views_of(make_batch(slice(6)))
    travelled = []
    real = distributed.all_to_all
    distributed.all_to_all = lambda rows, *counts: travelled.append(rows.nbytes) or real(rows, *counts)
    for kinds in (("key",), ("query", "key")):
        size = 3 * len(kinds)
        shuffle = Shuffle(size, 7)
        # The clips of both ranks by their numbers: with both kinds a rank has query clips first, then key clips.
        expected = [
            torch.cat([views[3 * r : 3 * r + 3] for r in range(2) for views in by_kind])[shuffle.arrived]
            for by_kind in zip(*(every[kind] for kind in kinds), strict=True)
        ]
        for used in (("static", "dynamic"), ()):
            travelled.clear()
            crops = send_crops(shuffle, batch, kinds, stills="static" in used)
            assert len(travelled) == 2
            whole = size * (LENGTH + 1) * (HEIGHT * WIDTH + 2 * 13 * 16)
            assert travelled[0] == size * 226
            assert travelled[1] < whole / 2
            received = [{kind: generate_views(*crops[kind]) for kind in kinds}]
            travelled.clear()
            received.append(send_views(shuffle, views_of(batch), kinds, used))
            assert sum(travelled) == size * 3 * VIEW**2 * 4 * (2 * LENGTH + 1 if used else LENGTH)
            for views in received:
                found = [torch.cat(each) for each in zip(*(views[kind] for kind in kinds), strict=True)]
                compared = zip(found, expected, strict=True) if used else [(found[0], expected[0])]
                assert all(torch.equal(*pair) for pair in compared)
    rows = torch.arange(6.0, dtype=torch.bfloat16)[own, None]
    shuffle = Shuffle(3, 1)
    assert torch.equal(shuffle.send(rows)[:, 0], shuffle.arrived.bfloat16())
    assert torch.equal(shuffle.send_back(shuffle.send(rows)), rows)
    assert torch.equal(shuffle.gather(shuffle.send(rows))[:, 0], torch.arange(6.0).bfloat16())
    dist.destroy_process_group()
    (folder / f"done{rank}").touch()


def test_the_rank_that_receives_a_clip_makes_the_views_of_its_sender(tmp_path: Path) -> None:
    assert on_two_ranks(exchange, tmp_path) == [0, 0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("height", "width", "method", "dtype", "crops"),
    [
        (128, 171, "dclr", torch.bfloat16, True),
        (240, 320, "dclr", torch.bfloat16, True),
        (480, 640, "dclr", torch.bfloat16, False),
        (480, 640, "dclr", torch.float32, True),
        (1080, 1920, "dclr", torch.float32, False),
        (360, 480, "moco", torch.bfloat16, False),  # it has only the rgb view
    ],
)
def test_clips_travel_in_the_form_that_has_fewer_bytes(height, width, method, dtype, crops) -> None:
    config = PretrainConfig(data=DataConfig(clip_length=16, crop_size=112), method=MethodConfig(method=method))
    videos = SimpleNamespace(heights=np.full(4, height), widths=np.full(4, width))
    assert crops_are_smaller(config, PRETRAIN, videos, dtype) is crops
