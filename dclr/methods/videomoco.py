"""VideoMoCo: MoCo whose query clips lose the frames that a generator chooses. Logits of queue entries decay with age.

Letters: B clips of a micro-batch, T frames, H W pixels, D embedding size, K queue length.
Source: Pan et al., CVPR 2021 (arXiv 2103.05905), and its released code. docs/methods.md has the formulas and the
differences.
"""

import copy
import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from dclr import distributed
from dclr.errors import UserError
from dclr.kernels import Views, contrast
from dclr.methods.dclr import Output
from dclr.methods.generator import DROPPED_SHARE, Generator, drop, lowest, score_gradient
from dclr.methods.moco import MoCo
from dclr.models import LinearHead

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import MethodConfig, ModelConfig, PretrainConfig

GENERATOR_WEIGHT = 100
"""Factor of the generator's loss in the released code."""


class VideoMoCo(MoCo):
    """Query encoder, key encoder, queue, and a generator that drops frames of the query clip.

    Query and key are the same frames with two augmentations. Before the epoch --adversarial-from it is MoCo. From that
    epoch on, with x the query clip, x~ the clip with dropped frames, f the query encoder and q = f(x), q~ = f(x~):
        loss of the generator  L_G = -100 * mean |q~ - q|, mean over clips and D
        loss of the encoder    L_D = InfoNCE of q~, its key and the queue, whose logits are multiplied by rate^age
    L_G trains only the generator, and L_D trains only the encoder.

    Attributes:
        generator: the generator; None with --dropping random or none.
        epoch, batch_size: see `begin_step`. A resumed run sets both again.
    """

    settings = (MoCo.settings - {"symmetric_loss"}) | {
        "adversarial_from",
        "dropping",
        "dropped_fill",
        "straight_through",
        "decay",
        "decay_rate",
    }
    same_frames = True
    takes_blocks = False
    generator: Generator | None

    def __init__(self, model: "ModelConfig", method: "MethodConfig", seed: int = 0, clip_length: int = 16) -> None:
        super().__init__(model, method, seed)
        head = LinearHead(self.query.backbone.feature_dim, method.embedding_dim)
        self.query.heads = nn.ModuleDict({"vv": head})
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.generator = Generator(clip_length) if method.dropping == "generator" else None
        self.epoch, self.batch_size = 0, 1

    @classmethod
    def build(cls, config: "PretrainConfig") -> Self:
        """Return the method of a run. The generator is built for the run's clip length."""
        return cls(config.model, config.method, config.run.seed, config.data.clip_length)

    @classmethod
    def check(cls, config: "PretrainConfig") -> None:
        """Raise UserError if clips have too few frames to drop one, or if the run ends before frames are dropped."""
        frames, dropping = config.data.clip_length, config.method.dropping
        if dropping != "none" and frames < DROPPED_SHARE:
            raise UserError(
                f"--clip-length is {frames}, but --dropping {dropping} drops a quarter of the frames: raise "
                f"--clip-length to at least {DROPPED_SHARE}, or pass --dropping none"
            )
        start, epochs = config.method.adversarial_from, config.optim.epochs
        if start > epochs:
            raise UserError(
                f"--adversarial-from is {start}, but the run has {epochs} epochs, so it would be MoCo: lower it, "
                "raise --epochs, or use --method moco"
            )

    def begin_step(self, epoch: int, batch_size: int) -> None:
        """Set the epoch, which selects the phase, and the number of clips in a step, from which ages are computed."""
        self.epoch, self.batch_size = epoch, batch_size

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """Compute one step and write its keys into the queue. See `DCLR.forward` for the arguments."""
        adversarial = self.epoch >= self.method.adversarial_from
        clip = query.rgb
        generator_term: Tensor | None = None
        further: dict[str, Tensor] = {}
        if adversarial and self.method.dropping != "none":
            queries, generator_term, further["generator_loss"] = self._drop_frames(clip, step)
        else:
            queries = self._embed(clip)
        keys, all_keys, _ = self._encode_key(key, step)
        scale = self.logit_scale() if adversarial else None
        losses, positive, hardest = contrast(
            queries[None], keys, self.queue, None, self.method.temperature, logit_scale=scale, check_rows=False
        )
        self._enqueue(all_keys)

        output = Output(losses.sum(), losses.detach(), positive, hardest, queries.detach()[None], further=further)
        if generator_term is not None:
            # The term carries the generator's gradient, and its value is 0: the log's loss is that of the encoder.
            return output._replace(loss=output.loss + (generator_term - generator_term.detach()))
        if self.generator is not None:
            # On several processes, DeepSpeed gives a parameter without a gradient a gradient of 0. The optimizer then
            # applies weight decay to it. This term does the same on one process.
            idle = sum((parameter.sum() for parameter in self.generator.parameters()), torch.zeros_like(output.loss))
            return output._replace(loss=output.loss + 0 * idle)
        return output

    def logit_scale(self) -> Tensor | None:
        """Return the factor (K,) float32 of each queue entry's logits: rate^age; None without decay.

        Age counts, with n clips written so far (`enqueued`), and c_j the number of the clip in entry j, from 0:
            --decay steps     optimizer steps since entry j was written: floor(n / batch) - floor(c_j / batch).
                              An entry that was never written has the number of steps so far.
            --decay position  the position in the queue: n - c_j, which is 1 for the newest entry and K for the oldest.
        """
        if self.method.decay == "none":
            return None
        length, n = self.method.queue_length, self.enqueued
        entries = torch.arange(length, device=n.device)
        clips = n - 1 - (n - 1 - entries) % length  # negative for entries that were never written
        if self.method.decay == "position":
            age = n - clips
        else:
            age = n // self.batch_size - clips.clamp_min(0) // self.batch_size
        # The logarithm is exact in double precision. The rate itself would lose 0.2 % of rate^65536 in float32.
        return torch.exp(age.float() * math.log(self.method.decay_rate))

    def _embed(self, clip: Tensor) -> Tensor:
        """Return the query encoder's embeddings (B, D) of clips (B, 3, T, H, W)."""
        return self.query.embed({"v": self.query.backbone(clip)}, {})["vv"]

    def _drop_frames(self, clip: Tensor, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Drop a quarter of the frames and embed the rest: those with the lowest scores, or random ones.

        Returns:
            The embeddings q~ (B, D), whose graph reaches the encoder only. A term () whose gradient is that of L_G with
            respect to the generator, and reaches the generator only; None for random frames. L_G () without a graph.
        """
        fill, form = self.method.dropped_fill, self.method.straight_through
        scores = self.generator(clip) if self.generator is not None else None
        frames = lowest(scores) if scores is not None else self._random_frames(clip, step)
        dropped = drop(clip, frames, fill).detach().requires_grad_(scores is not None)
        # The graph of q~ serves two backward passes. Code of torch.compile may not reuse memory of the first.
        with functorch.patch(donated_buffer=False):
            embeddings = self._embed(dropped.view_as(dropped))  # hooks of modules may need an input that is not a leaf
            with torch.no_grad():
                whole = self._embed(clip)
            loss = -GENERATOR_WEIGHT * (embeddings - whole).abs().mean()
            if scores is None:
                return embeddings, None, loss.detach()
            # A backward pass has the dtypes of its forward pass. It must not choose its own.
            with torch.autocast(clip.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(loss, dropped, retain_graph=True)
        return embeddings, (scores * score_gradient(gradient, clip, fill, form)).sum(), loss.detach()

    def _random_frames(self, clip: Tensor, step: int) -> Tensor:
        """Return a mask (B, T) bool of a quarter of the frames of each clip, drawn for all ranks by (seed, step)."""
        B, T = clip.shape[0], clip.shape[2]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        scores = torch.rand(distributed.world_size(), B, T, generator=generator)[distributed.rank()]
        return lowest(scores).to(clip.device)
