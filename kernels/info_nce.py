"""The contrastive loss of DCLR (MIL-NCE over a queue) and the mining of its positives.

The functions that end in `_reference` are plain torch, so that a reader can check them against the formula.
info_nce_triton.py computes the same values without storing the logits. `kernels.backend` chooses between the two.

Letters: B clips in a batch, D embedding size, K queue entries, P contrastive pairs, M mined positives of a query,
S similarities that rank queue entries together.
"""

import torch
from torch import Tensor

from dclr.kernels import backend
from dclr.kernels.types import EMBEDDING_SIZES, Contrast

_FLOATS = (torch.float32, torch.bfloat16)


def info_nce(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None = None,  # (P, B, M)
    temperature: float = 0.07,
    *,
    logit_scale: Tensor | None = None,  # (K,)
    check_rows: bool | None = None,
) -> Tensor:  # (P,)
    """Return the multiple-positive InfoNCE loss of each of P pairs, averaged over its B queries.

    Source: MIL-NCE, Miech et al., CVPR 2020, arXiv 1912.06430. With logits l_ij = q_i . x_j / temperature, where x_0 is
    the query's own key and x_1 .. x_K are the queue entries,
        loss_i = -log( sum over positives of exp(l_ij) / sum over all of exp(l_ij) ).
    The key is always a positive. `positives` adds queue entries. `logit_scale` multiplies the logits of queue entries:
    l_ij = logit_scale_j q_i . x_j / temperature for j >= 1. The logit of the key stays as it is.

    Arithmetic and result are float32, also for bfloat16 arguments and under autocast. On a GPU, products of float32
    arguments follow torch.set_float32_matmul_precision.

    Args:
        queries: float32 or bfloat16, L2-normalised. The only argument that receives a gradient.
        keys: float32 or bfloat16. Key i belongs to query i.
        queue: float32 or bfloat16; any K >= 1. The queue may be overwritten in place between this call and the
            backward pass.
        positives: int64 indices of queue entries. A repeated index counts once. A negative index is ignored.
        temperature: Greater than 0.
        logit_scale: float32, one number for each queue entry, the same for all pairs. None scales nothing.
        check_rows: True raises an error for an index of K or more. By default only CPU tensors outside torch.compile
            are checked, because a check on a GPU makes the host wait for the device. Without a check, such an index is
            ignored.

    Returns:
        (P,) float32.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: Shapes or devices do not match, a tensor is empty, a checked index is K or more, the temperature is
            not above 0, or the Triton kernels do not support the embedding size (they support 32, 64, 128 and 256).
        RuntimeError: The backend is "triton", and it cannot run on this device.
    """
    _check_info_nce(queries, keys, queue, positives, temperature, logit_scale, check_rows)
    if not _runs_triton(queries):
        return info_nce_reference(queries, keys, queue, positives, temperature, logit_scale)
    return _fused(queries, keys, queue, positives, temperature, logit_scale)[0]


def contrast(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None = None,  # (P, B, M)
    temperature: float = 0.07,
    *,
    logit_scale: Tensor | None = None,  # (K,)
    check_rows: bool | None = None,
) -> Contrast:
    """Return the losses of `info_nce` with two mean similarities that show how training develops.

    The kernels compute the similarities anyway. Arguments and errors are those of `info_nce`. With a logit scale, the
    similarity of a queue entry is multiplied by its scale.
    """
    _check_info_nce(queries, keys, queue, positives, temperature, logit_scale, check_rows)
    if _runs_triton(queries):
        losses, similarities = _fused(queries, keys, queue, positives, temperature, logit_scale)
        return Contrast(losses, similarities[0], similarities[1])
    losses = info_nce_reference(queries, keys, queue, positives, temperature, logit_scale)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = queries.float(), keys.float(), queue.float()
        positive = (queries * keys).sum(dim=2).mean(dim=1)
        similarities = queries @ queue.transpose(1, 2)  # (P, B, K)
        if logit_scale is not None:
            similarities = similarities * logit_scale
        hardest = similarities.amax(dim=2).mean(dim=1)
    return Contrast(losses, positive, hardest)


def info_nce_reference(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None,  # (P, B, M)
    temperature: float,
    logit_scale: Tensor | None = None,  # (K,)
) -> Tensor:  # (P,)
    """Compute `info_nce` in plain torch, without its checks."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        keys = keys.detach().float()
        # A copy, because the backward pass reads the queue, and the caller may have overwritten entries by then.
        queue = queue.detach().to(torch.float32, copy=True)

        key_logits = (queries * keys).sum(dim=2, keepdim=True) / temperature  # (P, B, 1)
        queue_logits = queries @ queue.transpose(1, 2) / temperature  # (P, B, K)
        if logit_scale is not None:
            queue_logits = queue_logits * logit_scale.detach()
        all_logits = torch.cat([key_logits, queue_logits], dim=2)  # (P, B, 1 + K)
        positive_logits = key_logits
        if positives is not None:
            mined_logits = queue_logits.masked_fill(~_entry_mask(positives, queue.shape[1]), -torch.inf)
            positive_logits = torch.cat([key_logits, mined_logits], dim=2)  # (P, B, 1 + K)

        losses = torch.logsumexp(all_logits, dim=2) - torch.logsumexp(positive_logits, dim=2)  # (P, B)
        return losses.mean(dim=1)


@torch.no_grad()
def mine_positives(
    features: Tensor,  # (B, D) or (S, B, D)
    queue: Tensor,  # (K, D) or (S, K, D)
    m: int,
) -> Tensor:  # (B, m)
    """Return the indices of the m queue entries most similar to each feature, best first.

    The paper of DCLR calls this the cross-video search. Similarity is the dot product of L2-normalised vectors. With a
    leading dimension S, several similarities rank the queue entries together: the entries are ranked by the sum of the
    S softmaxes over the queue (temperature 1, like the released code). The vv pair uses this with static and dynamic
    similarity, S = 2.

    Args:
        features: float32 or bfloat16, L2-normalised. They are compared in float32, also under autocast.
        queue: float32 or bfloat16. Entry j must be the same past clip in each of the S queues.
        m: Between 0 and K.

    Returns:
        (B, m) int64, without gradient.

    Raises:
        TypeError: An argument has another dtype.
        ValueError: Shapes or devices do not match, m is outside 0 to K, or the Triton kernels do not support the
            embedding size.
        RuntimeError: The backend is "triton", and it cannot run on this device.
    """
    _check_mine_positives(features, queue, m)
    if m == 0 or not _runs_triton(features):
        return mine_positives_reference(features, queue, m)
    from dclr.kernels.info_nce_triton import mine_positives_op

    if features.dim() == 2:
        return mine_positives_op(features[None], queue[None], m, False)[0]
    return mine_positives_op(features, queue, m, True)[-1]


@torch.no_grad()
def mine_positives_by_each(
    features: Tensor,  # (S, B, D)
    queue: Tensor,  # (S, K, D)
    m: int,
) -> Tensor:  # (S + 1, B, m)
    """Return the result of `mine_positives` for each of S similarities alone and then, last, for all S together.

    The five pairs of DCLR need these S + 1 rankings. They take no more kernel launches than one ranking. Arguments and
    errors are those of `mine_positives`, except that features must be (S, B, D).
    """
    if features.dim() != 3:
        raise ValueError(f"features must be (S, B, D), not {tuple(features.shape)}")
    _check_mine_positives(features, queue, m)
    if m == 0 or not _runs_triton(features):
        return mine_positives_by_each_reference(features, queue, m)
    from dclr.kernels.info_nce_triton import mine_positives_op

    return mine_positives_op(features, queue, m, True)


@torch.no_grad()
def mine_positives_reference(features: Tensor, queue: Tensor, m: int) -> Tensor:
    """Compute `mine_positives` in plain torch, without its checks."""
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ queue.float().transpose(-2, -1)  # (B, K) or (S, B, K)
        if similarity.dim() == 3:
            similarity = similarity.softmax(dim=2).sum(dim=0)  # (B, K)
        return similarity.topk(m, dim=1, sorted=True).indices


@torch.no_grad()
def mine_positives_by_each_reference(features: Tensor, queue: Tensor, m: int) -> Tensor:
    """Compute `mine_positives_by_each` in plain torch, without its checks."""
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ queue.float().transpose(1, 2)  # (S, B, K)
        scores = torch.cat([similarity, similarity.softmax(dim=2).sum(dim=0, keepdim=True)])  # (S + 1, B, K)
        return scores.topk(m, dim=2, sorted=True).indices


def _fused(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor | None,
    temperature: float,
    logit_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute losses (P,) and similarities (2, P) with the kernels.

    The kernels compute the gradient in the same pass, and only if it is needed, because it is half of the work.
    """
    from dclr.kernels.info_nce_triton import info_nce_op  # Triton has wheels for Linux only

    needs_gradient = torch.is_grad_enabled() and queries.requires_grad
    scale = None if logit_scale is None else logit_scale.detach()
    losses, similarities, *_ = info_nce_op(
        queries, keys.detach(), queue.detach(), positives, temperature, needs_gradient, scale
    )
    return losses, similarities.detach()


def _entry_mask(positives: Tensor, entries: int) -> Tensor:
    """Return a (P, B, K) bool mask of the queue entries that `positives` (P, B, M) names.

    Indices outside the queue are ignored.
    """
    # Indices outside the queue mark one extra column, which is then cut off.
    mask = torch.zeros(*positives.shape[:2], entries + 1, dtype=torch.bool, device=positives.device)
    inside = (positives >= 0) & (positives < entries)
    return mask.scatter(2, positives.where(inside, entries), True)[:, :, :entries]


def _runs_triton(tensor: Tensor) -> bool:
    """Return True if the tensor uses the kernels.

    Raises ValueError if the kernels do not support its embedding size.
    """
    if not backend.runs_triton(tensor.device):
        return False
    if (D := tensor.shape[-1]) not in EMBEDDING_SIZES:
        raise ValueError(
            f"an embedding size of {D} is not one of 32, 64, 128 and 256, the sizes of the Triton kernels; "
            'choose one of these or set_backend("reference"), which supports any size'
        )
    return True


def _check_info_nce(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor | None,
    temperature: float,
    logit_scale: Tensor | None,
    check_rows: bool | None,
) -> None:
    for name, tensor in (("queries", queries), ("keys", keys), ("queue", queue)):
        _check_float(name, tensor)
        if tensor.dim() != 3 or 0 in tensor.shape:
            shape = "(P, K, D)" if name == "queue" else "(P, B, D)"
            raise ValueError(f"{name} must be {shape} and not empty, not {tuple(tensor.shape)}")
        backend.check_same_device(name, tensor, "queries", queries)
    P, B, D = queries.shape
    if keys.shape != queries.shape:
        raise ValueError(f"keys must be ({P}, {B}, {D}) like queries, not {tuple(keys.shape)}")
    if queue.shape[0] != P or queue.shape[2] != D:
        raise ValueError(f"queue must be ({P}, K, {D}) to match queries, not {tuple(queue.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    if logit_scale is not None:
        if logit_scale.dtype != torch.float32:
            raise TypeError(f"logit_scale must be float32, not {logit_scale.dtype}")
        if logit_scale.shape != queue.shape[1:2]:
            raise ValueError(f"logit_scale must be ({queue.shape[1]},), not {tuple(logit_scale.shape)}")
        backend.check_same_device("logit_scale", logit_scale, "queries", queries)
    if positives is None:
        return
    if positives.dtype != torch.int64:
        raise TypeError(f"positives must be int64, not {positives.dtype}")
    if positives.dim() != 3 or positives.shape[:2] != (P, B):
        raise ValueError(f"positives must be ({P}, {B}, M) to match queries, not {tuple(positives.shape)}")
    backend.check_same_device("positives", positives, "queries", queries)
    if check_rows is None:
        check_rows = positives.device.type == "cpu" and not torch.compiler.is_compiling()
    K = queue.shape[1]
    if check_rows and positives.numel() and positives.max() >= K:
        raise ValueError(f"positives names queue entry {int(positives.max())}, but queue has entries 0 to {K - 1}")


def _check_mine_positives(features: Tensor, queue: Tensor, m: int) -> None:
    for name, tensor in (("features", features), ("queue", queue)):
        _check_float(name, tensor)
    if features.dim() not in (2, 3):
        raise ValueError(f"features must be (B, D) or (S, B, D), not {tuple(features.shape)}")
    if (
        queue.dim() != features.dim()
        or queue.shape[:-2] != features.shape[:-2]
        or queue.shape[-1] != features.shape[-1]
    ):
        expected = ("S, K, D" if features.dim() == 3 else "K, D").replace("D", str(features.shape[-1]))
        expected = expected.replace("S", str(features.shape[0]))
        raise ValueError(f"queue must be ({expected}) to match features, not {tuple(queue.shape)}")
    backend.check_same_device("queue", queue, "features", features)
    if not 0 <= m <= queue.shape[-2]:
        raise ValueError(f"m must be between 0 and the {queue.shape[-2]} entries of queue, not {m}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32 or bfloat16, not {tensor.dtype}")
