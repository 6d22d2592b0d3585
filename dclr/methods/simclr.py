"""The SimCLR form of DCLR: one encoder, and the other clips of the batch as negatives.

The five pairs are DCLR's. There is no queue, no key encoder, no mining and no alignment term. SimCLR is Chen et al.,
ICML 2020, arXiv 2002.05709.

Letters: B clips in a rank's micro-batch, N clips in the micro-batches of all ranks, P pairs, D embedding size. Small
t h w are the sizes of a feature map.
"""

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from dclr import distributed
from dclr.errors import UserError
from dclr.kernels import Views
from dclr.kernels.backend import to_device
from dclr.methods.encoder import KEY_OF_PAIR, Encoder, by_pair, pairs_of, run_backbone
from dclr.methods.method import Method, means_over_ranks
from dclr.models import activation_map

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import MethodConfig, ModelConfig


class Output(NamedTuple):
    """The results of a step, the same on all ranks. Only `loss` carries a gradient."""

    loss: Tensor  # () the total
    losses: Tensor  # (P,) contrastive losses, in the order of SimCLR.pairs
    queries: Tensor  # (P, N, D) each pair's query embeddings of the query clips
    keys: Tensor  # (P, N, D) each pair's key embeddings of the key clips


class SimCLR(Method):
    """DCLR without a queue: both clips of a video pass through one encoder, and all their embeddings get gradients.

    The activation maps that weigh a clip's rgb features come from the same encoder and the same clip, without gradient.
    With several ranks, embeddings are gathered with their gradients, so the loss is that of one rank with all N clips.

    SyncBatchNorm is not used. Its purpose is that a network cannot find the key of a query by the batch statistics of
    their rank. Here the clips are shuffled over the ranks instead, query clips and key clips together. Any two clips
    then share statistics equally often, whether they are a pair or not. SyncBatchNorm would add a collective operation
    to each layer, and the backbone could not be compiled as one graph.

    Attributes:
        auxiliary: letters of the auxiliary views, "sd", "s" or "d".
        pairs: names of the P pairs.
    """

    settings = Method.settings | {
        "static_pairs", "dynamic_pairs", "activation_maps", "boundary", "temperature", "negatives",
    }  # fmt: skip
    auxiliary_views: ClassVar[tuple[str, ...]] = ("static", "dynamic")
    in_batch_negatives = True
    shuffled = ("query", "key")

    def __init__(self, model: "ModelConfig", method: "MethodConfig", seed: int = 0) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.auxiliary = "".join(view[0] for view in method.auxiliary_views)
        self.pairs = pairs_of(self.auxiliary)
        self.query = Encoder(model, method.embedding_dim, self.pairs)
        self._equal_batches = False  # not yet checked

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """Compute one step.

        Args:
            query, key: the three views of the query clips and of the key clips, each (B, 3, T, H, W). With several
                ranks, they are the two halves of the clips that `shuffle` sends to this rank.
            step: the number of the micro-batch, which seeds the shuffle. It must be the same on all ranks.

        Raises:
            UserError: on all ranks, in the first step, if the ranks have micro-batches of different sizes.
            ValueError: there is only one clip.
        """
        self._check_equal_batches(query.rgb.shape[0])
        first, second = self._embed(query, key, step)
        forth = self._query_and_key(first, second)
        back = self._query_and_key(second, first)
        own_view = self.method.negatives == "all"
        losses = torch.stack(
            [in_batch_info_nce(q, k, self.method.temperature, own_view) for q, k in (forth, back)]
        ).mean(0)
        queries, keys = forth
        return Output(losses.sum(), losses.detach(), queries.detach(), keys.detach())

    def terms(self, output: Output) -> dict[str, Tensor]:
        """Return the loss and the losses of the pairs, each ()."""
        return {**super().terms(output), **by_pair(self.pairs, "pair_loss", output.losses)}

    def metrics(self, output: Output) -> dict[str, float]:
        """Return a step's losses and similarities of query clips to key clips, under the names of the log."""
        similarities = output.queries @ output.keys.transpose(1, 2)  # (P, N, N)
        clips = similarities.shape[1]
        own = torch.arange(clips, device=similarities.device)
        positive = similarities.diagonal(dim1=1, dim2=2).mean(1)
        nearest = (similarities.argmax(2) == own).float().mean(1)
        hardest = similarities.masked_fill(own == own[:, None], -torch.inf).amax(2).mean(1)
        metrics = means_over_ranks(
            {
                **self.terms(output),
                **by_pair(self.pairs, "positive_similarity", positive),
                **by_pair(self.pairs, "hardest_negative", hardest),
                **by_pair(self.pairs, "nearest_key", nearest),
            }
        )
        metrics["pair_loss/plateau"] = self.plateau(clips)
        metrics["loss_plateau"] = len(self.pairs) * self.plateau(clips)
        metrics["nearest_key/mean"] = sum(metrics[f"nearest_key/{pair}"] for pair in self.pairs) / len(self.pairs)
        return metrics

    def plateau(self, clips: int) -> float:
        """Return a pair's loss if all similarities of N `clips` are equal: ln N, or ln(2N - 1) with all negatives."""
        return math.log(2 * clips - 1 if self.method.negatives == "all" else clips)

    def _query_and_key(self, own: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return each pair's query embedding of the own clips and key embedding of the other clips, each (P, N, D)."""
        return torch.stack([own[p] for p in self.pairs]), torch.stack([other[KEY_OF_PAIR[p]] for p in self.pairs])

    def _embed(self, query: Views, key: Views, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the embeddings (N, D) of all ranks' query clips and of their key clips, by name.

        All clips of a rank pass through the encoder as one batch.
        """
        size, frames = query.rgb.shape[0], query.rgb.shape[2]
        views = [(query.rgb, key.rgb), (query.static[:, :, :1], key.static[:, :, :1]), (query.dynamic, key.dynamic)]
        rgb, still, dynamic = (torch.cat(pair) for pair in views)
        clips = Views(rgb, still.expand(-1, -1, frames, -1, -1), dynamic)

        features = run_backbone(self.query, clips, "v" + self.auxiliary)
        maps = {letter: activation_map(features[letter].detach()) for letter in self.auxiliary}
        embeddings = self.query.embed(features, maps if self.method.activation_maps else {})
        gathered = torch.stack(list(embeddings.values()), dim=1)  # (2B, P, D)
        shuffle = self.shuffle(size, step)
        if shuffle is not None:
            back = to_device(shuffle.order.argsort(), gathered.device)
            gathered = distributed.gather_batch_with_gradient(gathered)[back]
        first, second = gathered.unflatten(0, (-1, 2, size)).unbind(1)  # each (ranks, B, P, D)
        query_clips, key_clips = (
            dict(zip(embeddings, half.flatten(0, 1).unbind(1), strict=True)) for half in (first, second)
        )
        return query_clips, key_clips

    def _check_equal_batches(self, size: int) -> None:
        """Raise UserError on all ranks if the micro-batches of the ranks have different sizes, in the first step."""
        if self._equal_batches:
            return
        sizes = distributed.gather_objects(size)
        if len(set(sizes)) > 1:
            raise UserError(
                f"--method {self.method.method}: the processes have micro-batches of {', '.join(map(str, sizes))} "
                "clips, but need equal ones, because their clips are each other's negatives"
            )
        self._equal_batches = True


def in_batch_info_nce(
    queries: Tensor,  # (P, N, D)
    keys: Tensor,  # (P, N, D)
    temperature: float,
    own_view: bool = False,
) -> Tensor:  # (P,)
    """Return the InfoNCE loss of each of P pairs, averaged over its N queries, whose negatives are the other keys.

    With logits l_ij = q_i . k_j / temperature,
        loss_i = -log( exp(l_ii) / sum over j of exp(l_ij) ).
    With `own_view`, the sum also has exp(q_i . q_j / temperature) for all j != i, as in NT-Xent (SimCLR).
    Queries and keys both receive gradients. Arithmetic and result are float32, also under autocast.

    The fused kernel of kernels/info_nce.py is not used. It avoids storing logits of long queues, and its keys receive
    no gradient. These logits are small: P * N * N * 4 bytes are 82 KB for 5 pairs of 64 clips and 5.2 MB for 512, twice
    as much with `own_view`. The activations of a step have gigabytes.

    Args:
        queries, keys: L2-normalised. Key i belongs to query i.
        temperature: greater than 0.
        own_view: whether the other queries are negatives too.

    Raises:
        ValueError: shapes differ, or N is 1: there is no negative.
    """
    if queries.shape != keys.shape or queries.shape[1] < 2:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)}: need equal shapes, N at least 2"
        )
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = queries.float(), keys.float()
        logits = queries @ keys.transpose(1, 2) / temperature  # (P, N, N)
        positive = logits.diagonal(dim1=1, dim2=2)
        if own_view:
            itself = torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
            others = (queries @ queries.transpose(1, 2) / temperature).masked_fill(itself, -torch.inf)
            logits = torch.cat([logits, others], dim=2)
        return (torch.logsumexp(logits, dim=2) - positive).mean(dim=1)
