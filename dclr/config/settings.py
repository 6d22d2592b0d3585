"""The settings of a run: frozen dataclasses, one for each group, and the groups of each command."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dclr.config.data_url import check_url, is_url
from dclr.config.options import Group, option
from dclr.errors import UserError
from dclr.kernels import BACKENDS, EMBEDDING_SIZES
from dclr.methods import METHODS
from dclr.models import BACKBONES, MAX_WIDTH
from dclr.models.clip_format import MAX_SIZE

AUTOMATIC = -1
"""The value of --fill-steps that lets the run choose a number."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Group):
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


@dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
    """The data: videos, and the clips that are cut from them."""

    data: str = option(
        "",
        "folder of a data set, a list file, or the URL of a packed store (https://, s3:// and others). Without it, "
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
class ModelConfig(Group):
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
class MethodConfig(Group):
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
        "epochs of plain MoCo before frames are dropped and logits decay, in videomoco. The published number is "
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
        "age of a queue entry, by which its logits decay. steps: optimizer steps since it was written, as in the "
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
class OptimConfig(Group):
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
class StartConfig(Group):
    """The start: the weights that pretraining starts from."""

    init: str = option(
        "",
        f"{_WEIGHTS}. Both encoders start from its backbone, and from its projection heads where it has the same ones. "
        "Give it to continue learning on other videos (default: random weights)",
    )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Group):
    """The monitor: measurements during pretraining."""

    knn_every: int = option(
        0,
        "epochs between two measurements of the features by nearest neighbours: accuracy and recall at 1 on labelled "
        "test videos (at most 500, and 1000 training videos). They show whether the network learns, which the loss "
        "alone does not. 0: none. Raise it if measuring takes long",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class TransferConfig(Group):
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
