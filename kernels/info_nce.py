"""The contrastive loss of DCLR (MIL-NCE over a queue) and the search for its extra positives.

The `_reference` functions are plain torch, to be checked against the formula; kernels/info_nce_triton.py computes the same in one pass over
the queue, and runs where kernels.backend says so.

Letters: B clips in a batch, D embedding size, K queue length, P contrastive pairs, M mined positives of a query,
S similarities that are ranked together.
"""

import torch
from torch import Tensor

from kernels import backend
from kernels.types import EMBEDDING_SIZES, Contrast

_FLOATS = (torch.float32, torch.bfloat16)


def info_nce(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None = None,  # (P, B, M)
    temperature: float = 0.07,
    *,
    check_rows: bool | None = None,
) -> Tensor:  # (P,)
    """Multiple-positive InfoNCE (MIL-NCE, Miech et al., CVPR 2020, arXiv 1912.06430) of P pairs, the mean over B.

    With logits l_ij = q_i . x_j / temperature, where x_0 is the query's own key and x_1 .. x_K are the queue's rows,
        loss_i = -log( sum over positives of exp(l_ij) / sum over all of exp(l_ij) ).
    The key is always a positive; `positives` adds rows of the queue. Arithmetic and result are float32, also for bfloat16
    arguments and under autocast; on a GPU the products of float32 arguments follow torch.set_float32_matmul_precision.

    Args:
        queries: float32 or bfloat16, L2-normalised. The only argument that receives a gradient.
        keys: as queries; row i is the key of query i.
        queue: as queries; any K >= 1. It may be overwritten in place between this call and the backward pass.
        positives: int64 row numbers of the queue. A repeated row counts once, a negative number is no positive.
        temperature: greater than 0.
        check_rows: whether a row number past the queue's end raises an error; by default it does on a CPU, outside torch.compile. On a GPU
            looking makes the host wait for the device. Unchecked, such a number is no positive.

    Returns:
        (P,) float32.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes or devices that do not fit together, a row number past the queue's end, a temperature not above 0, an embedding
            size the Triton kernels are not made for (they are for 32, 64, 128 and 256).
        RuntimeError: set_backend("triton"), and it cannot run there.
    """
    _check_info_nce(queries, keys, queue, positives, temperature, check_rows)
    if not _runs_triton(queries):
        return info_nce_reference(queries, keys, queue, positives, temperature)
    return _fused(queries, keys, queue, positives, temperature)[0]


def contrast(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None = None,  # (P, B, M)
    temperature: float = 0.07,
    *,
    check_rows: bool | None = None,
) -> Contrast:
    """`info_nce`, with the two similarities by which training is watched: the kernels know them anyway. Arguments and errors as there."""
    _check_info_nce(queries, keys, queue, positives, temperature, check_rows)
    if _runs_triton(queries):
        losses, similarities = _fused(queries, keys, queue, positives, temperature)
        return Contrast(losses, similarities[0], similarities[1])
    losses = info_nce_reference(queries, keys, queue, positives, temperature)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        queries, keys, queue = queries.float(), keys.float(), queue.float()
        positive = (queries * keys).sum(dim=2).mean(dim=1)
        hardest = (queries @ queue.transpose(1, 2)).amax(dim=2).mean(dim=1)
    return Contrast(losses, positive, hardest)


def info_nce_reference(
    queries: Tensor,  # (P, B, D)
    keys: Tensor,  # (P, B, D)
    queue: Tensor,  # (P, K, D)
    positives: Tensor | None,  # (P, B, M)
    temperature: float,
) -> Tensor:  # (P,)
    """`info_nce` in plain torch, without its checks."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        keys = keys.detach().float()
        # A copy: backward reads the queue, and by then the caller may have enqueued into it.
        queue = queue.detach().to(torch.float32, copy=True)

        key_logits = (queries * keys).sum(dim=2, keepdim=True) / temperature  # (P, B, 1)
        queue_logits = queries @ queue.transpose(1, 2) / temperature  # (P, B, K)
        all_logits = torch.cat([key_logits, queue_logits], dim=2)  # (P, B, 1 + K)
        positive_logits = key_logits
        if positives is not None:
            mined_logits = queue_logits.masked_fill(~_row_mask(positives, queue.shape[1]), -torch.inf)
            positive_logits = torch.cat([key_logits, mined_logits], dim=2)  # (P, B, 1 + K)

        losses = torch.logsumexp(all_logits, dim=2) - torch.logsumexp(positive_logits, dim=2)  # (P, B)
        return losses.mean(dim=1)


@torch.no_grad()
def mine_positives(
    features: Tensor,  # (B, D) or (S, B, D)
    queue: Tensor,  # (K, D) or (S, K, D)
    m: int,
) -> Tensor:  # (B, m)
    """Row numbers of the m queue rows most similar to each feature, best first ("cross-video search" of DCLR).

    Similarity is the dot product of L2-normalised vectors. With a leading S, several similarities rank the rows
    together: each is turned into a softmax over the queue (temperature 1, as in the authors' code), and the sum over
    S is what is ranked. The vv pair ranks so by static and dynamic similarity, S = 2.

    Args:
        features: float32 or bfloat16, L2-normalised; compared in float32, also under autocast.
        queue: as features; row j must be the same past clip in each of the S queues.
        m: 0 to K.

    Returns:
        (B, m) int64, without gradient.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes or devices that do not fit together, an m outside 0 to K, an embedding size the Triton kernels are not made for.
        RuntimeError: set_backend("triton"), and it cannot run there.
    """
    _check_mine_positives(features, queue, m)
    if m == 0 or not _runs_triton(features):
        return mine_positives_reference(features, queue, m)
    from kernels.info_nce_triton import mine_positives_op

    if features.dim() == 2:
        return mine_positives_op(features[None], queue[None], m, True, False)[0]
    return mine_positives_op(features, queue, m, False, True)[0]


@torch.no_grad()
def mine_positives_by_each(
    features: Tensor,  # (S, B, D)
    queue: Tensor,  # (S, K, D)
    m: int,
) -> Tensor:  # (S + 1, B, m)
    """`mine_positives` by each of S similarities alone, and last by all together, as the five pairs of DCLR need it, in no more launches
    than for one. Arguments and errors as there, but that features must be (S, B, D)."""
    if features.dim() != 3:
        raise ValueError(f"features must be (S, B, D), not {tuple(features.shape)}")
    _check_mine_positives(features, queue, m)
    if m == 0 or not _runs_triton(features):
        return mine_positives_by_each_reference(features, queue, m)
    from kernels.info_nce_triton import mine_positives_op

    return mine_positives_op(features, queue, m, True, True)


@torch.no_grad()
def mine_positives_reference(features: Tensor, queue: Tensor, m: int) -> Tensor:
    """`mine_positives` in plain torch, without its checks."""
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ queue.float().transpose(-2, -1)  # (B, K) or (S, B, K)
        if similarity.dim() == 3:
            similarity = similarity.softmax(dim=2).sum(dim=0)  # (B, K)
        return similarity.topk(m, dim=1, sorted=True).indices


@torch.no_grad()
def mine_positives_by_each_reference(features: Tensor, queue: Tensor, m: int) -> Tensor:
    """`mine_positives_by_each` in plain torch, without its checks."""
    with torch.autocast(features.device.type, enabled=False):
        similarity = features.float() @ queue.float().transpose(1, 2)  # (S, B, K)
        scores = torch.cat([similarity, similarity.softmax(dim=2).sum(dim=0, keepdim=True)])  # (S + 1, B, K)
        return scores.topk(m, dim=2, sorted=True).indices


def _fused(
    queries: Tensor, keys: Tensor, queue: Tensor, positives: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Losses (P,) and similarities (2, P), by the kernels. The gradient is computed only where one is wanted: it is half of the work."""
    from kernels.info_nce_triton import info_nce_op  # Triton has wheels for Linux only

    wanted = torch.is_grad_enabled() and queries.requires_grad
    losses, similarities, _ = info_nce_op(queries, keys.detach(), queue.detach(), positives, temperature, wanted)
    return losses, similarities.detach()


def _row_mask(positives: Tensor, rows: int) -> Tensor:
    """(P, B, M) row numbers -> (P, B, K) bool, True where the row is among them; numbers outside the queue mark nothing."""
    # One more column than rows: numbers outside are sent there, and it is cut off.
    mask = torch.zeros(*positives.shape[:2], rows + 1, dtype=torch.bool, device=positives.device)
    inside = (positives >= 0) & (positives < rows)
    return mask.scatter(2, positives.where(inside, rows), True)[:, :, :rows]


def _runs_triton(tensor: Tensor) -> bool:
    """Whether the kernels run. Raises ValueError: an embedding size they are not made for."""
    if not backend.runs_triton(tensor.device):
        return False
    if (D := tensor.shape[-1]) not in EMBEDDING_SIZES:
        raise ValueError(
            f'an embedding size of {D} is not one of 32, 64, 128 and 256, which the Triton kernels take; set_backend("reference") takes any'
        )
    return True


def _check_info_nce(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    positives: Tensor | None,
    temperature: float,
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
        raise ValueError(f"queue must be ({P}, K, {D}) to go with queries, not {tuple(queue.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, not {temperature}")
    if positives is None:
        return
    if positives.dtype != torch.int64:
        raise TypeError(f"positives must be int64, not {positives.dtype}")
    if positives.dim() != 3 or positives.shape[:2] != (P, B):
        raise ValueError(f"positives must be ({P}, {B}, M) to go with queries, not {tuple(positives.shape)}")
    backend.check_same_device("positives", positives, "queries", queries)
    if check_rows is None:
        check_rows = positives.device.type == "cpu" and not torch.compiler.is_compiling()
    K = queue.shape[1]
    if check_rows and positives.numel() and positives.max() >= K:
        raise ValueError(f"positives names row {int(positives.max())}, but queue has rows 0 to {K - 1}")


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
        raise ValueError(f"queue must be ({expected}) to go with features, not {tuple(queue.shape)}")
    backend.check_same_device("queue", queue, "features", features)
    if not 0 <= m <= queue.shape[-2]:
        raise ValueError(f"m must be between 0 and the {queue.shape[-2]} rows of queue, not {m}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32 or bfloat16, not {tensor.dtype}")
