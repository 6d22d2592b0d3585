"""A pretrained network in Python: read its weights, embed videos, predict classes, save it for others.

    import dclr

    model = dclr.load("runs/ucf")
    model.embed("video.mp4")        # (D,) float32
    model.predict("video.mp4")      # [("Bowling", 0.93), ...], if the weights have a classifier
    model.save_pretrained("folder")

Results are numpy arrays on the CPU: scikit-learn, faiss, pandas and matplotlib take them, and torch.from_numpy copies
nothing. A video gives the same embedding here and in `eval.py features`.

Letters: N videos, C = 10 clips of a video, T frames, H, W pixels of a frame, h pixels of the crop, D numbers of an
embedding.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dclr.config import DataConfig
from dclr.data.augmentation import centre_crop, to_augmentation
from dclr.data.catalog import Catalog
from dclr.data.clips import uniform_clips
from dclr.data.datasets import open_catalog
from dclr.data.given_videos import EVERYTHING, absolute_path, catalog_of_files, everything
from dclr.data.own_lists import LIST_SUFFIXES
from dclr.data.samples import TEST_CLIPS, TestClips
from dclr.data.videos import NoReadableVideo, open_videos
from dclr.errors import UserError, first_line, printable
from dclr.evaluation.embedding import KINDS, POOLED, make_embedder
from dclr.evaluation.features import check_outputs, embed_videos, evaluation_mode
from dclr.evaluation.model_card import write_model_card
from dclr.evaluation.predictions import best_classes
from dclr.kernels import augment
from dclr.models import Backbone, Classifier, ClipFormat, Pretrained, load_pretrained
from dclr.models.weights import EXPORT_FILE_NAME, save_weights
from dclr.progress import ProgressBar
from dclr.report import removed_if_empty

Frames = np.ndarray | Tensor
"""The frames of one video: (T, H, W, 3) uint8, RGB."""

VideoInput = str | os.PathLike[str] | Frames | Sequence[str | os.PathLike[str]]
"""One video (a file or its frames), or several: a folder, a list file (.txt, .csv, .tsv, .lst), a sequence of files."""

MOST_WORKERS = 8
"""The most processes that read videos unless the user gives a number."""


def load(source: str | os.PathLike[str], device: str | torch.device | None = None) -> "VideoModel":
    """Read a pretrained network.

    Args:
        source: a run's folder, a file of weights (this project's, torchvision's, the released code's), a folder of
            `save_pretrained`, or "hf:org/name" on the Hugging Face Hub, optionally with "@revision".
        device: where the network runs. By default a GPU if there is one, else the CPU.

    Raises:
        UserError: the weights cannot be read, or there is no such device.
    """
    return VideoModel(load_pretrained(os.fspath(source)), _device(device))


class VideoModel:
    """A pretrained network that takes videos. `dclr.load` makes it.

    Attributes:
        backbone: an nn.Module. It takes the clips of `preprocess` and returns a feature map (B, feature_dim, t, h, w).
        clips: the clips that it was trained on, with `length` (frames), `stride` (source frames) and `crop` (pixels).
        heads: the projection heads of pretraining by the name of their pair; empty if the weights have none.
        classifier: an nn.Module that returns logits for clips, on the same backbone; None if the weights have none.
        classes: the names of the classifier's classes; else empty.
        device: where the network is.
    """

    def __init__(self, pretrained: Pretrained, device: torch.device) -> None:
        self._pretrained, self.device = pretrained, device
        self.backbone: Backbone = pretrained.backbone.to(device)
        self.heads: nn.ModuleDict = pretrained.heads.to(device)
        self.classifier: Classifier | None = None
        if pretrained.classifier is not None:
            self.classifier = pretrained.classifier.to(device)
        self.clips: ClipFormat = pretrained.clips
        self.classes: tuple[str, ...] = pretrained.classes

    def __repr__(self) -> str:
        return f"VideoModel({self._pretrained.loaded}; on {self.device})"

    def embed(
        self, what: VideoInput, like: str = POOLED, *, clips: bool = False, workers: int | None = None
    ) -> np.ndarray:
        """Return the embedding of one video, (D,) float32, or of several, (N, D): the mean over its 10 clips.

        The rows of a sequence are in its order, and those of a folder or a list file in the order of `find_videos`. If
        some videos of several cannot be read, their rows are NaN, and a warning names them. A video that a list names
        and that is not on disk has no row, and a warning says so.

        Args:
            what: see VideoInput. Frames are cropped and resized like those of a file.
            like: "pooled", the backbone's features; "motion" or "scene", the embedding of the projection head that was
                trained on the dynamic or on the static view.
            clips: also return each clip by itself: (C, D), or (N, C, D).
            workers: processes that read the videos. By default none for up to 8 videos, else one for each core, at most
                8.

        Raises:
            UserError: the weights have no such heads; a video does not exist; no video can be read; frames are not
                (T, H, W, 3) uint8.
        """
        if like not in KINDS:
            raise UserError(f"like is {like!r}, but must be one of {', '.join(KINDS)}")
        embedder = make_embedder(self._pretrained, [like])
        values = self._run(lambda clips: embedder(clips)[like], what, workers)
        return (values if clips else values.mean(-2)).numpy()

    def predict(
        self, what: VideoInput, top: int = 5, *, workers: int | None = None
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Return the most probable classes of one video with their probabilities, or a list of them for several.

        The probabilities are the softmax of the mean of the logits over the 10 clips. If some videos of several cannot
        be read, their lists are empty.

        Args:
            what, workers: see `embed`.
            top: number of classes.

        Raises:
            UserError: see `embed`; the weights have no classifier; `top` is below 1.
        """
        if top < 1:
            raise UserError(f"top is {top}, but must be at least 1")
        if self.classifier is None:
            raise UserError(
                f"{self._pretrained.file} has no classifier: give the folder of a finetune or linear run, "
                "or train one on the embeddings"
            )
        logits = self._run(self.classifier, what, workers).mean(-2)
        found = [self._best(row, top) for row in logits.reshape(-1, len(self.classes))]
        return found[0] if logits.ndim == 1 else found

    def preprocess(self, frames: Frames) -> Tensor:
        """Return what the backbone takes for one clip, (3, T, h, h), or for B clips, (B, 3, T, h, h), on `device`.

        The centre square of 7/8 of the short side is resized to the crop size and normalised with ImageNet's mean and
        standard deviation. A backbone whose weights expect other statistics, such as torchvision's, converts them
        itself.

        Args:
            frames: (T, H, W, 3) or (B, T, H, W, 3) uint8, RGB. All T frames are used: take every `clips.stride`-th.

        Raises:
            UserError: the frames have another shape or dtype.
        """
        frames = _check_frames(frames, (4, 5))
        batch = frames if frames.ndim == 5 else frames[None]
        rows = np.stack([centre_crop(*batch.shape[2:4])] * len(batch))
        size = self.clips.crop, self.clips.crop
        clips = augment(batch.to(self.device), to_augmentation(rows), size)
        return clips if frames.ndim == 5 else clips[0]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write model.safetensors, config.json and README.md to a folder, for `load` and for the Hugging Face Hub.

        model.safetensors alone is sufficient to use the weights. README.md is a model card with the figures of the
        run's reports. It has no figures if the weights were changed after they were read, for example by training.
        Its licence is left for you to choose. Returns the folder.

        Raises:
            UserError: the folder holds one of these files already, or cannot be written; a weight is not finite.
        """
        folder = Path(folder)
        for name in (EXPORT_FILE_NAME, "config.json", "README.md"):
            if (folder / name).exists():
                raise UserError(f"{folder} already holds a {name}: give another folder")
        with removed_if_empty(folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                heads, fc = self.heads or None, self.classifier.fc if self.classifier else None
                save_weights(folder / EXPORT_FILE_NAME, self.backbone, self.clips, heads, fc, self.classes)
                write_model_card(self._pretrained, folder, changed=self._is_changed())
            except OSError as error:
                raise UserError(f"{folder}: cannot write there ({error.strerror})") from None
        return folder

    def _is_changed(self) -> bool:
        """Return True if a weight differs from the file that it was read from, or if that file cannot be read."""
        try:
            file = load_pretrained(self._pretrained.file)
        except UserError:
            return True
        pairs = ((self.backbone, file.backbone), (self.heads, file.heads), (self.classifier, file.classifier))
        for ours, theirs in pairs:
            now, then = (module.state_dict() if module else {} for module in (ours, theirs))
            if now.keys() != then.keys() or any(not torch.equal(now[name].to(then[name]), then[name]) for name in then):
                return True
        return False

    # ------------------------------------------------------------ running the network

    def _run(self, network: Callable[[Tensor], Tensor], what: VideoInput, workers: int | None) -> Tensor:
        """Return the outputs for the clips of one video, (C, D), or of several, (N, C, D), on the CPU."""
        with evaluation_mode(self.backbone, self.heads, self.classifier):
            if isinstance(what, np.ndarray | Tensor):
                return self._run_on_frames(network, what)
            if isinstance(what, str | os.PathLike):
                if not os.path.exists(what):
                    raise UserError(f"no such file or folder: {os.fspath(what)}")
                catalog = open_catalog(Path(what))
                _warn_of_missing(catalog)
                is_one = os.path.isfile(what) and Path(what).suffix.lower() not in LIST_SUFFIXES
                values = self._run_on_videos(network, catalog, workers)
                return values[0] if is_one else values
            files = [absolute_path(file) for file in _check_files(what)]
            catalog = catalog_of_files([Path(file) for file in files])
            rows = {path: row for row, path in enumerate(_paths(catalog))}
            return self._run_on_videos(network, catalog, workers)[[rows[file] for file in files]]

    def _run_on_videos(self, network: Callable[[Tensor], Tensor], catalog: Catalog, workers: int | None) -> Tensor:
        """Return the outputs for every video of a catalog, (N, C, D). Those of unreadable videos are NaN."""
        listed = everything(catalog)
        paths = [video.path for video in listed.videos(EVERYTHING)]
        if workers is None:
            workers = 0 if len(paths) <= MOST_WORKERS else min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        config = DataConfig(
            clip_length=self.clips.length, clip_stride=self.clips.stride, crop_size=self.clips.crop, workers=workers
        )
        outputs: dict[str, Tensor] = {}
        try:
            videos = open_videos(listed, EVERYTHING, max(1, workers), progress=len(paths) > 1)
            reasons = dict(videos.unreadable)
            found = embed_videos(lambda clips: {"": network(clips)}, TestClips(videos, config), self.device)
            with ProgressBar(len(videos), "embedding videos", "video", shown=len(videos) > 1) as bar:
                for index, output in enumerate(found):
                    bar.advance()
                    if isinstance(output, str):
                        reasons[videos.path(index)] = output
                    else:
                        outputs[videos.path(index)] = output[""]
        except NoReadableVideo as error:
            reasons = error.reasons
        if not outputs:
            path, reason = next(iter(reasons.items()))
            others = f", nor can the {len(paths) - 1} other videos" if len(paths) > 1 else ""
            raise UserError(f"{os.path.join(catalog.root, path)} cannot be read ({reason}){others}")
        for path, reason in reasons.items():
            print(f"warning: {printable(path)} cannot be read ({reason}); it has no result", file=sys.stderr)
        nothing = torch.full_like(next(iter(outputs.values())), torch.nan)
        return torch.stack([outputs.get(path, nothing) for path in paths])

    @torch.no_grad()
    def _run_on_frames(self, network: Callable[[Tensor], Tensor], frames: Frames) -> Tensor:
        """Return the outputs for the clips of one video that is given as frames, (C, D)."""
        frames = _check_frames(frames, (4,))
        numbers = uniform_clips(len(frames), TEST_CLIPS, self.clips.length, self.clips.stride)
        # One clip at a time, because ten clips of large frames take gigabytes.
        clips = torch.stack([self.preprocess(frames[clip]) for clip in numbers])
        values = network(clips).float().cpu()
        check_outputs(values, ["the frames"] * len(values))
        return values

    def _best(self, logits: Tensor, top: int) -> list[tuple[str, float]]:
        """Return the `top` most probable classes; an empty list for NaN, the logits of an unreadable video."""
        return [] if logits.isnan().any() else best_classes(logits[None], self.classes, top)[0]


def find_videos(what: str | os.PathLike[str]) -> list[Path]:
    """Return the videos of a folder, a data set or a list file, in the order in which `VideoModel.embed` reads them.

    Raises UserError if there are none, or if a list is wrong.
    """
    return [Path(path) for path in _paths(open_catalog(Path(what)))]


def _paths(catalog: Catalog) -> list[str]:
    return [os.path.join(catalog.root, video.path) for video in everything(catalog).videos(EVERYTHING)]


def _warn_of_missing(catalog: Catalog) -> None:
    """Print a warning if lists name videos that are not on disk."""
    missing = everything(catalog).missing.get(EVERYTHING, ())
    if missing:
        print(
            f"warning: {len(missing):,} listed videos are not on disk, such as {printable(missing[0].path)}; they have "
            "no result, and find_videos does not name them",
            file=sys.stderr,
        )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without CUDA
        raise UserError(f"device {device} cannot be used: {first_line(error)}") from None


def _check_frames(frames: Frames, dimensions: tuple[int, ...]) -> Tensor:
    """Return frames as a tensor. Raises UserError unless they are (T, H, W, 3) uint8, or (B, T, H, W, 3) if allowed."""
    shape = " or ".join("(T, H, W, 3)" if count == 4 else "(B, T, H, W, 3)" for count in dimensions)
    if frames.ndim not in dimensions or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(f"frames must be {shape}, RGB, not {tuple(frames.shape)}")
    if frames.dtype not in (np.uint8, torch.uint8):
        dtype = str(frames.dtype).removeprefix("torch.")
        raise UserError(f"frames must be uint8, from 0 to 255, not {dtype}")
    return torch.from_numpy(np.require(frames, requirements=["C", "W"])) if isinstance(frames, np.ndarray) else frames


def _check_files(what: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the paths of a sequence. Raises UserError if `what` is not a sequence of paths."""
    if not isinstance(what, Sequence) or not all(isinstance(file, str | os.PathLike) for file in what):
        raise UserError(
            "give a video file, a folder, a list of files, or the frames of one video, (T, H, W, 3) uint8, "
            f"not {type(what).__name__}"
        )
    return [os.fspath(file) for file in what]
