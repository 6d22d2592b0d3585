"""BatchNorm needs two values per channel: refused before training starts exactly where torch would fail in a step."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dclr.config import Config, DataConfig, FinetuneConfig, MethodConfig, ModelConfig, PretrainConfig
from dclr.errors import UserError
from dclr.models import BACKBONES, backbone_without_memory, build_backbone, map_size
from dclr.training.batchnorm import check_batch_statistics


def refused(config: Config, micro_batch: int = 1) -> str:
    """Return the message of the refusal, or the empty string if the settings are accepted."""
    try:
        check_batch_statistics(config, micro_batch)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("frames", "pixels"), [(1, 16), (8, 16), (9, 16), (2, 17), (5, 17)])
def test_settings_are_refused_exactly_if_torch_fails(name, frames, pixels):
    width = 64 if name == "s3d" else 4
    data = DataConfig(clip_length=frames, crop_size=pixels)
    config = FinetuneConfig(data=data, model=ModelConfig(backbone=name, width=width))
    network = build_backbone(name, width).train()
    for micro_batch in (1, 2):
        if name == "s3d" and (frames < 5 or pixels < 17):
            assert "s3d takes clips of at least 5 frames of 17 x 17 pixels" in refused(config, micro_batch)
            continue
        clips = torch.zeros(micro_batch, 3, frames, pixels, pixels)
        if refused(config, micro_batch):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                network(clips)
        else:
            assert network(clips).shape[2:] == map_size(backbone_without_memory(name, width), frames, pixels)


def test_the_message_names_the_smallest_settings_that_work():
    config = FinetuneConfig(data=DataConfig(clip_length=5, crop_size=16))
    config = replace(config, optim=replace(config.optim, batch_size=6))  # on 6 ranks, or with accumulation
    assert refused(config) == (
        "--batch-size 6 gives micro-batches of 1 clip, and the last feature map of a clip is 1 x 1 x 1, but BatchNorm "
        "needs 2 values per channel: use at least --batch-size 12, --crop-size 17 or --clip-length 9"
    )
    assert refused(config, 2) == ""
    for name, value in (("crop_size", 17), ("clip_length", 9)):
        assert refused(replace(config, data=replace(config.data, **{name: value}))) == ""


def test_two_auxiliary_views_are_two_clips_of_a_batch():
    data = DataConfig(clip_length=8, crop_size=16)
    both, one = MethodConfig(), MethodConfig(dynamic_pairs=False)
    for method in (both, replace(one, key_encoder_views="all")):
        assert refused(PretrainConfig(data=data, method=method)) == ""
    for method in (one, MethodConfig(method="moco")):
        assert refused(PretrainConfig(data=data, method=method))


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_training_on_one_value_is_refused_before_it_starts(train_main, tiny, tiny_pretrain, tmp_path, command):
    # Accumulation divides the batch into micro-batches of one clip.
    ds_config = json.loads(Path(tiny["ds_config"]).read_text()) | {"gradient_accumulation_steps": 4}
    (tmp_path / "accumulate.json").write_text(json.dumps(ds_config))
    flags = {"pretrain": {**tiny_pretrain, "method": "moco"}, "finetune": tiny}[command]
    flags.pop("mined_positives", None)
    flags |= {"ds_config": tmp_path / "accumulate.json", "crop_size": 16, "out": tmp_path / "run", "epochs": 1}
    with pytest.raises(UserError, match="use at least --batch-size 8, --crop-size 17 or --clip-length 9"):
        train_main(command, **flags)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_linear_probe_uses_no_statistics_of_the_batch(train_main, tiny, tmp_path):
    train_main("linear", **{**tiny, "crop_size": 16, "batch_size": 1, "epochs": 1}, out=tmp_path / "run")
    assert (tmp_path / "run" / "classifier.safetensors").exists()
