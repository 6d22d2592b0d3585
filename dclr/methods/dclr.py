"""Dual Contrastive Learning (DCLR): query and key encoders, queues, five pairs and the total loss.

Letters: B clips in a batch, C channels, T frames, H W pixels, D embedding size, K queue length, P pairs, M mined
positives, S auxiliary views. Small t h w are the sizes of a feature map.
Source: Ding, Qian, Xiong, "Dual Contrastive Learning for Spatio-temporal Representation", ACM MM 2022
(arXiv 2207.05340).

The auxiliary views of a clip are its static and its dynamic view, S = 2 and P = 5. An ablation removes one of them,
together with its pairs and its activation map. Without both (S = 0 and P = 1) the method is MoCo, see moco.py.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dclr import distributed
from dclr.kernels import Views, contrast, mine_positives_by_each
from dclr.kernels.backend import to_device
from dclr.methods.encoder import KEY_OF_PAIR, ByLetter, Encoder, by_pair, pairs_of, run_backbone
from dclr.methods.method import QUEUE_SETTINGS, VIEW_SETTINGS, Method, means_over_ranks
from dclr.models import activation_map, pool

if TYPE_CHECKING:  # dclr.config imports the methods' names
    from dclr.config import MethodConfig, ModelConfig


class Output(NamedTuple):
    """The results of a step. Only `loss` carries a gradient. A term that the method does not have is None."""

    loss: Tensor  # () the total
    losses: Tensor  # (P,) contrastive losses, in the order of DCLR.pairs
    positive: Tensor  # (P,) mean similarity of query and key
    hardest_negative: Tensor  # (P,) mean similarity of a query and its most similar queue entry
    queries: Tensor  # (P, B, D) embeddings of this rank's query clips, for `DCLR.nearest_key`
    alignment: Tensor | None = None  # () the alignment term before its weight
    alignment_other_form: Tensor | None = None  # () the form that is not trained: raw or relative
    alignment_key_maps: Tensor | None = None  # () with the key clip's maps, as in the released code
    repel: Tensor | None = None  # () mean cosine of static and dynamic features
    further: Mapping[str, Tensor] = MappingProxyType({})  # terms () of a method that extends this one, by name


class DCLR(Method):
    """Query encoder, key encoder and queues. The query encoder learns; the key encoder follows it and fills the queues.

    Entry j of every queue belongs to the same past clip. `queue[p]` holds past keys of pairs[p]. Entries that are not
    yet written are random directions.

    Attributes:
        auxiliary: letters of the auxiliary views, "sd" in DCLR and "" in MoCo.
        pairs: names of the P pairs.
    """

    settings = Method.settings | QUEUE_SETTINGS | VIEW_SETTINGS | {"temperature", "key_momentum", "symmetric_loss"}
    auxiliary_views: ClassVar[tuple[str, ...]] = ("static", "dynamic")
    has_queue = True
    shuffled = ("key",)
    queue: Tensor  # (P, K, D)
    enqueued: Tensor  # (1,) int64: clips written so far; the next clip goes to entry enqueued % K

    def __init__(self, model: "ModelConfig", method: "MethodConfig", seed: int = 0) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.auxiliary = "".join(view[0] for view in method.auxiliary_views)
        self.pairs = pairs_of(self.auxiliary)
        self.query = Encoder(model, method.embedding_dim, self.pairs)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        queue = F.normalize(torch.randn(len(self.pairs), method.queue_length, method.embedding_dim), dim=2)
        self.register_buffer("queue", queue)
        # One dimension, because deepspeed.initialize fails on tensors without dimensions.
        self.register_buffer("enqueued", torch.zeros(1, dtype=torch.int64))

    def forward(self, query: Views, key: Views, step: int) -> Output:
        """Compute one step and write its keys into the queues.

        Args:
            query, key: the three views of the query clips and of the key clips, each (B, 3, T, H, W). With several
                ranks, the query clips are this rank's own, and the key clips those that `shuffle` sends to it.
            step: the number of the micro-batch, which seeds the shuffle. It must be the same on all ranks.

        Returns:
            the results, with --symmetric-loss the means over both directions. Both use the queues before the step.
            Each clip is the query of one direction and the key of the other on the same rank, so it travels once.
        """
        output, keys = self._contrast(query, key, step)
        if self.method.keys_per_sample == 2:
            other_output, other_keys = self._contrast(key, query, step, swapped=True)
            output, keys = mean_of_directions(output, other_output), torch.cat([keys, other_keys], dim=1)
        self._enqueue(keys)
        return output

    def _contrast(self, query: Views, key: Views, step: int, swapped: bool = False) -> tuple[Output, Tensor]:
        """Return the results of contrasting query with key clips, and all ranks' keys (P, ranks * B, D).

        `swapped`: see `_encode_key`.
        """
        features = run_backbone(self.query, query, "v" + self.auxiliary)
        maps, mining = self._look_at_query(query)
        keys, all_keys, key_maps = self._encode_key(key, step, swapped)
        embeddings = self.query.embed(features, self._weights(maps))
        queries = torch.stack([embeddings[name] for name in self.pairs])  # (P, B, D)

        # Mined entries exist, so they are not checked: a check would make the host wait for the device.
        mined, temperature = self._mine(mining), self.method.temperature
        losses, positive, hardest = contrast(queries, keys, self.queue, mined, temperature, check_rows=False)
        output = Output(losses.sum(), losses.detach(), positive, hardest, queries.detach())
        if self.auxiliary:
            output = self._with_auxiliary_terms(output, features, maps, key_maps)
        return output, all_keys

    def _with_auxiliary_terms(self, output: Output, features: ByLetter, maps: ByLetter, key_maps: ByLetter) -> Output:
        """Add the alignment and the repulsion of the auxiliary views to the loss."""
        relative = self.method.alignment == "relative"
        rgb_map = activation_map(features["v"])
        alignment = align(rgb_map, list(maps.values()), relative)
        loss = output.loss + self.method.alignment_weight * alignment
        repel = None
        if self.auxiliary == "sd":
            repel = F.cosine_similarity(pool(features["s"]), pool(features["d"])).mean()
            if self.method.repel_weight:
                loss = loss + self.method.repel_weight * repel
            repel = repel.detach()
        with torch.no_grad():
            other_form = align(rgb_map, list(maps.values()), not relative)
            with_key_maps = align(rgb_map, list(key_maps.values()), relative)
        return output._replace(
            loss=loss,
            alignment=alignment.detach(),
            alignment_other_form=other_form,
            alignment_key_maps=with_key_maps,
            repel=repel,
        )

    @torch.no_grad()
    def fill(self, query: Views, key: Views, step: int) -> dict[str, Tensor]:
        """Write the keys of a batch into the queues, as `forward` does, without computing a loss.

        Returns:
            one number for each pair. It is finite if the pair's keys are: keys have length 1.
        """
        keys, all_keys, _ = self._encode_key(key, step)
        if self.method.keys_per_sample == 2:
            other_keys, all_other_keys, _ = self._encode_key(query, step, swapped=True)
            keys, all_keys = torch.cat([keys, other_keys], dim=1), torch.cat([all_keys, all_other_keys], dim=1)
        self._enqueue(all_keys)
        return by_pair(self.pairs, "key", keys.float().sum((1, 2)))

    def reset_key(self) -> None:
        """Make the key encoder equal to the query encoder."""
        self.key.load_state_dict(self.query.state_dict())
        self.key.backbone.statistics = self.query.backbone.statistics

    @torch.no_grad()
    def update_key(self) -> None:
        """Move the key encoder: key <- momentum * key + (1 - momentum) * query.

        Only parameters move. The key encoder has batch statistics of its own (MoCo).
        """
        move = get_ema_multi_avg_fn(self.method.key_momentum)
        move([p.data for p in self.key.parameters()], [p.data for p in self.query.parameters()], None)

    def terms(self, output: Output) -> dict[str, Tensor]:
        """Return the loss and its terms, each (), under the names of the log."""
        terms = {
            **super().terms(output),
            **by_pair(self.pairs, "pair_loss", output.losses),
            "alignment": output.alignment,
            "repel": output.repel,
            **output.further,
        }
        return {name: value for name, value in terms.items() if value is not None}

    def metrics(self, output: Output) -> dict[str, float]:
        """Return a micro-batch's losses and similarities, means over ranks, under the names of the log."""
        terms = {
            **self.terms(output),
            "alignment_other_form": output.alignment_other_form,
            "alignment_key_maps": output.alignment_key_maps,
            **by_pair(self.pairs, "positive_similarity", output.positive),
            **by_pair(self.pairs, "hardest_negative", output.hardest_negative),
            **by_pair(self.pairs, "nearest_key", self.nearest_key(output.queries)),
            **by_pair(self.pairs, "batch_loss", self.batch_loss(output.queries)),
        }
        metrics = means_over_ranks({name: value for name, value in terms.items() if value is not None})
        # The loss of a network that cannot tell any two clips apart, without mined positives and with them.
        metrics["pair_loss/ln_K_plus_1"] = math.log(self.method.queue_length + 1)
        metrics["pair_loss/plateau"] = self.plateau()
        metrics["loss_plateau"] = len(self.pairs) * metrics["pair_loss/plateau"]
        metrics["nearest_key/mean"] = sum(metrics[f"nearest_key/{pair}"] for pair in self.pairs) / len(self.pairs)
        metrics["batch_loss/plateau"] = math.log(distributed.world_size() * output.queries.shape[1])
        if "alignment" in metrics:
            share = self.method.alignment_weight * metrics["alignment"] / metrics["loss"] if metrics["loss"] else 0.0
            metrics["alignment_share"] = share
        return metrics

    def first_step(self, metrics: dict[str, float]) -> dict[str, dict[str, float]]:
        """Return the alignment term, in the forms that are logged and as a share of the loss."""
        names = ("alignment", "alignment_other_form", "alignment_key_maps", "alignment_share")
        return {"alignment_at_first_step": {name: metrics[name] for name in names if name in metrics}}

    def plateau(self) -> float:
        """Return the loss of a pair if all similarities are equal: ln(K + 1), less ln(M + 1) once entries are mined.

        The loss is -ln(sum over positives / sum over all) of K + 1 equal terms, of which 1 + M are positives.
        """
        mines = bool(self.auxiliary) and int(self.enqueued) >= self.method.queue_length
        mined = self.method.mined_positives if mines else 0
        return math.log((self.method.queue_length + 1) / (mined + 1))

    @torch.no_grad()
    def nearest_key(self, queries: Tensor) -> Tensor:
        """Return for each pair the share (P,) of queries to which their own key is nearer than all other queue entries.

        `queries`: (P, B, D) of the newest step, whose keys are the newest entries of the queue. So the keys of the
        step's other clips count as negatives here, which the loss does not use.
        """
        ranks, size, length = distributed.world_size(), queries.shape[1], self.method.queue_length
        written = ranks * size * self.method.keys_per_sample
        first = self.enqueued - written + distributed.rank() * size
        own = (first + torch.arange(size, device=queries.device)) % length  # (B,)
        similarity = queries.float() @ self.queue.float().transpose(1, 2)  # (P, B, K)
        if self.method.keys_per_sample == 2:
            # The other direction has made a key of the query clip itself. It does not count.
            itself = (own + ranks * size) % length
            similarity[:, torch.arange(size, device=queries.device), itself] = -torch.inf
        return (similarity.argmax(2) == own).float().mean(1)

    @torch.no_grad()
    def batch_loss(self, queries: Tensor) -> Tensor:
        """Return each pair's InfoNCE loss (P,) among the N keys of the step, those of all ranks, without the queue.

        All N keys are equally new. A network that tells new keys from old ones, and not clips apart, has a loss of
        ln N. `queries`: see `nearest_key`.
        """
        ranks, size, length = distributed.world_size(), queries.shape[1], self.method.queue_length
        written = ranks * size * self.method.keys_per_sample
        entries = (self.enqueued - written + torch.arange(ranks * size, device=queries.device)) % length
        keys = self.queue.index_select(1, entries)  # (P, N, D)
        logits = queries.float() @ keys.float().transpose(1, 2) / self.method.temperature  # (P, B, N)
        own = torch.arange(size, device=queries.device)
        return -logits.log_softmax(2)[:, own, distributed.rank() * size + own].mean(1)

    def _weights(self, maps: ByLetter) -> ByLetter:
        """Return the maps that weigh the rgb features: none if --no-activation-maps is given."""
        return maps if self.method.activation_maps else {}

    @torch.no_grad()
    def _look_at_query(self, query: Views) -> tuple[ByLetter, Tensor | None]:
        """Pass the query clips' views through the key encoder: the auxiliary ones, or all (--key-encoder-views).

        The rgb view then only changes the batch statistics that the auxiliary views are normalised with.

        Returns:
            Their activation maps (B, 1, t, h, w), and the features (S, B, D) by which similar queue entries are mined.
        """
        if not self.auxiliary:
            return {}, None
        rgb = "v" if self.method.key_encoder_views == "all" else ""
        features = run_backbone(self.key, query, rgb + self.auxiliary)
        mining = torch.stack([self.key.heads[letter + "v"](pool(features[letter])) for letter in self.auxiliary])
        return {letter: activation_map(features[letter]) for letter in self.auxiliary}, mining

    @torch.no_grad()
    def _encode_key(self, key: Views, step: int, swapped: bool = False) -> tuple[Tensor, Tensor, ByLetter]:
        """Encode the key clips.

        Key clips are shuffled over the ranks, so that a query and its key never share batch statistics (MoCo, section
        3.3). Embeddings and maps are made on the rank that gets the clip, from the same features. All ranks get all
        embeddings. Maps return to the rank of their query.

        Args:
            key: views of the key clips that the shuffle sends to this rank. If `swapped`, the clips have changed roles:
                the keys are the query clips of this rank, and their queries are on the ranks that got the key clips.

        Returns:
            The keys of the clips whose queries are on this rank (P, B, D), all ranks' keys in the order of the batch
            (P, ranks * B, D), and the activation maps of the former's auxiliary views.
        """
        features = run_backbone(self.key, key, "v" + self.auxiliary)
        maps = {letter: activation_map(features[letter]) for letter in self.auxiliary}
        embeddings = self.key.embed(features, self._weights(maps))
        keys = torch.stack([embeddings[KEY_OF_PAIR[name]] for name in self.pairs], dim=1)  # (B, P, D)
        shuffle = self.shuffle(len(keys), step)
        if shuffle is None:
            all_keys = keys.transpose(0, 1).contiguous()
            return all_keys, all_keys, maps
        if maps:
            stacked = torch.cat(list(maps.values()), dim=1)  # (B, S, t, h, w)
            stacked = shuffle.send(stacked) if swapped else shuffle.send_back(stacked)
            maps = dict(zip(self.auxiliary, stacked.split(1, dim=1), strict=True))
        keys = distributed.gather_batch(keys) if swapped else shuffle.gather(keys)
        all_keys = keys.transpose(0, 1).contiguous()
        mine = to_device(shuffle.arrived if swapped else shuffle.own, keys.device)
        return all_keys[:, mine], all_keys, maps

    @torch.no_grad()
    def _mine(self, mining: Tensor | None) -> Tensor | None:
        """Return the numbers (P, B, M) of the queue entries most similar to each query clip.

        All are -1 (none) until every entry is a real key. The queue of pair vs holds past static views (sv keys), and
        the queue of pair vd holds past dynamic views (dv keys), so mining searches these two.
        """
        if mining is None or self.method.mined_positives == 0:
            return None
        # vs and vd follow vv in PAIRS, so this slice is a view: (S, K, D).
        past = self.queue[1 : 1 + len(self.auxiliary)]
        *by_view, by_all = mine_positives_by_each(mining, past, self.method.mined_positives)
        entries = {"v": by_all, **dict(zip(self.auxiliary, by_view, strict=True))}
        mined = torch.stack([entries[name.strip("v") or "v"] for name in self.pairs])
        # The device decides: if the host asked, it would have to wait for the device.
        full = self.enqueued >= self.method.queue_length
        return torch.where(full, mined, -1)

    def _enqueue(self, keys: Tensor) -> None:
        """Write keys (P, N, D), N <= K, over the oldest entries of the ring."""
        length = self.method.queue_length
        if keys.shape[1] > length:
            raise ValueError(f"keys: {keys.shape[1]} at once, but the queue has {length} entries")
        entries = (self.enqueued + torch.arange(keys.shape[1], device=keys.device)) % length
        self.queue.index_copy_(1, entries, keys.to(self.queue.dtype))
        self.enqueued += keys.shape[1]


def mean_of_directions(first: Output, second: Output) -> Output:
    """Return the means of two directions' losses and similarities. `queries` are those of the first."""
    names = set(Output._fields) - {"queries", "further"}
    values = {name: (getattr(first, name), getattr(second, name)) for name in names}
    return first._replace(**{name: (a + b) / 2 for name, (a, b) in values.items() if a is not None})


def align(rgb: Tensor, auxiliary: Sequence[Tensor], relative: bool) -> Tensor:
    """Return the activation alignment () of a clip's maps, each (B, 1, t, h, w).

    raw, from the paper's figure:  mean((A_v - (A_s + A_d))^2)
    relative:                      mean((a_v - (a_s + a_d) / 2)^2), each map divided by its own mean, as pooling uses it
    """
    if not relative:
        return (rgb - torch.stack(list(auxiliary)).sum(0)).square().mean()
    rgb, *others = (m / m.mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-6) for m in (rgb, *auxiliary))
    return (rgb - torch.stack(others).mean(0)).square().mean()
