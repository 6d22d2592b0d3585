"""What a run is told: frozen dataclasses, the published recipes as presets, and the command line made from both.

A value comes from, last one wins: the default below, the preset, the configuration of the run that is resumed, the flag.
"""

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dclr.errors import UserError
from dclr.files import write_whole
from dclr.models import BACKBONES, MAX_WIDTH
from kernels import BACKENDS, EMBEDDING_SIZES

METHODS = ("dclr", "moco")
YES_NO = ("no", "yes")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its default, what it is, and when to change it (shown by --help)."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _require(ok: bool, flag: str, value: object, right: str) -> None:
    if not ok:
        raise UserError(f"{flag} is {value}, but must be {right}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """where a run writes, and how it repeats"""

    out: str = option("", "folder of the run; change it to keep several apart (default: the next free runs/COMMAND-N)")
    seed: int = option(0, "decides every random draw; change it to repeat an experiment with other draws")
    ds_config: str = option(
        "ds_configs/ddp.json",
        "DeepSpeed configuration: sharding and precision; change it to zero1.json or zero2.json where memory is short: they share out "
        "the optimizer's state, and zero2.json gradients too",
    )
    log_every: int = option(10, "optimizer steps between two log lines; raise it where a step takes milliseconds")
    kernels: str = option(
        "auto",
        "auto: Triton on a GPU, plain torch and kornia elsewhere; change it to reference to see whether a result is a kernel's doing",
        BACKENDS,
    )
    compile: str = option(
        "auto",
        "torch.compile of the backbones; auto: on a GPU; change it to off for a run of a few steps, which is over before it is compiled",
        ("auto", "on", "off"),
    )
    deterministic: str = option(
        "no",
        "yes: only algorithms that give the same bits every time, slower; change it to resume a run on a GPU to the bit, as on a CPU",
        YES_NO,
    )
    pad_channels: int = option(
        8,
        "zero channels between convolutions in space and in time, up to a multiple of this, for tensor cores; same results and "
        "checkpoints; try 16, or 1 for none",
    )
    checkpoint_every: int = option(1, "epochs between two checkpoints; raise it when an epoch takes seconds")
    on_nonfinite: str = option(
        "stop",
        "what a loss or gradient that is not finite does; stop: the run ends and names the step, its terms and samples; change it to skip "
        "to leave such steps out and count them",
        ("stop", "skip"),
    )

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "--seed", self.seed, "at least 0")
        _require(self.log_every >= 1, "--log-every", self.log_every, "at least 1")
        _require(self.kernels in BACKENDS, "--kernels", self.kernels, "one of " + ", ".join(BACKENDS))
        _require(self.compile in ("auto", "on", "off"), "--compile", self.compile, "auto, on or off")
        _require(self.deterministic in YES_NO, "--deterministic", self.deterministic, "no or yes")
        _require(
            1 <= self.pad_channels <= 64, "--pad-channels", self.pad_channels, "1 to 64 (8 and 16 suit tensor cores)"
        )
        _require(self.checkpoint_every >= 1, "--checkpoint-every", self.checkpoint_every, "at least 1")
        _require(self.on_nonfinite in ("stop", "skip"), "--on-nonfinite", self.on_nonfinite, "stop or skip")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """which videos, and the clips cut from them"""

    data: str = option(
        "", "a data set's folder, or a list file; left out, the built-in demo videos are rendered and used"
    )
    split: int = option(
        1, "which of the official train/test splits, 1 to 3 (UCF101, HMDB51); change it to average over splits"
    )
    allow_outside: str = option(
        "no",
        "whether list files may name videos outside of the data folder (absolute, or by ..); change it to yes for lists that you trust",
        YES_NO,
    )
    clip_length: int = option(16, "frames a clip, T; lower it for quick experiments (the backbones divide it by 8)")
    clip_stride: int = option(
        2, "source frames from one kept frame to the next; raise it for slow motion or high frame rates"
    )
    crop_size: int = option(112, "height and width of a clip in pixels; lower it for quick experiments")
    workers: int = option(
        2,
        "decoding processes for each training process; raise it while the bar shows time spent waiting for data; 0 decodes in the training "
        "process, where a video that crashes the decoder ends the run and one that never ends holds it up",
    )

    video_timeout: float = option(
        60.0,
        "seconds that the decoder may take without giving a frame, before the video counts as unreadable; raise it for slow network disks",
    )
    max_bad: float = option(
        1.0,
        "percent of the split's videos that may be unreadable or fail while training, before the run stops; raise it for a data set that "
        "is known to be damaged",
    )

    def __post_init__(self) -> None:
        _require(1 <= self.split <= 3, "--split", self.split, "1, 2 or 3")
        _require(self.allow_outside in YES_NO, "--allow-outside", self.allow_outside, "no or yes")
        _require(self.clip_length >= 1, "--clip-length", self.clip_length, "at least 1")
        _require(self.clip_stride >= 1, "--clip-stride", self.clip_stride, "at least 1")
        _require(self.crop_size >= 16, "--crop-size", self.crop_size, "at least 16 (the backbones divide it by 16)")
        _require(0 <= self.workers <= 1024, "--workers", self.workers, "0 to 1024 (0: decode in the training process)")
        _require(0 < self.video_timeout < math.inf, "--video-timeout", self.video_timeout, "above 0 seconds")
        _require(0 <= self.max_bad <= 100, "--max-bad", self.max_bad, "between 0 and 100 percent")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """the network"""

    backbone: str = option(
        "r2plus1d_10",
        "r2plus1d_10 is the published recipe's (its authors call it r2plus1d_18); r2plus1d_18 is torchvision's, twice the cost",
        BACKBONES,
    )
    width: int = option(
        64, "channels of the first stage; 64 is every published network, lower it for quick experiments"
    )

    def __post_init__(self) -> None:
        _require(self.backbone in BACKBONES, "--backbone", self.backbone, "one of " + ", ".join(BACKBONES))
        _require(1 <= self.width <= MAX_WIDTH, "--width", self.width, f"1 to {MAX_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """dual contrastive learning"""

    method: str = option(
        "dclr",
        "dclr; change it to moco, the baseline of the same shape: rgb clips alone, one queue, nothing of static and dynamic views",
        METHODS,
    )
    static_pairs: str = option(
        "yes",
        "whether rgb is contrasted with the static view; change it to no, and the view is left out, to see what that brings",
        YES_NO,
    )
    dynamic_pairs: str = option(
        "yes",
        "whether rgb is contrasted with the dynamic view; change it to no, and the view is left out, to see what that brings",
        YES_NO,
    )
    activation_maps: str = option(
        "yes",
        "yes: a view's activation map weighs the rgb features that are compared with it; change it to no to see what that brings",
        YES_NO,
    )
    embedding_dim: int = option(128, "length of an embedding, D: 32, 64, 128 or 256; 128 is published")
    queue_length: int = option(
        2048, "negatives kept for each pair, K; raise it with the data set: 2048 for UCF101, 16384 for Kinetics-400"
    )
    temperature: float = option(0.07, "of the contrastive losses; lower weighs hard negatives more")
    key_momentum: float = option(
        0.999,
        "of the key network; lower it only with a short queue: keys that change fast tell new from old instead of clip from clip",
    )
    mined_positives: int = option(5, "queue rows that count as positives too, M; 0 turns cross-video mining off")
    alignment_weight: float = option(0.1, "of the activation alignment term; 0 turns it off")
    alignment: str = option(
        "relative",
        "relative: activation maps divided by their mean, as pooling uses them; raw: as published, hundreds of times larger",
        ("relative", "raw"),
    )
    repel_weight: float = option(
        0.0,
        "weight of pushing static and dynamic features apart (in the paper's figure, not in its code); raise it to try that",
    )
    boundary: str = option(
        "wrap",
        "frame before the first, for frame differences; wrap (the last one) is published, change it where videos do not loop",
        ("wrap", "zero", "replicate"),
    )
    jitter: float = option(
        1.0,
        "strength of the colour jitter, 1 as published, 0 none; lower it where colour tells videos apart that a short run should learn to",
    )
    fill_steps: int = option(
        256,
        "first steps that only fill the queue, without training; lower it in short runs, queue length / batch size is enough",
    )

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "--method", self.method, "dclr or moco")
        for name in ("static_pairs", "dynamic_pairs", "activation_maps"):
            _require(getattr(self, name) in YES_NO, "--" + name.replace("_", "-"), getattr(self, name), "yes or no")
        if self.method == "dclr" and not self.parts:
            raise UserError("--static-pairs no --dynamic-pairs no leaves rgb clips alone: that is --method moco")
        # What the Triton kernels take, on every device: a run must not depend on where it was begun.
        _require(self.embedding_dim in EMBEDDING_SIZES, "--embedding-dim", self.embedding_dim, "32, 64, 128 or 256")
        _require(self.queue_length >= 1, "--queue-length", self.queue_length, "at least 1")
        _require(0 < self.temperature < math.inf, "--temperature", self.temperature, "above 0")
        _require(0 <= self.key_momentum <= 1, "--key-momentum", self.key_momentum, "between 0 and 1")
        _require(
            0 <= self.mined_positives <= self.queue_length,
            "--mined-positives",
            self.mined_positives,
            f"between 0 and --queue-length ({self.queue_length})",
        )
        for flag, weight in (("--alignment-weight", self.alignment_weight), ("--repel-weight", self.repel_weight)):
            _require(0 <= weight < math.inf, flag, weight, "at least 0")
        _require(self.alignment in ("relative", "raw"), "--alignment", self.alignment, "relative or raw")
        boundaries = ("wrap", "zero", "replicate")
        _require(self.boundary in boundaries, "--boundary", self.boundary, "wrap, zero or replicate")
        if self.repel_weight and self.method == "dclr" and len(self.parts) < 2:
            raise UserError(
                "--repel-weight pushes static and dynamic features apart: it needs --static-pairs and --dynamic-pairs"
            )
        _require(0 <= self.jitter <= 2, "--jitter", self.jitter, "between 0 and 2")
        _require(self.fill_steps >= 0, "--fill-steps", self.fill_steps, "at least 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """What rgb clips are contrasted with beside themselves: some of static and dynamic; nothing in MoCo."""
        on = {"static": self.static_pairs, "dynamic": self.dynamic_pairs}
        return tuple(part for part, switch in on.items() if switch == "yes" and self.method == "dclr")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """optimization"""

    epochs: int = option(
        200, "passes over the training videos; 200 is published for pretraining, 10 for finetune and linear"
    )
    batch_size: int = option(
        40, "clips a step, over all processes together; raise it to fill a GPU (then raise --lr with it)"
    )
    lr: float = option(0.01, "learning rate of SGD; lower it when the loss jumps")
    milestones: tuple[int, ...] = option(
        (120, 160), "epochs after which the learning rate drops to a tenth; change them with --epochs"
    )
    momentum: float = option(0.9, "of SGD; lower it when the loss swings")
    weight_decay: float = option(1e-4, "of SGD; raise it where a classifier overfits")

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "--epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        _require(0 < self.lr < math.inf, "--lr", self.lr, "above 0")
        for milestone in self.milestones:
            _require(milestone >= 1, "--milestones", milestone, "at least 1")
        _require(0 <= self.momentum < 1, "--momentum", self.momentum, "at least 0 and below 1")
        _require(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "at least 0")


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """what a classifier starts from"""

    pretrained: str = option(
        "",
        "a run's folder, its backbone.safetensors, torchvision's weights or the authors' checkpoint (default: from scratch)",
    )
    dropout: float = option(0.7, "before the classifier, when finetuning; lower it for narrow networks")

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, "--dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        _require(
            self.method.queue_length >= self.optim.batch_size,
            "--queue-length",
            self.method.queue_length,
            f"at least --batch-size ({self.optim.batch_size}): the queue takes a whole batch at a time",
        )


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """finetune and linear"""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig = TransferConfig()
    optim: OptimConfig = OptimConfig()


Config = PretrainConfig | SupervisedConfig
COMMANDS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": SupervisedConfig, "linear": SupervisedConfig}

# The downstream protocols, as published (DCLR and FAME code): finetune 64 clips, lr 0.1; linear 128 clips, lr 5, no decay.
_FINETUNE = {"lr": 0.1, "epochs": 10, "milestones": (6, 8), "batch_size": 64}
_LINEAR = {"lr": 5.0, "weight_decay": 0.0, "epochs": 10, "milestones": (6, 8), "batch_size": 128}

# The demo: a network a sixteenth as costly on clips a tenth as large, so that two cores finish in minutes.
_DEMO = {"clip_length": 8, "clip_stride": 2, "crop_size": 32, "width": 16}

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
        },
        "finetune": {
            **_DEMO,
            "batch_size": 32,
            "lr": 0.05,
            "epochs": 40,
            "milestones": (32, 36),
            "dropout": 0.0,
            "checkpoint_every": 20,
        },
        # At the published lr 5 the loss of this network's probe stays in the hundreds (docs/LOG.md).
        "linear": {
            **_DEMO,
            **_LINEAR,
            "batch_size": 16,
            "lr": 0.05,
            "epochs": 40,
            "milestones": (24, 32),
            "checkpoint_every": 20,
        },
    },
    "ucf101": {"pretrain": {}, "finetune": _FINETUNE, "linear": _LINEAR},
    "kinetics400": {"pretrain": {"queue_length": 16384}, "finetune": _FINETUNE, "linear": _LINEAR},
}


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a UserError: one line, without the usage of every flag before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help explains every flag)")


def groups(config_class: type) -> list[tuple[str, type]]:
    """(name, dataclass) of a configuration's groups, in the order --help shows them."""
    return [(f.name, f.type) for f in dataclasses.fields(config_class)]  # type: ignore[misc]


def add_flags(
    parser: argparse.ArgumentParser, group_classes: list[type], only: set[str] | None = None, command: str = ""
) -> None:
    """Give `parser` one flag for each field of the groups, under one heading a group; help names the default, and what the presets
    of `command` make of it. A flag not given is absent from the namespace."""
    for group_class in group_classes:
        box = parser.add_argument_group((group_class.__doc__ or "").strip())
        for f in dataclasses.fields(group_class):
            if only is not None and f.name not in only:
                continue
            many = isinstance(f.default, tuple)
            values = {"default": f.default} if f.default != "" else {}
            values |= {
                name: recipe[command][f.name] for name, recipe in PRESETS.items() if f.name in recipe.get(command, {})
            }
            listed = [f"{k}: {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in values.items()]
            text = f.metadata["help"] + (f" ({'; '.join(listed)})" if listed else "")
            names = ["--ds_config", "--ds-config"] if f.name == "ds_config" else ["--" + f.name.replace("_", "-")]
            box.add_argument(
                *names,
                dest=f.name,
                type=int if many else type(f.default),
                nargs="*" if many else None,
                choices=f.metadata["choices"],
                default=argparse.SUPPRESS,
                metavar=None if f.metadata["choices"] else f.name.split("_")[-1].upper(),
                help=text.replace("%", "%%"),
            )


def make_config(command: str, values: dict[str, Any]) -> Config:
    """The configuration of `command` from flat field values; those a command has no field for are refused.

    Raises UserError: unknown name, or a value a group refuses.
    """
    values = dict(values)
    built: dict[str, Any] = {}
    for name, group_class in groups(COMMANDS[command]):
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(group_class) if f.name in values}
        built[name] = group_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
    if values:
        raise UserError(f"{command} has no setting named {', '.join(sorted(values))}")
    return COMMANDS[command](**built)


def resolve(command: str, preset: str, flags: dict[str, Any], resumed: dict[str, Any] | None = None) -> Config:
    """Preset (or the resumed run's flat values), then flags.

    Raises UserError: a value that is refused, also one given for a method that has no use for it.
    """
    if resumed is None and preset not in PRESETS:
        raise UserError(f"--preset is {preset}, but must be one of {', '.join(PRESETS)}")
    config = make_config(command, {**(PRESETS[preset][command] if resumed is None else resumed), **flags})
    useless = sorted(_FOR_PARTS & flags.keys())
    if isinstance(config, PretrainConfig) and config.method.method == "moco" and useless:
        flag = "--" + useless[0].replace("_", "-")
        raise UserError(
            f"{flag} has no meaning with --method moco, which has neither static nor dynamic views: leave it out"
        )
    return config


# Settings of what rgb clips are contrasted with beside themselves.
_FOR_PARTS = {
    "static_pairs", "dynamic_pairs", "activation_maps", "mined_positives", "alignment_weight", "alignment", "repel_weight", "boundary",
}  # fmt: skip


# What a resumed run may do otherwise than before; anything else would change which samples or which network it goes on with.
FREE_ON_RESUME = {
    "data", "workers", "video_timeout", "max_bad", "ds_config", "kernels", "compile", "deterministic", "pad_channels", "log_every",
    "checkpoint_every", "on_nonfinite",
    "epochs", "lr", "milestones", "momentum", "weight_decay",
    "temperature", "key_momentum", "mined_positives", "alignment_weight", "alignment", "repel_weight", "dropout",
}  # fmt: skip


def check_resume(folder: Path, flags: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises UserError when a flag contradicts the stored settings of the run in `folder` in what must not change."""
    for name, value in flags.items():
        before = tuple(stored[name]) if isinstance(stored.get(name), list) else stored.get(name)
        if name not in FREE_ON_RESUME and value != before:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {value}, but the run in {folder} has {before}: leave the flag out, or start another run"
            )


def flat(config: Config) -> dict[str, Any]:
    """Field name -> value over all groups."""
    return {k: v for group in dataclasses.asdict(config).values() for k, v in group.items()}


def write_config(path: Path, command: str, preset: str, config: Config) -> None:
    """The resolved configuration, grouped, as JSON; `read_config` is its inverse."""
    text = json.dumps({"command": command, "preset": preset, **dataclasses.asdict(config)}, indent=2)
    write_whole(path, (text + "\n").encode())


def read_config(path: Path) -> tuple[str, str, dict[str, Any]]:
    """(command, preset, flat values) of a config.json. Raises UserError when it is missing, not one, or a value is of another type than
    its flag's."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        command, preset = str(stored.pop("command")), str(stored.pop("preset"))
        values = {k: v for group in stored.values() for k, v in group.items()}
        for name, default in _DEFAULTS.items():
            if name in values and not _is_alike(values[name], default):
                raise UserError(f"{path}: {name} is {values[name]!r:.80}, but must be {_KINDS[type(default)]}")
        return command, preset, values
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds its config.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: not the configuration of a run (damaged, or written by something else)") from None


_DEFAULTS = {f.name: f.default for c in COMMANDS.values() for _, group in groups(c) for f in dataclasses.fields(group)}
_KINDS = {str: "a text", int: "a whole number below 2 ** 31", float: "a number", tuple: "a list of whole numbers"}


def _is_alike(value: Any, default: Any) -> bool:
    """Whether a value read from a file is what argparse would have made of the flag with this default."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(_is_alike(item, 0) for item in value)
    if isinstance(default, float) and isinstance(value, float):
        return True
    if isinstance(default, int | float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, str)
