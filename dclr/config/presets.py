"""The presets: published recipes and the demo, as settings that differ from the defaults."""

from typing import Any

# The released code of DCLR and VideoMoCo jitters colours with a kornia before 0.6.4 (docs/method.md, "Views").
_PRETRAIN = {"jitter_form": "additive"}

# The downstream recipes of DCLR's repository: finetune from its README.md, linear from its start_freeze.sh.
_FINETUNE = {"lr": 0.1, "epochs": 10, "milestones": (6, 8), "batch_size": 64}
_LINEAR = {"lr": 5.0, "weight_decay": 0.0, "epochs": 10, "milestones": (6, 8), "batch_size": 128}

# The demo finishes in minutes on two cores: its network costs a sixteenth, and its clips have a tenth of the pixels.
_DEMO = {"clip_length": 8, "clip_stride": 2, "crop_size": 32, "width": 16}

# VideoMoCo's released code: clips of 32 consecutive frames, and torchvision's network. Finetuning has DCLR's protocol.
_VIDEOMOCO = {"clip_length": 32, "clip_stride": 1, "backbone": "r2plus1d_18"}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": {
        "pretrain": {
            **_DEMO,
            "queue_length": 512,
            "batch_size": 32,
            "fill_steps": 16,
            "epochs": 80,
            "lr": 0.03,
            "milestones": (60, 72),
            "checkpoint_every": 20,
            "knn_every": 40,
        },
        "finetune": {
            **_DEMO,
            "batch_size": 32,
            "lr": 0.05,
            "epochs": 40,
            "milestones": (32, 36),
            "dropout": 0.0,
            "checkpoint_every": 20,
            "test_every": 20,
        },
        "linear": {
            **_DEMO,
            **_LINEAR,
            "batch_size": 16,
            "epochs": 40,
            "milestones": (24, 32),
            "checkpoint_every": 20,
            "test_every": 20,
        },
    },
    "ucf101": {"pretrain": _PRETRAIN, "finetune": _FINETUNE, "linear": _LINEAR},
    "kinetics400": {"pretrain": {**_PRETRAIN, "queue_length": 16384}, "finetune": _FINETUNE, "linear": _LINEAR},
    "videomoco": {
        "pretrain": {
            **_VIDEOMOCO,
            **_PRETRAIN,
            "method": "videomoco",
            "augmentation": "videomoco",
            "queue_length": 65536,
            "fill_steps": 0,
            "batch_size": 32,
            "lr": 0.005,
        },
        "finetune": {**_VIDEOMOCO, **_FINETUNE},
        "linear": {**_VIDEOMOCO, **_LINEAR},
    },
}

DATA_PRESET = "ucf101"
"""The preset of a run with --data that names none. Without --data it is the demo."""
