"""Activation maps: the share inside a mask against loops over pixels, and `eval.py maps` on two small videos."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dclr.commands import evaluate as evaluation
from dclr.config import make_config, write_config
from dclr.data.decode import YuvFrames
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation import activation_maps
from dclr.evaluation.activation_maps import Clip, check_maps, compute_maps, energy_share, why_too_coarse
from dclr.kernels import Views, generate_views
from dclr.models import KINETICS, build_backbone, save_backbone


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread. Networks this small gain nothing from a second one (see conftest.one_process)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def walkers(tmp_path_factory) -> Path:
    """Two classes of one video each, of different sizes: a textured square moves right in one and left in the other."""
    folder = tmp_path_factory.mktemp("walkers")
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(40, 90, (1, 60, 120)), 24, axis=0)
    square = rng.integers(130, 230, (14, 14))
    for t in range(24):
        frames[t, 20:34, 10 + 4 * t : 24 + 4 * t] = square
    for name, pixels in (("right", frames), ("left", frames[:, :40, ::-1])):
        for split in ("train", "test"):
            (folder / split / name).mkdir(parents=True)
            write_video(
                folder / split / name / f"{name}.mp4", np.repeat(pixels[..., None], 3, axis=-1).astype(np.uint8)
            )
    return folder


@pytest.mark.parametrize(("value", "message"), [(0, "is zero everywhere"), (np.nan, "is not finite")])
def test_a_map_without_a_share_is_refused_by_the_video(value, message):
    check_maps("a.mp4", {"A_v": np.ones((1, 2, 2), np.float32)})
    with pytest.raises(UserError, match=f"a.mp4 {message}"):
        check_maps("a.mp4", {"A_v": np.full((1, 2, 2), value, np.float32)})


@pytest.mark.parametrize("size", [(2, 7, 7), (1, 2, 3), (3, 5, 4)])
def test_the_energy_share_is_a_sum_over_pixels_and_a_flat_map_gives_the_masks_share(size):
    rng = np.random.default_rng(5)
    mask = rng.random((8, 23, 30)) < 0.3
    assert energy_share(np.full(size, 0.7, np.float32), mask) == pytest.approx(mask.mean(), rel=1e-12)

    activation = rng.random(size)
    inside = whole = 0.0
    for t, y, x in np.ndindex(*mask.shape):
        # The cell that contains the centre of the pixel.
        cell = [
            math.floor((p + 0.5) / fine * coarse) for p, fine, coarse in zip((t, y, x), mask.shape, size, strict=True)
        ]
        whole += activation[*cell]
        inside += activation[*cell] * mask[t, y, x]
    assert energy_share(activation, mask) == pytest.approx(inside / whole, rel=1e-12)


def test_a_warning_comes_with_maps_of_fewer_than_four_cells_a_side():
    assert why_too_coarse(4, 4) == why_too_coarse(7, 7) == ""
    assert "3 x 4 cells" in why_too_coarse(3, 4)


def test_a_map_inside_the_mask_has_all_its_energy_there():
    activation, mask = np.zeros((1, 2, 2)), np.zeros((4, 10, 10), bool)
    activation[0, 1, 0] = 3
    mask[:, 5:, :5] = True
    assert energy_share(activation, mask) == 1
    assert energy_share(activation, ~mask) == 0
    with pytest.raises(ValueError, match="zero everywhere"):
        energy_share(np.zeros((1, 2, 2)), mask)
    with pytest.raises(ValueError, match="negative"):
        energy_share(activation - 1, mask)


def test_each_map_is_that_of_its_view_also_for_weights_with_statistics_of_their_own(monkeypatch):
    """A frame difference has no mean to subtract, but rgb and static views have one."""
    rng = np.random.default_rng(2)
    planes = (rng.integers(0, 256, size, dtype=np.uint8) for size in ((8, 40, 48), (8, 20, 24), (8, 20, 24)))
    frames = YuvFrames(*planes, bt709=False, full_range=True)
    clip = Clip("a.mp4", "a", frames, np.zeros((8, 40, 40, 3), np.uint8), np.zeros((8, 40, 40), bool))
    made: list[Views] = []

    def generate(*arguments: Any, **options: Any) -> Views:
        made.append(generate_views(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(activation_maps, "generate_views", generate)
    torch.manual_seed(0)
    backbone = build_backbone("r2plus1d_10", 4).eval()
    backbone.statistics = KINETICS
    found = compute_maps(backbone, clip, 32, "wrap", torch.device("cpu"))
    for number, name in enumerate(("rgb", "static", "dynamic")):
        maps = backbone(getattr(made[0], name), differences=name == "dynamic").detach().sum(1)[0].numpy()
        np.testing.assert_allclose(found[number], maps, rtol=1e-3, atol=1e-3 * maps.max())


def measured(command: list[str], out: Path) -> dict[str, Any]:
    evaluation.main([*command, "--out", str(out)])
    return json.loads((out / "report.json").read_text())


def test_maps_report_shares_for_the_run_an_untrained_network_and_a_flat_map(walkers, tmp_path, capsys):
    settings = {"width": 4, "clip_length": 8, "crop_size": 32, "workers": 2, "seed": 3}
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run" / "config.json", "pretrain", "demo", make_config("pretrain", settings))
    torch.manual_seed(0)
    save_backbone(build_backbone("r2plus1d_10", 4), tmp_path / "run" / "backbone.safetensors")
    command = ["maps", "--data", str(walkers), "--checkpoint"]
    result = measured([*command, str(tmp_path / "run")], tmp_path / "out")
    names = [f"{name}{which}" for which in ("_untrained", "") for name in ("A_v", "A_s", "A_d")]
    assert list(result["figures"]) == list(result["deviations"]) == ["flat", *names]
    assert (result["videos"], result["map_size"], result["without_motion"]) == (2, [1, 2, 2], [])
    assert all(0 < share < 0.5 for share in result["figures"].values())
    assert len(set(result["figures"].values())) == 7  # all maps differ
    shown = capsys.readouterr()
    assert re.search(r"A_d untrained +\d+\.\d%\n", shown.out)
    assert "warning: a map of 2 x 2 cells hardly shows where the network responds: one cell covers 25%" in shown.err
    with Image.open(tmp_path / "out" / "pictures" / "maps.png") as image:
        assert image.width > 1200

    # `random` gives the run's untrained weights, with the run's seed, network and clips as flags.
    flags = ["--width", "4", "--clip-length", "8", "--crop-size", "32", "--workers", "0", "--seed", "3"]
    untrained = measured([*command, "random", *flags], tmp_path / "random")["figures"]
    assert untrained == {"flat": result["figures"]["flat"]} | {
        name.removesuffix("_untrained"): result["figures"][name] for name in names[:3]
    }


def test_maps_skip_videos_without_motion_and_unreadable_videos(walkers, tmp_path):
    shutil.copytree(walkers, tmp_path / "data")
    flags = ["--width", "4", "--clip-length", "8", "--crop-size", "32", "--workers", "0"]
    flags += ["--max-missing", "50"]
    command = ["maps", "--data", str(tmp_path / "data"), "--checkpoint", "random", *flags]
    right, left = (tmp_path / "data" / "test" / name / f"{name}.mp4" for name in ("right", "left"))
    write_video(right, np.full((24, 60, 80, 3), 90, np.uint8))
    left.write_bytes(b"")
    (tmp_path / "data" / "test" / "left" / "moves.mp4").write_bytes((walkers / "test/left/left.mp4").read_bytes())
    result = measured(command, tmp_path / "out")
    assert (result["videos"], result["without_motion"]) == (1, ["test/right/right.mp4"])
    assert result["left_out"] == {"test/left/left.mp4": "empty file"}
    (tmp_path / "data" / "test" / "left" / "moves.mp4").unlink()
    with pytest.raises(UserError, match="nothing moves in any of 1 test clips"):
        evaluation.main([*command, "--out", str(tmp_path / "out")])
