"""Export of a network as one file that needs no code of dclr: a torch.export program (.pt2) or ONNX (.onnx).

The file takes clips in RGB from 0 to 1. The normalisation is part of the file, so nobody has to know its numbers.

Letters: B clips, T frames, h, w pixels of the crop, D features.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dclr.data.augmentation import CENTRE
from dclr.data.samples import TEST_CLIPS
from dclr.errors import UserError
from dclr.evaluation.embedding import HEADS, check_head, view_for
from dclr.files import atomic_file
from dclr.kernels.types import MEAN, STD
from dclr.models import Pretrained, pool

INPUT, METADATA_FILE = "clips", "dclr.json"
"""The name of the input, and of the file with the metadata in a .pt2 archive."""

CHECKED_BATCHES = (1, 3)
"""Batch sizes at which the outputs of a file are compared with those of the model. The program is traced with 2."""

TOLERANCE = 1e-4
"""Largest difference of an output, as a share of the largest absolute output of the model.

Other runtimes sum in another order, and ONNX Runtime merges batch normalisation into convolutions. In float32 the
networks of this project then differ by 1e-7 to 3e-6. A wrong normalisation, a wrong weight or 16-bit arithmetic differ
by more than 1e-3."""

MOST_BYTES = 2**31 - 2**20
"""The most bytes of weights in an ONNX file, which is one protobuf message. 1 MiB is left for the graph."""

Outputs = Mapping[str, Tensor]


class ExportedNetwork(nn.Module):
    """The network in an exported file.

    It takes clips (B, 3, T, h, w) float32, RGB from 0 to 1, and returns "features" (B, D) float32, the pooled features
    of the backbone. With a classifier it also returns "logits" (B, classes) float32. For each of `kinds`, "motion" or
    "scene", it returns the embedding of this name as `embedding.make_embedder` does.

    Raises UserError: the weights have no head for a kind.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: Pretrained, kinds: Sequence[str] = ()) -> None:
        super().__init__()
        for kind in kinds:
            check_head(pretrained, kind)
        self.backbone = pretrained.backbone
        self.fc = pretrained.classifier.fc if pretrained.classifier else None
        self.heads = nn.ModuleDict({kind: pretrained.heads[HEADS[kind]] for kind in kinds})
        # The backbone takes clips with ImageNet's statistics, whatever its weights were trained with.
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1, 1))

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        clips = (clips - self.mean) / self.std
        features = pool(self.backbone(clips))
        outputs = {"features": features} | ({"logits": self.fc(features)} if self.fc else {})
        for kind, head in self.heads.items():
            outputs[kind] = head(pool(self.backbone(view_for(kind, clips), differences=kind == "motion")))
        return outputs


def export_network(
    pretrained: Pretrained, length: int, crop: int, form: str, out: Path, kinds: Sequence[str] = ()
) -> float:
    """Write the network to `out`, and return the largest difference of its outputs from those of the model.

    The difference is a share of the model's largest absolute output. The file is read again and run on random clips of
    both CHECKED_BATCHES. A file that differs by more than TOLERANCE is not kept.

    Args:
        length, crop: frames of a clip and pixels of its side. They are fixed in the file; the batch size is not.
        form: "torch" or "onnx".
        kinds: see ExportedNetwork.

    Raises:
        UserError: the weights have no head for a kind, packages are missing, clips are too small for the network, the
            file cannot be written, or its outputs differ.
    """
    check_packages(form)
    network = ExportedNetwork(pretrained, kinds).eval().requires_grad_(False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if form == "onnx" and size > MOST_BYTES:
        raise UserError(f"{pretrained.file} has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB: use torch")
    checks = [random_clips(size, length, crop) for size in CHECKED_BATCHES]
    expected = [network(clips) for clips in checks]
    # The program would hold for the batch size 1 only, if it was traced with that size.
    example = random_clips(2, length, crop)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    information = describe(pretrained, length, crop)
    with quiet():
        program = torch.export.export(network, (example,), dynamic_shapes=batch)
        write = _torch_file if form == "torch" else _onnx_file
        content = write(program, list(expected[0]), information)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as aside:
            aside.write_bytes(content)
            outputs_of = (_open_torch if form == "torch" else _open_onnx)(aside)
            difference = largest(map(largest_difference, map(outputs_of, checks), expected))
            if not difference <= TOLERANCE:  # also if it is NaN
                raise UserError(
                    f"the exported outputs differ from the model's by {difference:.1e} of the largest output, "
                    f"and at most {TOLERANCE:.0e} is floating-point difference: {out} was not written"
                )
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    return difference


def check_packages(form: str) -> None:
    """Raise UserError if a package that the format needs is missing."""
    if form == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"--format onnx needs {error.name}: pip install 'dclr[onnx]'") from None


def describe(pretrained: Pretrained, length: int, crop: int) -> dict[str, str]:
    """Return what a user of the file has to know: texts by name, some of them JSON."""
    backbone, frames = pretrained.backbone, pretrained.clips
    return {
        "format": "dclr",
        "backbone": backbone.name,
        "width": str(backbone.width),
        "feature_dim": str(backbone.feature_dim),
        "classes": json.dumps(pretrained.classes),
        "clip_length": str(length),
        "clip_stride": str(frames.stride),
        "crop_size": str(crop),
        "input": f"{INPUT}: float32 (batch, 3, {length}, {crop}, {crop}), RGB from 0 to 1; the file normalises",
        "clips": f"{length} frames, {frames.stride} apart; the centre square of {CENTRE} of the short side, resized to "
        f"{crop} x {crop} bilinearly without antialiasing; a video's logits are the mean over {TEST_CLIPS} evenly "
        "spaced clips",
    }


def random_clips(batch: int, length: int, crop: int) -> Tensor:
    """Return clips (batch, 3, length, crop, crop) in RGB from 0 to 1: coloured patches that move, with noise.

    Clips of noise alone would all give nearly the same features.
    """
    rng = torch.Generator().manual_seed(batch)
    frames = max(2, length // 4)
    patches = torch.rand(batch, 3, frames, 4, 4, generator=rng)
    clips = F.interpolate(patches, (length, crop, crop), mode="trilinear")
    return (clips + 0.1 * torch.rand(clips.shape, generator=rng)).clamp(0, 1)


def largest_difference(outputs: Outputs, expected: Outputs) -> float:
    """Return the largest difference of outputs, as a share of the largest absolute value of the same output."""
    if outputs.keys() != expected.keys():
        raise UserError(f"the exported file gives {', '.join(outputs)} in place of {', '.join(expected)}")
    differences = []
    for name, values in expected.items():
        if outputs[name].shape != values.shape:
            raise UserError(f"the exported file gives {name} {tuple(outputs[name].shape)}, not {tuple(values.shape)}")
        differences.append(((outputs[name] - values).abs().max() / values.abs().max().clamp(min=1e-30)).item())
    return largest(differences)


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number, NaN if one is NaN. Python's `max` would lose a NaN that is not the first."""
    return torch.tensor(list(numbers)).max().item()


# ---------------------------------------------------------------- the two formats


def _torch_file(program: torch.export.ExportedProgram, _: list[str], information: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(information)})
    return buffer.getvalue()


def _open_torch(file: Path) -> Callable[[Tensor], Outputs]:
    with quiet(), file.open("rb") as opened:
        return torch.export.load(opened).module()


def _onnx_file(program: torch.export.ExportedProgram, names: list[str], information: dict[str, str]) -> bytes:
    converted = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=names, verbose=False)
    assert converted is not None
    converted.model.metadata_props.update(information)
    return converted.model_proto.SerializeToString()


def _open_onnx(file: Path) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(clips: Tensor) -> Outputs:
        values = session.run(names, {INPUT: clips.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide messages and warnings of the exporters. They are about internals, and the outputs are compared anyway."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
