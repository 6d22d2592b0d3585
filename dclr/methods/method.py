"""The base class of all pretraining methods. docs/extend.md shows how to add another method."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dclr import distributed
from dclr.kernels import Views
from dclr.methods.encoder import Encoder
from dclr.methods.shuffle import Shuffle

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import PretrainConfig

QUEUE_SETTINGS = frozenset({"queue_length", "fill_steps", "mined_positives"})
"""Names of the settings that have an effect only on a method with a queue."""

VIEW_SETTINGS = frozenset(
    {
        "static_pairs",
        "dynamic_pairs",
        "activation_maps",
        "mined_positives",
        "alignment_weight",
        "alignment",
        "repel_weight",
        "boundary",
        "key_encoder_views",
    }
)
"""Names of the settings that have an effect only on a method with auxiliary views."""


class Method(nn.Module):
    """Base class of pretraining methods. Pretraining calls METHODS[name].build(config).

    A method defines `query` and `forward`. If it has a queue or a key encoder, it also defines `fill` or `update_key`.
    All parameters with a gradient learn by SGD. Checkpoints hold all parameters and buffers of the module.

    Attributes:
        query: the encoder that learns. Pretraining writes its backbone and its heads into the run's folder.
        settings: names of the fields of MethodConfig that have an effect on the method. The flag of any other field is
            refused. `method` need not be named.
        auxiliary_views: the views that rgb clips can be contrasted with: "static", "dynamic", both or none.
        has_queue: whether the first --fill-steps steps only call `fill`.
        smallest_micro_batch: the fewest clips that one process can compute at once. It is 2 if a head has batch
            normalisation.
        in_batch_negatives: whether the negatives of a clip are the other clips of the micro-batches of all processes,
            so that there must be at least 2 clips.
        same_frames: whether query and key clip are the same frames, each with its own augmentation.
        shuffled: "query", "key" or both: the clips that are encoded on the rank which `shuffle` chooses. With several
            ranks, `forward` and `fill` get these clips as the shuffle delivers them. Other clips stay on their rank.
        seed: the seed of `shuffle`, needed only with `shuffled`.
        takes_blocks: whether views may come in the layout of `dclr.kernels.space_to_depth`, which the backbone reads
            faster. Without it, views are always (B, 3, T, H, W).
    """

    query: Encoder
    settings: ClassVar[frozenset[str]] = frozenset(
        {"embedding_dim", "jitter", "jitter_form", "augmentation", "distinct_starts"}
    )
    auxiliary_views: ClassVar[tuple[str, ...]] = ()
    has_queue: ClassVar[bool] = False
    smallest_micro_batch: ClassVar[int] = 1
    in_batch_negatives: ClassVar[bool] = False
    same_frames: ClassVar[bool] = False
    shuffled: ClassVar[tuple[str, ...]] = ()
    seed: int = 0
    takes_blocks: ClassVar[bool] = True

    @classmethod
    def build(cls, config: "PretrainConfig") -> Self:
        """Return the method of a run: cls(model, method, seed). A method that needs other settings overrides this."""
        return cls(config.model, config.method, seed=config.run.seed)

    @classmethod
    def check(cls, config: "PretrainConfig") -> None:
        """Raise UserError if the settings of a run do not fit the method."""

    def begin_step(self, epoch: int, batch_size: int) -> None:
        """Prepare for an optimizer step.

        Args:
            epoch: the number of the epoch, from 0.
            batch_size: the clips of the step, over all ranks and micro-batches.
        """

    def shuffle(self, size: int, step: int) -> Shuffle | None:
        """Return the shuffle of the `shuffled` clips over ranks; None if they stay on their rank.

        Its rows are the clips of the micro-batch: first the query clips, then the key clips, if both are shuffled.

        Args:
            size: the videos in the micro-batch of each rank.
            step: the number of the micro-batch, the same on all ranks.
        """
        if not self.shuffled or distributed.world_size() == 1:
            return None
        return Shuffle(len(self.shuffled) * size, self.seed * 1_000_003 + step)

    def forward(self, query: Views, key: Views, step: int) -> Any:
        """Compute a training step of one micro-batch.

        Args:
            query, key: the three views of two clips of each video, each (B, 3, T, H, W), augmented independently. B is
                the size of this rank's micro-batch. See `shuffled` for several ranks.
            step: the number of the micro-batch, the same on all ranks.

        Returns:
            an object whose `loss` () carries the gradient, such as Output. `terms` and `metrics` get this object.
        """
        raise NotImplementedError

    def fill(self, query: Views, key: Views, step: int) -> dict[str, Tensor]:
        """Write a micro-batch's keys into the queues, without a loss. Only called with `has_queue`.

        Returns:
            values () by name that must be finite, else the step counts as non-finite.
        """
        raise NotImplementedError

    def reset_key(self) -> None:
        """Make the key encoder, if there is one, equal to the query encoder, whose weights --init has loaded."""

    def update_key(self) -> None:
        """Do the work that follows the optimizer's step, such as updating a key encoder."""

    def terms(self, output: Any) -> dict[str, Tensor]:
        """Return "loss" and its terms, each (), under the names of the log. All must be finite."""
        return {"loss": output.loss.detach()}

    def metrics(self, output: Any) -> dict[str, float]:
        """Return the log line of a micro-batch, means over ranks. Every rank calls this method at the same step."""
        return means_over_ranks(self.terms(output))

    def first_step(self, metrics: dict[str, float]) -> dict[str, dict[str, float]]:
        """Return values of the first trained step's log line that report.json keeps, in groups by name."""
        return {}


def means_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Return the means over ranks of values (), by name. Every rank must call this with the same names."""
    means = distributed.mean_over_ranks(torch.stack([value.float() for value in values.values()])).tolist()
    return dict(zip(values, means, strict=True))
