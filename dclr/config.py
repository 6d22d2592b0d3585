"""Settings of a run: frozen dataclasses with bounds, presets with the published recipes, flags and configuration files.

The sources are the defaults below, the preset, the file given to --config, and the flags. A later source overrides an
earlier one. A resumed run has its own config.json in place of the preset and the file.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.kernels import BACKENDS, EMBEDDING_SIZES
from dclr.methods import METHODS, QUEUE_SETTINGS, VIEW_SETTINGS
from dclr.models import BACKBONES, MAX_WIDTH
from dclr.models.clip_format import MAX_SIZE

AUTOMATIC = -1
"""The value of --fill-steps that lets the run choose a number."""

WHOLE_LIMIT = 2**31
"""Whole numbers of settings are below this limit. It holds for files and for flags, because --resume reads the values
of the flags from config.json."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that a field accepts. Without arguments, every text and every finite number.

    `choices` may be a dictionary. Entries that are added to it later are accepted too.
    """

    choices: Collection[Any] = ()
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return True
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        """Return the accepted values in words: "a, b or c", "from 0 to 1", "at least 0 and below 1", or "" for any."""
        if self.choices:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}"
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            return f"from {self.at_least} to {self.at_most}"
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if math.isfinite(limit))


def option(default: Any, help: str, **bounds: Any) -> Any:
    """Return a dataclass field with its default, its text for --help and its `Bounds`.

    A field with the default True or False is a yes/no option.
    """
    if isinstance(default, bool):
        bounds = {"choices": (True, False)}
    return field(default=default, metadata={"help": help, "bounds": Bounds(**bounds)})


class _Group:
    """Base class of the groups of settings: it checks every field against its bounds."""

    def __post_init__(self) -> None:
        """Raise UserError for a value outside its bounds, with the flag, the value and the accepted values."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            found = getattr(self, f.name)
            for value in found if isinstance(found, tuple) else (found,):
                if not f.metadata["bounds"].accepts(value):
                    raise UserError(f"{flag_of(f.name)} is {value}, but must be {f.metadata['bounds']}")
                if isinstance(value, int) and value >= WHOLE_LIMIT:
                    raise UserError(f"{flag_of(f.name)} is {value}, but must be below 2 ** 31")


def flag_of(name: str) -> str:
    """Return the flag of a field, "--log-every" for "log_every"."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Group):
    """The run: its folder, random seed, execution, log and checkpoints."""

    out: str = option(
        "", "folder of the run. Change it to keep several runs apart (default: the next free runs/COMMAND-N)"
    )
    seed: int = option(
        0, "seed of every random number. Change it to repeat an experiment with other random numbers", at_least=0
    )
    ds_config: str = option(
        "ds_configs/ddp.json",
        "DeepSpeed configuration: sharding and precision. Change it to zero1.json or zero2.json if GPU memory is "
        "short: zero1.json shards the optimizer state over the processes, zero2.json also the gradients",
    )
    log_every: int = option(
        10, "optimizer steps between two log lines. Raise it if a step takes milliseconds", at_least=1
    )
    kernels: str = option(
        "auto",
        "implementation of the loss and of the views. auto: Triton on a GPU, plain PyTorch and kornia elsewhere. "
        "Change it to reference to find out whether a result depends on the Triton kernels",
        choices=BACKENDS,
    )
    compile: str = option(
        "auto",
        "torch.compile of the backbones. auto: only on a GPU. Change it to off for a run of a few steps, "
        "which takes less time than the compilation",
        choices=("auto", "on", "off"),
    )
    convolutions: str = option(
        "auto",
        "implementation of the (2+1)D convolutions. auto: Triton kernels in the layers where a measurement on this GPU "
        "was faster, else cuDNN. Change it to library or triton to compare the two. "
        "triton: in all layers whose shape the kernels take, in bfloat16 on a GPU",
        choices=("auto", "library", "triton"),
    )
    deterministic: bool = option(
        False,
        "use only algorithms that give the same bits every time, which are slower. "
        "Turn it on if a resumed run on a GPU must equal an uninterrupted run bit for bit. "
        "On a CPU it does so without this flag",
    )
    pad_channels: int = option(
        8,
        "pad the channels between the spatial and the temporal convolution with zeros to a multiple of this number, "
        "for tensor cores. Results and checkpoints stay the same. Try 16, or 1 for no padding",
        at_least=1,
        at_most=64,
    )
    recompute: bool = option(
        False,
        "keep fewer results for the backward pass and compute the others again, in pretrain and finetune. Losses stay "
        "the same. A step takes about 1.2 times as long. Turn it on if a batch does not fit the GPU "
        "(docs/performance.md says which batches fit)",
    )
    checkpoint_every: int = option(1, "epochs between two checkpoints. Raise it if an epoch takes seconds", at_least=1)
    on_nonfinite: str = option(
        "stop",
        "what happens at a loss or gradient that is not finite. stop: the run ends and names the step, the loss terms "
        "and the samples. Change it to skip to undo such steps and count them",
        choices=("stop", "skip"),
    )


ALL: Any = "all"
"""The value of --split that stands for every official split. A command replaces it by numbers, so no DataConfig holds
it."""


def split_number(text: str) -> Any:
    """Return the value of --split: a number, or ALL."""
    if text == ALL or text.isdecimal():
        return text if text == ALL else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number or all")


def is_url(data: str) -> bool:
    """Return whether --data names a store on a server, such as https://HOST/STORE or s3://BUCKET/STORE."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", data) is not None


def check_url(url: str) -> None:
    """Raise UserError unless the URL of --data is that of a folder on a server, without a user name or a password.

    A user name or a password would be shown by config.json and by messages. The message of this error does not show it.
    """
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc
    except ValueError as error:  # brackets that belong to no address
        raise UserError(f"--data is not a URL: {error}") from None
    if secret:
        raise UserError(
            f"--data {parts.scheme}://...@... holds a user name or a password, which config.json would show: "
            "leave them out; credentials come from the environment or from files such as ~/.aws/credentials"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"--data {parts.scheme}://{parts.netloc}{parts.path} is followed by ? or #, but must be the URL of a "
            "folder: leave the rest out"
        )
    if parts.scheme == "file":
        raise UserError("--data is a file:// URL: give the path of the folder")
    if not parts.netloc:
        raise UserError(f"--data {url} names no server or bucket")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Group):
    """The data: videos, and the clips that are cut from them."""

    data: str = option(
        "",
        "folder of a data set, a list file, or the URL of a packed store (https://, s3:// and others). If left out, "
        "train.py uses the built-in demo videos, and eval.py the data set of the checkpoint's run, or the demo videos "
        "if there is none. predict needs --data. features and search need it unless the network was trained on the "
        "demo videos",
    )
    split: int = option(
        1,
        "number of the official train/test split (UCF101, HMDB51, numbered lists). "
        "Change it to all to average over the splits, in finetune, linear, accuracy and retrieval",
        at_least=0,
    )
    allow_outside: bool = option(
        False,
        'let list files name videos outside the data folder, by an absolute path or by "..". '
        "Turn it on for lists that you trust",
    )
    clip_length: int = option(
        16,
        "frames of a clip. Lower it for quick experiments. The last feature map has an eighth of them (mc3_18: all)",
        at_least=1,
        at_most=MAX_SIZE,
    )
    clip_stride: int = option(
        2,
        "source frames from one frame of a clip to the next. Raise it for slow motion or high frame rates",
        at_least=1,
        at_most=MAX_SIZE,
    )
    crop_size: int = option(
        112,
        "height and width of a clip in pixels. Lower it for quick experiments. "
        "The last feature map has a sixteenth of each (s3d: a 32nd)",
        at_least=16,
        at_most=MAX_SIZE,
    )
    workers: int = option(
        2,
        "decoding processes of each process of the run. "
        "Raise it if the progress bar shows that the run waits for data. "
        "0 decodes in the process itself: a video that crashes the decoder then ends the run, "
        "and a video on which the decoder hangs blocks the run",
        at_least=0,
        at_most=1024,
    )
    video_timeout: float = option(
        60.0,
        "seconds without a new frame after which a video counts as unreadable. Raise it for slow network disks",
        above=0,
    )
    max_bad: float = option(
        1.0,
        "percent of the split's videos that may be unreadable or may fail during training before the run stops. "
        "Raise it for a data set that is known to be damaged",
        at_least=0,
        at_most=100,
    )
    max_missing: float = option(
        1.0,
        "percent of the listed videos of a split that may be missing. In training, missing means not on disk. "
        "In eval.py, unreadable videos count too. Raise it for a data set that is known to be incomplete",
        at_least=0,
        at_most=100,
    )

    def __post_init__(self) -> None:
        if self.split == ALL:
            raise UserError("--split is all, which only finetune, linear, accuracy and retrieval take: give a number")
        if is_url(self.data):
            check_url(self.data)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Group):
    """The model: the video backbone."""

    backbone: str = option(
        "r2plus1d_10",
        "network architecture. The published recipe uses r2plus1d_10, which the released code calls r2plus1d_18. "
        "r2plus1d_18 is torchvision's network. Change it to r2plus1d_18 to use that network, at twice the cost",
        choices=BACKBONES,
    )
    width: int = option(
        64,
        "channels of the first stage. Every published network has 64. Lower it for quick experiments",
        at_least=1,
        at_most=MAX_WIDTH,
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig(_Group):
    """The method: dual contrastive learning (DCLR), or another method to compare it with."""

    method: str = option(
        "dclr",
        "pretraining method. Change it to moco for the baseline of the same shape: "
        "only rgb clips, one queue, no static view and no dynamic view. "
        "dclr-simclr: DCLR with the other clips of the batch as negatives, without a queue. simsiam: no negatives. "
        "videomoco: moco whose query clips lose frames that a generator chooses",
        choices=METHODS,
    )
    static_pairs: bool = option(
        True, "contrast rgb clips with their static view. Turn it off, which removes that view, to measure its effect"
    )
    dynamic_pairs: bool = option(
        True, "contrast rgb clips with their dynamic view. Turn it off, which removes that view, to measure its effect"
    )
    activation_maps: bool = option(
        True,
        "weight the rgb features that are compared with a view by the activation map of that view. "
        "Turn it off to measure its effect",
    )
    embedding_dim: int = option(128, "length D of an embedding. The published value is 128", choices=EMBEDDING_SIZES)
    queue_length: int = option(
        2048,
        "number K of queue entries, which are the negatives of each pair. "
        "Raise it with the size of the data set: 2048 for UCF101, 16384 for Kinetics-400",
        at_least=1,
    )
    temperature: float = option(
        0.07, "temperature of the contrastive losses. Lower it to give hard negatives more weight", above=0
    )
    negatives: str = option(
        "cross",
        "negatives of a clip in --method dclr-simclr. cross: the keys of the other clips of the batch. "
        "Change it to all for the NT-Xent loss of SimCLR: also the queries of the other clips",
        choices=("cross", "all"),
    )
    key_momentum: float = option(
        0.999,
        "share of its old weights that the key encoder keeps in a step. Lower it only with a short queue: "
        "if keys change fast, the loss separates new keys from old keys instead of clips from clips",
        at_least=0,
        at_most=1,
    )
    mined_positives: int = option(
        5, "queue entries M that count as further positives of a clip. 0 turns cross-video mining off", at_least=0
    )
    alignment_weight: float = option(0.1, "weight of the activation alignment term. 0 turns it off", at_least=0)
    alignment: str = option(
        "relative",
        "scale of the activation maps in the alignment term. relative: divided by their mean, as pooling uses them. "
        "Change it to raw for the published form, whose values are hundreds of times larger",
        choices=("relative", "raw"),
    )
    repel_weight: float = option(
        0.0,
        "weight of a term that pushes static and dynamic features apart. The paper shows this term in a figure, "
        "but the released code lacks it. Raise it to try the term",
        at_least=0,
    )
    boundary: str = option(
        "wrap",
        "first frame of the dynamic view, which has no frame before it. wrap: its difference from the last frame, "
        "as published. zero: no difference. replicate: the same as the second frame. "
        "Change it for videos that do not loop",
        choices=("wrap", "zero", "replicate"),
    )
    key_encoder_views: str = option(
        "auxiliary",
        "views of the query clip that pass through the key encoder, for mined positives and activation maps. "
        "auxiliary: static and dynamic view. Change it to all for the form of the released code: also the rgb view, "
        "so the three views share batch statistics, and a step costs one more forward pass",
        choices=("auxiliary", "all"),
    )
    distinct_starts: bool = option(
        True,
        "the two clips of a video start at different frames, as in the released code. A video that is too short for "
        "two gives the same clip twice. Turn it off for independent starts, as in runs of earlier versions",
    )
    symmetric_loss: bool = option(
        False,
        "contrast both clips of a video with the other one, and average the two losses. A step then costs twice as "
        "much and writes two keys of each sample into the queue. Turn it on to compare methods that do so",
    )
    jitter: float = option(
        1.0,
        "strength of the colour jitter. 1 is the published strength, 0 turns it off. "
        "Lower it if a short run should learn to tell videos apart by their colour",
        at_least=0,
        at_most=2,
    )
    jitter_form: str = option(
        "multiplicative",
        "form of the colour jitter. multiplicative: brightness is multiplied, contrast changes the distance from the "
        "mean, as in torchvision. Change it to additive for the published form: a number is added to brightness, "
        "contrast multiplies the values, and saturation is that of HSV",
        choices=("multiplicative", "additive"),
    )
    augmentation: str = option(
        "dclr",
        "augmentation of the clips. dclr: the published recipe of DCLR. Change it to videomoco for that of VideoMoCo: "
        "colour jitter of every clip, with four times the hue shift, and no blur",
        choices=("dclr", "videomoco"),
    )
    adversarial_from: int = option(
        100,
        "epochs of plain MoCo before frames are dropped and queue entries fade, in videomoco. The published number is "
        "100 of 200. Change it with --epochs",
        at_least=0,
    )
    dropping: str = option(
        "generator",
        "how videomoco chooses the quarter of the frames that a query clip loses. Change it to random or none to "
        "measure the effect of the generator",
        choices=("generator", "random", "none"),
    )
    dropped_fill: str = option(
        "mean",
        "values of a dropped frame. mean: the mean of that frame, as in the released code. Change it to zero for the "
        "mean of all videos, as others describe the paper",
        choices=("mean", "zero"),
    )
    straight_through: str = option(
        "exact",
        "gradient of the generator's scores. exact: that of keeping a frame. Change it to released for the gradient of "
        "the released code, which does not follow the effect of a frame",
        choices=("exact", "released"),
    )
    decay: str = option(
        "steps",
        "age of a queue entry, by which its logits fade. steps: optimizer steps since it was written, as in the "
        "released code. position: its position in the queue, as others describe the paper. "
        "Change it to none to measure the effect",
        choices=("steps", "position", "none"),
    )
    decay_rate: float = option(
        0.99999,
        "factor of a queue entry's logits for each unit of age. Lower it to forget old entries sooner: with steps, the "
        "oldest of 65536 entries has the factor 0.98 at the published rate and batch size",
        above=0,
        at_most=1,
    )
    fill_steps: int = option(
        AUTOMATIC,
        "number of first steps, which only fill the queue and do not train. -1 chooses 256, as published, or a tenth "
        "of the steps in a run of fewer than 2560 steps. If the queue needs more steps to be full, -1 chooses that "
        "number, but at most half of the steps. "
        "Raise it if the loss jumps at the first trained steps",
        at_least=AUTOMATIC,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        mined, length = self.mined_positives, self.queue_length
        settings = METHODS[self.method].settings
        if "mined_positives" in settings and mined > length:
            raise UserError(f"--mined-positives is {mined}, but must be from 0 to --queue-length ({length})")
        if METHODS[self.method].auxiliary_views and not self.auxiliary_views:
            raise UserError("--no-static-pairs and --no-dynamic-pairs together leave only rgb clips: use --method moco")
        if "repel_weight" in settings and self.repel_weight and len(self.auxiliary_views) < 2:
            raise UserError(
                "--repel-weight pushes static and dynamic features apart: it needs --static-pairs and --dynamic-pairs"
            )

    @property
    def keys_per_sample(self) -> int:
        """The keys that a step writes into the queue for each sample: 2 with --symmetric-loss, else 1."""
        return 2 if self.symmetric_loss and "symmetric_loss" in METHODS[self.method].settings else 1

    @property
    def auxiliary_views(self) -> tuple[str, ...]:
        """The views that rgb clips are contrasted with: "static" and "dynamic", one of them, or none in MoCo."""
        used = {"static": self.static_pairs, "dynamic": self.dynamic_pairs}
        return tuple(view for view in METHODS[self.method].auxiliary_views if used[view])


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Group):
    """The optimization: stochastic gradient descent (SGD)."""

    epochs: int = option(
        200,
        "passes over the training videos. The published numbers are 200 for pretraining, 10 for finetune and linear",
        at_least=1,
    )
    batch_size: int = option(
        64,
        "samples of a step, over all processes together. Published learning rates are for the published batches. "
        "Raise it to fill a GPU, and raise --lr with it",
        at_least=1,
    )
    lr: float = option(0.01, "learning rate of SGD. Lower it if the loss jumps", above=0)
    schedule: str = option(
        "step",
        "how the learning rate falls. step: to a tenth after each of --milestones, as published. Change it to cosine "
        "for half a cosine from --lr to 0 over all epochs, which needs no milestones",
        choices=("step", "cosine"),
    )
    milestones: tuple[int, ...] = option(
        (120, 160),
        "epochs after which the learning rate drops to a tenth, in --schedule step. Change them with --epochs",
        at_least=1,
    )
    warmup_epochs: int = option(
        0,
        "first epochs, in which the learning rate rises from near 0 to --lr with each step. Steps that fill the queue "
        "count. Raise it if the loss jumps in the first epochs",
        at_least=0,
    )
    momentum: float = option(0.9, "momentum of SGD. Lower it if the loss oscillates", at_least=0, below=1)
    weight_decay: float = option(1e-4, "weight decay of SGD. Raise it if a classifier overfits", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs >= self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs}, but must be below --epochs ({self.epochs})")


_WEIGHTS = (
    "a run's folder (finished, stopped or still going), one of its files, weights of torchvision, a checkpoint of the "
    "released code, or a checkpoint of another project whose names are torchvision's after a prefix"
)


@dataclass(frozen=True, kw_only=True)
class StartConfig(_Group):
    """The start: the weights that pretraining starts from."""

    init: str = option(
        "",
        f"{_WEIGHTS}. Both encoders start from its backbone, and from its projection heads where it has the same ones. "
        "Give it to continue learning on other videos (default: random weights)",
    )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(_Group):
    """The monitor: measurements during pretraining."""

    knn_every: int = option(
        0,
        "epochs between two measurements of the features by nearest neighbours: accuracy and recall at 1 on labelled "
        "test videos (at most 500, and 1000 training videos). They show whether the network learns, which the loss "
        "alone does not. 0: none. Raise it if measuring takes long",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class TransferConfig(_Group):
    """The transfer: the weights that a classifier starts from, and the labels that it is trained on."""

    pretrained: str = option(
        "",
        f"{_WEIGHTS} (default: random weights)",
    )
    dropout: float = option(
        0.7, "dropout before the classifier, in finetune. Lower it for narrow networks", at_least=0, below=1
    )
    finetune_augmentation: str = option(
        "crop",
        "augmentation of the clips in finetune. crop: random crop and flip. Change it to released for that of the "
        "released code, which also removes the colour of a fifth of the clips and jitters the colour of four fifths",
        choices=("crop", "released"),
    )
    normalised_probe: bool = option(
        True,
        "in linear, scale the pooled feature of each clip to length 1 before the classifier, as the released code "
        "does. Turn it off, and lower --lr, to compare with runs of version 0.1, which did not normalise",
    )
    test_every: int = option(
        1,
        "epochs between two measurements of the accuracy on test videos (at most 500, one clip each). They appear in "
        "the log and do not change the training. 0: none. Raise it if measuring takes long",
        at_least=0,
    )
    label_share: float = option(
        1.0,
        "share of each class's training videos that is used, rounded, at least 1 video. --seed and the listed paths "
        "choose the videos, so every method gets the same ones. Lower it to measure how many labels a method needs",
        above=0,
        at_most=1,
    )
    shots: int = option(
        0,
        "training videos of each class that are used, chosen like those of --label-share. 0 uses all. "
        "Raise it to measure how many labels a method needs",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots and self.label_share < 1:
            raise UserError("--shots cannot be used with --label-share: both choose the number of videos of a class")

    @property
    def few_labels(self) -> str:
        """The flag that keeps only some training videos, such as "--shots 2"; empty if all are used."""
        if self.shots:
            return f"--shots {self.shots}"
        return f"--label-share {self.label_share:g}" if self.label_share < 1 else ""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of `pretrain`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    start: StartConfig = StartConfig()
    optim: OptimConfig = OptimConfig()
    monitor: MonitorConfig = MonitorConfig()

    def __post_init__(self) -> None:
        queue_length, batch_size = self.method.queue_length, self.optim.batch_size
        if METHODS[self.method.method].has_queue and queue_length < batch_size * self.method.keys_per_sample:
            least = f"--batch-size ({batch_size}): each step writes a whole batch to the queue"
            if self.method.keys_per_sample == 2:
                least = f"twice --batch-size ({2 * batch_size}): --symmetric-loss writes two keys of each sample"
            raise UserError(f"--queue-length is {queue_length}, but must be at least {least}")
        METHODS[self.method.method].check(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `finetune` and `linear`."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig = TransferConfig()
    optim: OptimConfig = OptimConfig()


Config = PretrainConfig | FinetuneConfig
COMMANDS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "linear": FinetuneConfig}


def groups(command: str) -> dict[str, type]:
    """Return name -> dataclass of the groups of settings of a command, in the order of --help."""
    return {f.name: f.type for f in dataclasses.fields(COMMANDS[command])}  # type: ignore[misc]


GROUPS = {name: group for command in COMMANDS for name, group in groups(command).items()}
FIELDS = {f.name: f for group in GROUPS.values() for f in dataclasses.fields(group)}

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


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for a wrong command line: one line, without the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help explains every flag)")


def add_flags(
    parser: argparse.ArgumentParser, group_classes: Iterable[type], only: set[str] | None = None, command: str = ""
) -> None:
    """Add one flag for each field of the groups, or of the fields in `only`, under one heading for each group.

    The help text of a flag ends with its bounds, its default (the value in DATA_PRESET), and the values of the presets
    of `command` that have another one. A flag that is not given is absent from the parsed namespace.
    """
    for group_class in group_classes:
        heading = parser.add_argument_group((group_class.__doc__ or "").rstrip("."))
        for f in dataclasses.fields(group_class):
            if only is None or f.name in only:
                _add_flag(heading, f, command)


def _add_flag(heading: Any, f: dataclasses.Field[Any], command: str) -> None:
    bounds = f.metadata["bounds"]
    in_presets = {name: of.get(command, {}).get(f.name, f.default) for name, of in PRESETS.items()}
    default = in_presets[DATA_PRESET]
    notes = [] if bounds.choices else [str(bounds)]
    notes += ["" if default == "" else f"default: {show(default)}"]
    notes += [f"{name}: {show(value)}" for name, value in in_presets.items() if value != default]
    notes = [note for note in notes if note]
    text = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    names = ["--ds_config", "--ds-config"] if f.name == "ds_config" else [flag_of(f.name)]
    given: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if isinstance(f.default, bool):
        heading.add_argument(*names, action=argparse.BooleanOptionalAction, **given)
        return
    choices = "{" + ",".join(map(str, bounds.choices)) + "}"
    given["metavar"] = choices if bounds.choices else f.name.split("_")[-1].upper()
    if isinstance(f.default, tuple):
        heading.add_argument(*names, type=int, nargs="*", **given)
    else:
        heading.add_argument(*names, type=split_number if f.name == "split" else type(f.default), **given)


def as_flag(name: str, value: Any) -> str:
    """Return a setting in the form of the command line: "--width 16", "--no-compact"."""
    if isinstance(value, bool):
        return flag_of(name) if value else f"--no-{flag_of(name)[2:]}"
    return f"{flag_of(name)} {show(value)}"


def show(value: Any) -> str:
    """Return a value as messages and help texts show it: on or off for True or False, and a tuple without brackets."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --foreground is a flag of eval.py.
SWITCHES = {"--foreground", *(flag_of(f.name) for f in FIELDS.values() if isinstance(f.default, bool))}


def refuse_old_switches(arguments: Sequence[str]) -> None:
    """Raise UserError for a yes/no option in the spelling of earlier versions, "--static-pairs no".

    The message names the new spelling.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in SWITCHES and value in ("yes", "no"):
            raise UserError(
                f"{flag} {value} is an old spelling: write {flag if value == 'yes' else '--no-' + flag[2:]}"
            )


def make_config(command: str, values: dict[str, Any]) -> Config:
    """Return the configuration of `command` from flat field values, and from defaults for the other fields.

    Raises UserError for a name that the command does not have, and for a value outside its bounds.
    """
    values = dict(values)
    built: dict[str, Any] = {}
    for name, group_class in groups(command).items():
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(group_class) if f.name in values}
        built[name] = group_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
    if values:
        raise UserError(f"{command} has no setting named {', '.join(sorted(values))}")
    return COMMANDS[command](**built)


def resolve(
    command: str,
    preset: str,
    flags: dict[str, Any],
    resumed: dict[str, Any] | None = None,
    file: dict[str, Any] | None = None,
) -> Config:
    """Return the configuration from the preset, the values of the file given to --config, and the flags, in this order.

    A resumed run has its stored values, `resumed`, in place of preset and file. It also keeps the number that it has
    chosen for --fill-steps -1.

    Raises UserError for a value that is refused, and for a flag that has no effect on the chosen method or command.
    """
    if resumed is None and preset not in PRESETS:
        raise UserError(f"--preset is {preset}, but must be one of {', '.join(PRESETS)}")
    stored = resumed if resumed is not None else {**PRESETS[preset][command], **(file or {})}
    kept = {"fill_steps"} if resumed is not None and flags.get("fill_steps") == AUTOMATIC else set()
    config = make_config(command, {**stored, **{name: flags[name] for name in flags.keys() - kept}})
    if config.optim.schedule == "cosine":
        same_file = file if file and file.get("schedule") == "cosine" else {}
        if {**same_file, **flags}.get("milestones"):
            raise UserError("--milestones has no effect with --schedule cosine: leave it out, or use --schedule step")
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, milestones=()))
    elif stored.get("schedule") == "cosine" and not stored.get("milestones") and "milestones" not in flags:
        raise UserError("--schedule step needs --milestones here, because a run with --schedule cosine stores none")
    if command == "linear" and config.run.recompute:
        raise UserError(
            "--recompute has no effect in linear, whose backbone is frozen and keeps nothing: leave the flag out"
        )
    if not isinstance(config, PretrainConfig):
        for name, only in _SETTINGS_OF_ONE_COMMAND.items():
            if name in flags and command != only:
                raise UserError(f"{flag_of(name)} has no effect in {command}, only in {only}: leave the flag out")
        return config
    refuse_settings_without_effect(config.method.method, flags)
    for name, (switch, values) in _SWITCHED_OFF.items():
        value = getattr(config.method, switch)
        if name in flags and value in values:
            raise UserError(f"{flag_of(name)} has no effect with {as_flag(switch, value)}: leave the flag out")
    if not METHODS[config.method.method].has_queue:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, fill_steps=0))
    return config


_SWITCHED_OFF = {
    "dropped_fill": ("dropping", ("none",)),
    "straight_through": ("dropping", ("random", "none")),
    "decay_rate": ("decay", ("none",)),
}
"""Setting of a method -> another setting, and the values of that one with which the first has no effect."""

_SETTINGS_OF_ONE_COMMAND = {"dropout": "finetune", "finetune_augmentation": "finetune", "normalised_probe": "linear"}


def refuse_settings_without_effect(method: str, flags: Collection[str]) -> None:
    """Raise UserError if one of the settings `flags` is a field of MethodConfig that has no effect on `method`."""
    chosen = METHODS[method]
    of_methods = {f.name for f in dataclasses.fields(MethodConfig)} - {"method"}
    same_frames = {"distinct_starts"} if chosen.same_frames else set()
    for name in sorted((of_methods - chosen.settings | same_frames).intersection(flags)):
        why = ", whose clips are the same frames" if name in same_frames else ""
        if name in VIEW_SETTINGS and not chosen.auxiliary_views:
            why = ", which has neither static nor dynamic views"
        elif name in QUEUE_SETTINGS and not chosen.has_queue:
            why = ", which has no queue"
        raise UserError(f"{flag_of(name)} has no effect with --method {method}{why}: leave the flag out")


# Settings that may change when a run is resumed. Any other change would alter the samples or the network.
FREE_ON_RESUME = {
    "data", "workers", "video_timeout", "max_bad", "max_missing",
    "ds_config", "kernels", "compile", "convolutions", "deterministic", "pad_channels", "recompute",
    "log_every", "checkpoint_every", "on_nonfinite",
    "knn_every", "test_every",
    "epochs", "lr", "schedule", "milestones", "warmup_epochs", "momentum", "weight_decay",
    "temperature", "negatives", "key_momentum", "mined_positives", "alignment_weight", "alignment", "repel_weight",
    "adversarial_from", "dropped_fill", "straight_through", "decay", "decay_rate",
    "dropout",
}  # fmt: skip


def check_resume(folder: Path, given: dict[str, Any], stored: dict[str, Any], file: str | None = None) -> None:
    """Raise UserError if a given setting contradicts a stored one that must not change for the run in `folder`.

    Args:
        file: where the settings were given: the file of --config, or None for flags.
    """
    where = f" in {file}" if file else ""
    for name, value in given.items():
        # A configuration of an earlier version lacks settings that were added since.
        then = stored.get(name, FIELDS[name].default)
        chosen = name == "fill_steps" and value == AUTOMATIC  # the run keeps the number that it has chosen
        if name not in FREE_ON_RESUME and value != then and not chosen:
            raise UserError(
                f"{flag_of(name)} is {show(value)}{where}, but the run in {folder} has {show(then)}: "
                f"leave the {'setting' if file else 'flag'} out, or start another run"
            )


def flat(config: Config) -> dict[str, Any]:
    """Return field name -> value over all groups."""
    return {k: v for group in dataclasses.asdict(config).values() for k, v in group.items()}


def write_config(path: Path, command: str, preset: str, config: Config) -> None:
    """Write the resolved configuration as JSON, one object for each group. `read_config` reads this file.

    The file also names the working folder, from which relative paths start.
    """
    head = {"command": command, "preset": preset, "started_in": str(Path.cwd())}
    text = json.dumps({**head, **dataclasses.asdict(config)}, indent=2)
    atomic_write(path, (text + "\n").encode())


def read_config(path: Path) -> tuple[str, str, dict[str, Any]]:
    """Return (command, preset, flat values) of a run's config.json. Its relative paths hold in the working folder now.

    Raises UserError if the file is missing or is not the configuration of a run, or if a value has a wrong type.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        command, preset = str(stored.pop("command")), str(stored.pop("preset"))
        started_in = str(stored.pop("started_in", ""))
        values = {name: value for group in stored.values() for name, value in group.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds its config.json") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path}: not the configuration of a run (damaged, or written by something else)") from None
    for name, f in FIELDS.items():
        # Runs of earlier versions hold "yes" and "no" for true and false.
        if isinstance(f.default, bool) and values.get(name) in ("yes", "no"):
            values[name] = values[name] == "yes"
    values = _typed(path, values)
    if "optim" in stored:
        values = {**_OF_EARLIER_VERSIONS.get(command, {}), **values}
    for name in PATHS & values.keys():
        values[name] = _find(values[name], started_in, path)
    return command, preset, values


_OF_EARLIER_VERSIONS: dict[str, dict[str, Any]] = {
    "pretrain": {"distinct_starts": False, "jitter_form": "multiplicative"},
    "linear": {"normalised_probe": False},
}
"""Command -> settings that were added later, with the values that describe the runs before. The config.json of such a
run does not name these settings, and today's defaults or presets have other values."""

PATHS = {"data", "pretrained", "init", "ds_config"}
"""Settings that are paths of files that a run reads."""


def _find(value: str, started_in: str, config: Path) -> str:
    """Return a path of a config.json, absolute if it does not hold in the working folder.

    A relative path is looked for where the run was started, then in the working folder. The configurations of earlier
    versions do not say where the run was started. For them, the path is looked for in the working folder, then in the
    run's folder and the two folders above it: most runs are in runs/NAME.
    """
    if not value or Path(value).is_absolute() or is_url(value):
        return value
    here = Path.cwd()
    for folder in [Path(started_in), here] if started_in else [here, *config.resolve().parents[:3]]:
        # Unlike Path.exists, this is False for a folder without permission.
        if os.path.exists(folder / value):
            return value if folder == here else str(folder / value)
    return value


def read_settings(path: Path, command: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (preset, flat values) of the file given to --config: a TOML file, or the config.json of a run.

    The preset is "" if the file names none. The file must be for `command`, or for any command if `command` is None.
    The result has neither `out` nor `allow_outside` of a config.json. A new run needs a folder of its own, and a file
    from elsewhere must not permit itself to name videos outside the data folder.

    Raises UserError if the file cannot be read or is for another command, or for an unknown name or a wrong type.
    """
    if path.suffix == ".json":
        written_for, preset, values = read_config(path)
        values = {name: value for name, value in values.items() if name not in ("out", "allow_outside")}
    else:
        written_for, preset, values = _read_toml(path)
    if command and written_for not in ("", command):
        raise UserError(
            f"--config {path} is for {written_for}, but the command is {command}: "
            f"run {written_for}, or give another file"
        )
    allowed = [group for name, group in GROUPS.items() if command is None or name in groups(command)]
    unknown = sorted(values.keys() - {f.name for group in allowed for f in dataclasses.fields(group)})
    if unknown:
        who = f"{command} has no" if command else "no command has a"
        raise UserError(f"--config {path}: {who} setting named {', '.join(unknown)}")
    return preset, values


def _read_toml(path: Path) -> tuple[str, str, dict[str, Any]]:
    """Return (command, preset, flat values) of a TOML file. Settings are at the top, or in one table for each group.

    Raises UserError if the file is not TOML, or for an unknown table, a setting given twice, or a wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a TOML file or a run's config.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not a TOML file: {error!s:.200}") from None
    command, preset = content.pop("command", ""), content.pop("preset", "")
    for name, value in (("command", command), ("preset", preset)):
        if not isinstance(value, str):
            raise UserError(f"--config {path}: {name} is {_shown(value)}, but must be a text")
    settings: list[tuple[str, Any]] = []
    for key, value in content.items():
        if not isinstance(value, dict):
            settings.append((key, value))
        elif key in GROUPS:
            settings += value.items()
        else:
            raise UserError(f"--config {path}: no table is named [{key}]; the tables are {', '.join(GROUPS)}")
    values: dict[str, Any] = {}
    for key, value in settings:
        name = key.replace("-", "_")
        if name in values:
            raise UserError(f"--config {path}: {name} is given twice")
        values[name] = value
    return command, preset, _typed(path, values)


_KINDS = {
    bool: "true or false",
    str: "a text",
    int: "a whole number below 2 ** 31",
    float: "a number",
    tuple: "a list of whole numbers",
}


def _typed(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the file with lists as tuples. Raises UserError for a value of a wrong type."""
    for name, value in values.items():
        if name in FIELDS and not _is_alike(value, FIELDS[name].default):
            raise UserError(f"{path}: {name} is {_shown(value)}, but must be {_KINDS[type(FIELDS[name].default)]}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _shown(value: Any) -> str:
    """Return at most 80 characters of a value from a file."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # Python prints no whole number of more than 4,300 digits
        return f"a value of type {type(value).__name__} that cannot be printed"


def _is_alike(value: Any, default: Any) -> bool:
    """Return whether a value from a file has the type that argparse gives the flag with this default."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(_is_alike(item, 0) for item in value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float) and isinstance(value, float):
        return True
    if isinstance(default, int | float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < WHOLE_LIMIT
    return isinstance(value, str)
