"""Dual Contrastive Learning (DCLR): query and key networks, the queue, the five pairs and the total loss.

Letters: B clips in a batch, C channels, T frames, H W pixels, D embedding size, K queue length, P = 5 pairs, M mined positives.
Source: Ding, Qian, Xiong, "Dual Contrastive Learning for Spatio-temporal Representation", ACM MM 2022 (arXiv 2207.05340).
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dclr import distributed
from dclr.config import MethodConfig, ModelConfig
from dclr.models import ProjectionHead, activation_map, build_backbone, pool
from kernels import Views, contrast, mine_positives_by_each
from kernels.backend import to_device

# An embedding is named by what it holds of which view: vs is the static part of the rgb clip, sv the static view itself.
# A pair is named by its query; its key is the same content seen from the other side.
PAIRS = ("vv", "vs", "vd", "sv", "dv")
KEY_OF_PAIR = {"vv": "vv", "vs": "sv", "vd": "dv", "sv": "vs", "dv": "vd"}


class Encoder(nn.Module):
    """A backbone shared by the three views, and a projection head for each of the five embeddings."""

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = build_backbone(model.backbone, model.width)
        self.heads = nn.ModuleDict({name: ProjectionHead(self.backbone.feature_dim, embedding_dim) for name in PAIRS})

    def embed(
        self, rgb: Tensor, static: Tensor, dynamic: Tensor, static_map: Tensor, dynamic_map: Tensor
    ) -> dict[str, Tensor]:
        """Feature maps of the three views (B, C, t, h, w), and the maps (B, 1, t, h, w) that weigh the rgb features -> five (B, D)."""
        pooled = {
            "vv": pool(rgb),
            "vs": pool(rgb, static_map),
            "vd": pool(rgb, dynamic_map),
            "sv": pool(static),
            "dv": pool(dynamic),
        }
        return {name: self.heads[name](features) for name, features in pooled.items()}


class Output(NamedTuple):
    """What a step computes; only `loss` carries a gradient."""

    loss: Tensor  # () the total
    losses: Tensor  # (P,) contrastive, in the order of PAIRS
    alignment: Tensor  # () the alignment term before its weight
    alignment_other_form: Tensor  # () raw where relative is trained, relative where raw is
    alignment_key_maps: Tensor  # () the term as its name in the released code hints: against the key clip's maps
    repel: Tensor  # () mean cosine of static and dynamic features
    positive: Tensor  # (P,) mean similarity of query and key
    hardest_negative: Tensor  # (P,) mean similarity of a query to the most similar row of the queue


class DCLR(nn.Module):
    """The query network learns; the key network follows it slowly and fills the queue.

    Row j of every queue is the same past clip. `queue[p]` holds past keys of PAIRS[p]; rows not yet written are random directions.
    """

    queue: Tensor  # (P, K, D)
    enqueued: Tensor  # (1,) int64: clips written since the start; the next goes to row enqueued % K

    def __init__(self, model: ModelConfig, method: MethodConfig, seed: int = 0) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.query = Encoder(model, method.embedding_dim)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = F.normalize(torch.randn(len(PAIRS), method.queue_length, method.embedding_dim), dim=2)
        self.register_buffer("queue", queue)
        self.register_buffer("enqueued", torch.zeros(1, dtype=torch.int64))  # 0-d tensors crash deepspeed.initialize

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """One step on a batch: three views of each clip of a pair, each (B, 3, T, H, W). Writes the keys into the queue.

        `step` seeds the shuffle of the keys over the ranks and must be the same on all.
        """
        rgb, static, dynamic = self.query.backbone(torch.cat(query)).chunk(3)  # one batch: batch statistics are shared
        static_map, dynamic_map, mining = self._look_at_query(query)
        keys, all_keys, key_maps = self._encode_key(key, step)
        embeddings = self.query.embed(rgb, static, dynamic, static_map, dynamic_map)
        queries = torch.stack([embeddings[name] for name in PAIRS])  # (P, B, D)

        # Mined rows are rows of the queue: to check them would be to wait for them.
        mined, temperature = self._mine(mining), self.method.temperature
        losses, positive, hardest = contrast(queries, keys, self.queue, mined, temperature, check_rows=False)
        self._enqueue(all_keys)

        relative = self.method.alignment == "relative"
        rgb_map = activation_map(rgb)
        alignment = align(rgb_map, static_map, dynamic_map, relative)
        repel = F.cosine_similarity(pool(static), pool(dynamic)).mean()
        loss = losses.sum() + self.method.alignment_weight * alignment
        if self.method.repel_weight:
            loss = loss + self.method.repel_weight * repel
        with torch.no_grad():
            raw = align(rgb_map, static_map, dynamic_map, not relative)
            hinted = align(rgb_map, *key_maps, relative)
        return Output(loss, losses.detach(), alignment.detach(), raw, hinted, repel.detach(), positive, hardest)

    @torch.no_grad()
    def fill(self, key: Views, step: int) -> Tensor:
        """Only write a batch's keys into the queue; returns those of the own clips (P, B, D)."""
        keys, all_keys, _ = self._encode_key(key, step)
        self._enqueue(all_keys)
        return keys

    @torch.no_grad()
    def update_key(self) -> None:
        """key <- momentum * key + (1 - momentum) * query, parameters only; batch statistics are the key network's own (MoCo)."""
        torch._foreach_lerp_(
            [p.data for p in self.key.parameters()],
            [p.data for p in self.query.parameters()],
            1 - self.method.key_momentum,
        )

    @torch.no_grad()
    def _look_at_query(self, query: Views) -> tuple[Tensor, Tensor, Tensor]:
        """What the key network sees in the query clip: activation maps (B, 1, t, h, w) of its static and dynamic views, and the
        features (2, B, D) by which similar rows of the queue are found."""
        static, dynamic = self.key.backbone(torch.cat([query.static, query.dynamic])).chunk(2)
        mining = torch.stack([self.key.heads["sv"](pool(static)), self.key.heads["dv"](pool(dynamic))])
        return activation_map(static), activation_map(dynamic), mining

    @torch.no_grad()
    def _encode_key(self, key: Views, step: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Keys of the own clips (P, B, D), of all ranks' clips (P, ranks * B, D), and the own clips' static and dynamic maps.

        Clips are shuffled over the ranks, so that a query and its key never share batch statistics (MoCo, section 3.3). Embeddings
        and maps are made where the clip was sent, from the same features, and travel back together.
        """
        ranks, rank, size = distributed.world_size(), distributed.rank(), key.rgb.shape[0]
        own = slice(rank * size, (rank + 1) * size)
        if ranks > 1:
            order = torch.randperm(ranks * size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step))
            mine = to_device(order[own], key.rgb.device)
            key = Views(*(distributed.gather_batch(view)[mine] for view in key))
        rgb, static, dynamic = self.key.backbone(torch.cat(key)).chunk(3)
        maps = torch.cat([activation_map(static), activation_map(dynamic)], dim=1)  # (B, 2, t, h, w)
        embeddings = self.key.embed(rgb, static, dynamic, maps[:, :1], maps[:, 1:])
        keys = torch.stack([embeddings[KEY_OF_PAIR[name]] for name in PAIRS], dim=1)  # (B, P, D)
        if ranks > 1:
            back = to_device(order.argsort(), keys.device)
            keys, maps = distributed.gather_batch(keys)[back], distributed.gather_batch(maps)[back]
        own_maps = maps[own] if ranks > 1 else maps
        all_keys = keys.transpose(0, 1).contiguous()
        return all_keys[:, own].contiguous(), all_keys, (own_maps[:, :1], own_maps[:, 1:])

    @torch.no_grad()
    def _mine(self, mining: Tensor) -> Tensor | None:
        """Rows (P, B, M) of the queue most like the query clip, all missing (-1) until every row is a real key.

        sv keys are past static views and dv keys past dynamic ones: they are the queues of the pairs vs and vd.
        """
        if self.method.mined_positives == 0:
            return None
        # Neighbours in PAIRS, so that this is a view: (2, K, D).
        past = self.queue[PAIRS.index("vs") : PAIRS.index("vd") + 1]
        static, dynamic, both = mine_positives_by_each(mining, past, self.method.mined_positives)
        rows = {"vv": both, "vs": static, "sv": static, "vd": dynamic, "dv": dynamic}
        mined = torch.stack([rows[name] for name in PAIRS])
        full = self.enqueued >= self.method.queue_length  # stays on the device: asking the host would stop the stream
        return torch.where(full, mined, -1)

    def _enqueue(self, keys: Tensor) -> None:
        """Write keys (P, N, D), N <= K, over the oldest rows of the ring, wrapping at its end."""
        length = self.method.queue_length
        if keys.shape[1] > length:
            raise ValueError(f"keys: {keys.shape[1]} at once, but the queue has {length} rows")
        rows = (self.enqueued + torch.arange(keys.shape[1], device=keys.device)) % length
        self.queue.index_copy_(1, rows, keys.to(self.queue.dtype))
        self.enqueued += keys.shape[1]


def align(rgb: Tensor, static: Tensor, dynamic: Tensor, relative: bool) -> Tensor:
    """Activation alignment of one clip's three maps (B, 1, t, h, w): raw, mean((A_v - (A_s + A_d))^2), from the paper's figure;
    relative, the same on maps divided by their own mean, mean((a_v - (a_s + a_d) / 2)^2), as pooling uses them."""
    if not relative:
        return (rgb - (static + dynamic)).square().mean()
    rgb, static, dynamic = (m / m.mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-6) for m in (rgb, static, dynamic))
    return (rgb - (static + dynamic) / 2).square().mean()
