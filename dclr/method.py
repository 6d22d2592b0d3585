"""Dual Contrastive Learning (DCLR): query and key networks, the queue, the five pairs and the total loss.

Letters: B clips in a batch, C channels, T frames, H W pixels, D embedding size, K queue length, P pairs, M mined positives, S parts.
Source: Ding, Qian, Xiong, "Dual Contrastive Learning for Spatio-temporal Representation", ACM MM 2022 (arXiv 2207.05340).

The *parts* of a clip are what its rgb view is contrasted with, static and dynamic, S = 2 and P = 5. An ablation leaves one out, with its
pairs, its view and its map. Without both, S = 0 and P = 1, it is MoCo (He et al., CVPR 2020, arXiv 1911.05722), the baseline.
"""

import copy
from collections.abc import Sequence
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

VIEW_OF_LETTER = {"v": "rgb", "s": "static", "d": "dynamic"}

ByLetter = dict[str, Tensor]
"""Feature maps or activation maps, by the letter of their view."""


class Encoder(nn.Module):
    """A backbone shared by the views, and a projection head for each of the embeddings."""

    def __init__(self, model: ModelConfig, embedding_dim: int, pairs: Sequence[str] = PAIRS) -> None:
        super().__init__()
        self.backbone = build_backbone(model.backbone, model.width)
        self.heads = nn.ModuleDict({name: ProjectionHead(self.backbone.feature_dim, embedding_dim) for name in pairs})

    def embed(self, features: ByLetter, maps: ByLetter) -> dict[str, Tensor]:
        """Feature maps (B, C, t, h, w) of the views, and the maps (B, 1, t, h, w) that weigh the rgb features -> (B, D) by name."""
        embeddings = {}
        for name, head in self.heads.items():
            view, part = name[0], name[1]
            weight = maps.get(part) if view == "v" else None  # none for vv
            embeddings[name] = head(pool(features[view], weight))
        return embeddings


class Output(NamedTuple):
    """What a step computes; only `loss` carries a gradient. None: what the method has no parts for."""

    loss: Tensor  # () the total
    losses: Tensor  # (P,) contrastive, in the order of DCLR.pairs
    positive: Tensor  # (P,) mean similarity of query and key
    hardest_negative: Tensor  # (P,) mean similarity of a query to the most similar row of the queue
    alignment: Tensor | None = None  # () the alignment term before its weight
    alignment_other_form: Tensor | None = None  # () raw where relative is trained, relative where raw is
    alignment_key_maps: Tensor | None = None  # () against the key clip's maps, as its name in the released code hints
    repel: Tensor | None = None  # () mean cosine of static and dynamic features


class DCLR(nn.Module):
    """The query network learns; the key network follows it slowly and fills the queue.

    Row j of every queue is the same past clip. `queue[p]` holds past keys of pairs[p]; rows not yet written are random directions.
    """

    queue: Tensor  # (P, K, D)
    enqueued: Tensor  # (1,) int64: clips written since the start; the next goes to row enqueued % K

    def __init__(self, model: ModelConfig, method: MethodConfig, seed: int = 0) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.parts = "".join(view[0] for view in method.auxiliary_views)  # their letters
        self.pairs = tuple(name for name in PAIRS if set(name) <= set("v" + self.parts))
        self.query = Encoder(model, method.embedding_dim, self.pairs)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = F.normalize(torch.randn(len(self.pairs), method.queue_length, method.embedding_dim), dim=2)
        self.register_buffer("queue", queue)
        self.register_buffer("enqueued", torch.zeros(1, dtype=torch.int64))  # 0-d tensors crash deepspeed.initialize

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """One step on a batch: three views of each clip of a pair, each (B, 3, T, H, W). Writes the keys into the queue.

        `step` seeds the shuffle of the keys over the ranks and must be the same on all.
        """
        features = run_backbone(self.query, query, "v" + self.parts)
        maps, mining = self._look_at_query(query)
        keys, all_keys, key_maps = self._encode_key(key, step)
        embeddings = self.query.embed(features, self._weights(maps))
        queries = torch.stack([embeddings[name] for name in self.pairs])  # (P, B, D)

        # Mined rows are rows of the queue: to check them would be to wait for them.
        mined, temperature = self._mine(mining), self.method.temperature
        losses, positive, hardest = contrast(queries, keys, self.queue, mined, temperature, check_rows=False)
        self._enqueue(all_keys)

        output = Output(losses.sum(), losses.detach(), positive, hardest)
        return self._with_terms_of_parts(output, features, maps, key_maps) if self.parts else output

    def _with_terms_of_parts(self, output: Output, features: ByLetter, maps: ByLetter, key_maps: ByLetter) -> Output:
        """Adds alignment and repulsion to the loss."""
        relative = self.method.alignment == "relative"
        rgb_map = activation_map(features["v"])
        alignment = align(rgb_map, list(maps.values()), relative)
        loss = output.loss + self.method.alignment_weight * alignment
        repel = None
        if self.parts == "sd":
            repel = F.cosine_similarity(pool(features["s"]), pool(features["d"])).mean()
            if self.method.repel_weight:
                loss = loss + self.method.repel_weight * repel
            repel = repel.detach()
        with torch.no_grad():
            other = align(rgb_map, list(maps.values()), not relative)
            hinted = align(rgb_map, list(key_maps.values()), relative)
        return output._replace(
            loss=loss,
            alignment=alignment.detach(),
            alignment_other_form=other,
            alignment_key_maps=hinted,
            repel=repel,
        )

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

    def _weights(self, maps: ByLetter) -> ByLetter:
        """The maps that weigh the rgb features: none where they are switched off."""
        return maps if self.method.activation_maps else {}

    @torch.no_grad()
    def _look_at_query(self, query: Views) -> tuple[ByLetter, Tensor | None]:
        """What the key network sees in the query clip: activation maps (B, 1, t, h, w) of its parts, and the features (S, B, D) by
        which similar rows of the queue are found."""
        if not self.parts:
            return {}, None
        features = run_backbone(self.key, query, self.parts)
        mining = torch.stack([self.key.heads[part + "v"](pool(features[part])) for part in self.parts])
        return {part: activation_map(features[part]) for part in self.parts}, mining

    @torch.no_grad()
    def _encode_key(self, key: Views, step: int) -> tuple[Tensor, Tensor, ByLetter]:
        """Keys of the own clips (P, B, D), of all ranks' clips (P, ranks * B, D), and the activation maps of the own clips' parts.

        Clips are shuffled over the ranks, so that a query and its key never share batch statistics (MoCo, section 3.3). Embeddings
        and maps are made where the clip was sent, from the same features, and travel back together.
        """
        ranks, rank, size = distributed.world_size(), distributed.rank(), key.rgb.shape[0]
        own = slice(rank * size, (rank + 1) * size)
        if ranks > 1:
            order = torch.randperm(ranks * size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + step))
            mine = to_device(order[own], key.rgb.device)
            key = Views(*(distributed.gather_batch(view)[mine] for view in key))
        features = run_backbone(self.key, key, "v" + self.parts)
        maps = {part: activation_map(features[part]) for part in self.parts}
        embeddings = self.key.embed(features, self._weights(maps))
        keys = torch.stack([embeddings[KEY_OF_PAIR[name]] for name in self.pairs], dim=1)  # (B, P, D)
        if ranks > 1:
            back = to_device(order.argsort(), keys.device)
            keys = distributed.gather_batch(keys)[back]
            if maps:
                together = distributed.gather_batch(torch.cat(list(maps.values()), dim=1))[back]  # (B, S, t, h, w)
                maps = dict(zip(self.parts, together[own].split(1, dim=1), strict=True))
        all_keys = keys.transpose(0, 1).contiguous()
        return all_keys[:, own].contiguous(), all_keys, maps

    @torch.no_grad()
    def _mine(self, mining: Tensor | None) -> Tensor | None:
        """Rows (P, B, M) of the queue most like the query clip, all missing (-1) until every row is a real key.

        sv keys are past static views and dv keys past dynamic ones: they are the queues of the pairs vs and vd.
        """
        if mining is None or self.method.mined_positives == 0:
            return None
        # vs and vd are neighbours in PAIRS, behind vv, so that this is a view: (S, K, D).
        past = self.queue[1 : 1 + len(self.parts)]
        *by_part, by_all = mine_positives_by_each(mining, past, self.method.mined_positives)
        rows = {"v": by_all, **dict(zip(self.parts, by_part, strict=True))}
        mined = torch.stack([rows[name.strip("v") or "v"] for name in self.pairs])
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


def run_backbone(encoder: Encoder, views: Views, letters: str) -> ByLetter:
    """Feature maps (B, C, t, h, w) of some views of a clip, as one batch: its statistics are shared."""
    stacked = torch.cat([getattr(views, VIEW_OF_LETTER[letter]) for letter in letters])
    return dict(zip(letters, encoder.backbone(stacked).chunk(len(letters)), strict=True))


def align(rgb: Tensor, parts: Sequence[Tensor], relative: bool) -> Tensor:
    """Activation alignment of one clip's maps (B, 1, t, h, w): raw, mean((A_v - (A_s + A_d))^2), from the paper's figure;
    relative, the same on maps divided by their own mean, mean((a_v - (a_s + a_d) / 2)^2), as pooling uses them."""
    if not relative:
        return (rgb - torch.stack(list(parts)).sum(0)).square().mean()
    rgb, *shares = (m / m.mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-6) for m in (rgb, *parts))
    return (rgb - torch.stack(shares).mean(0)).square().mean()
