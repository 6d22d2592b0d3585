"""The SimCLR form of DCLR: its loss in float64, its pairs and gradients, two ranks, a run, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import METHOD, MODEL, OPTIM, assert_same_end, float32_config, make_views, metrics, on_two_ranks, share

from dclr.config import PretrainConfig, resolve
from dclr.errors import UserError
from dclr.kernels import Views
from dclr.methods import SimCLR
from dclr.methods.encoder import KEY_OF_PAIR, PAIRS
from dclr.methods.simclr import in_batch_info_nce
from dclr.training.engine import Engine, start_processes, stop_processes
from dclr.training.setup import check_micro_batch


def make_simclr(**settings: Any) -> SimCLR:
    """Return a network with frozen BatchNorm and random heads, so that each clip has another embedding."""
    torch.manual_seed(0)
    network = SimCLR(MODEL, replace(METHOD, method="dclr-simclr", **settings)).eval()
    with torch.no_grad():
        for p in network.query.heads.parameters():
            p.copy_(torch.randn_like(p))
    return network


def loss_by_hand(
    queries: np.ndarray, keys: np.ndarray, temperature: float, own_view: bool
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the loss of one pair, one exponential at a time in float64, and its gradients for queries and keys.

    d loss_i / d logit = softmax - 1 at the key of query i, and softmax at every negative.
    """
    count, loss = len(queries), 0.0
    to_queries, to_keys = np.zeros_like(queries), np.zeros_like(keys)
    for i in range(count):
        others = [("key", j) for j in range(count)] + [("query", j) for j in range(count) if own_view and j != i]
        vectors = [keys[j] if kind == "key" else queries[j] for kind, j in others]
        exps = [math.exp(float(queries[i] @ vector) / temperature) for vector in vectors]
        loss -= math.log(exps[i] / sum(exps)) / count
        for (kind, j), vector, exp in zip(others, vectors, exps, strict=True):
            slope = (exp / sum(exps) - (kind == "key" and j == i)) / temperature / count
            to_queries[i] += slope * vector
            (to_keys if kind == "key" else to_queries)[j] += slope * queries[i]
    return loss, to_queries, to_keys


@pytest.mark.parametrize("own_view", [False, True], ids=["cross", "all"])
def test_loss_and_both_gradients_agree_with_a_separate_float64_computation(own_view: bool) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2, 3, 6, 32))
    queries, keys = vectors / np.linalg.norm(vectors, axis=3, keepdims=True)
    given = [torch.tensor(values, dtype=torch.float32, requires_grad=True) for values in (queries, keys)]
    losses = in_batch_info_nce(*given, 0.1, own_view)
    losses.sum().backward()
    for pair in range(3):
        loss, *gradients = loss_by_hand(queries[pair], keys[pair], 0.1, own_view)
        assert losses[pair].item() == pytest.approx(loss, rel=1e-5)
        for found, expected in zip(given, gradients, strict=True):
            np.testing.assert_allclose(found.grad[pair], expected, rtol=1e-4, atol=1e-6)


def test_equal_embeddings_give_the_plateau_and_one_clip_has_no_loss() -> None:
    same = torch.ones(1, 5, 4) / 2
    for negatives, expected in (("cross", math.log(5)), ("all", math.log(9))):
        assert in_batch_info_nce(same, same, 0.07, negatives == "all").item() == pytest.approx(expected, rel=1e-6)
        assert make_simclr(negatives=negatives).plateau(5) == pytest.approx(expected)
    with pytest.raises(ValueError, match="N at least 2"):
        in_batch_info_nce(same[:, :1], same[:, :1], 0.07)


def by_hand(network: SimCLR, query: Views, key: Views) -> torch.Tensor:
    """Return the total of docs/methods.md with its gradient, from one pass for each clip and view."""
    names = {"v": "rgb", "s": "static", "d": "dynamic"}
    sides = []
    for clips in (query, key):
        features = {
            letter: network.query.backbone(getattr(clips, name))
            for letter, name in names.items()
            if letter in "v" + network.auxiliary
        }
        maps = {letter: found.sum(1, keepdim=True).detach() for letter, found in features.items()}
        embeddings = {}
        for name, head in network.query.heads.items():
            f = features[name[0]]
            if name in ("vs", "vd"):
                f = f * maps[name[1]] / maps[name[1]].mean((2, 3, 4), keepdim=True)
            embeddings[name] = head(f.mean((2, 3, 4)))
        sides.append(embeddings)
    total = torch.zeros(())
    for name in network.pairs:
        for own, other in (sides, sides[::-1]):
            logits = own[name] @ other[KEY_OF_PAIR[name]].T / network.method.temperature
            total = total + torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))) / 2
    return total


@pytest.mark.parametrize("settings", [{}, {"static_pairs": False}], ids=["five pairs", "no static view"])
def test_both_directions_of_each_pair_train_the_encoder_and_maps_have_no_gradient(settings: dict[str, Any]) -> None:
    network, plain = make_simclr(**settings), make_simclr(**settings)
    query, key = make_views(1), make_views(2)
    nothing = torch.full_like(query.rgb, torch.nan)  # a view that is not used has no effect
    given = [views._replace(static=nothing) if settings else views for views in (query, key)]
    output = network(*given, 0)
    expected = by_hand(plain, query, key)
    assert network.pairs == (("vv", "vd", "dv") if settings else PAIRS)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    output.loss.backward()
    expected.backward()
    for (name, found), p in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.abs().sum() > 0, name
        tolerance = 1e-4 * p.grad.abs().max().item()
        torch.testing.assert_close(found.grad, p.grad, rtol=1e-3, atol=tolerance, msg=name)


def test_metrics_are_similarities_of_query_clips_to_key_clips() -> None:
    network = make_simclr()
    output = network(make_views(1), make_views(1), 0)  # a key clip that equals its query clip
    logged = network.metrics(output)
    assert logged["positive_similarity/vv"] == pytest.approx(1, abs=1e-5)
    assert logged["nearest_key/vv"] == 1
    assert logged["hardest_negative/vv"] < 1
    assert logged["loss_plateau"] == pytest.approx(5 * math.log(4))
    assert network.metrics(output._replace(keys=output.keys.roll(1, 1)))["nearest_key/vv"] == 0


# ---------------------------------------------------------------- two ranks


def record_clips(network: SimCLR) -> list[torch.Tensor]:
    """Return a list to which each pass of the encoder adds its rgb clips."""
    passes, compute = [], network.query.backbone.feature_maps

    def feature_maps(views: list[torch.Tensor], frames: int) -> list[torch.Tensor]:
        passes.append(views[0].clone())
        return compute(views, frames)

    network.query.backbone.feature_maps = feature_maps
    return passes


def train_rank(rank: int, folder: Path) -> None:
    """Train one of two ranks on its share of two batches, for both kinds of negatives. Rank 0 saves what it found.

    The first value of each kind is the rgb clips that the encoder got in the first step.
    """
    device = start_processes()
    found = {}
    for negatives in ("cross", "all"):
        network = make_simclr(negatives=negatives)
        encoded = record_clips(network)
        own = Engine(network, float32_config(0), OPTIM, device)
        own.train(False)
        losses = []
        for step in range(2):
            output = own(*share(network, (2 * step, 2 * step + 1), step), step)
            own.backward(output.loss)
            own.step()
            losses.append(output.loss.item())
        found[negatives] = encoded[0], losses, [p.detach() for p in network.parameters()], network.metrics(output)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    try:
        make_simclr()(*(Views(*(view[: 1 + rank] for view in make_views(seed))) for seed in (0, 1)), 0)
    except UserError as error:
        (folder / f"refused{rank}").write_text(str(error))
    stop_processes()


def test_two_ranks_compute_the_same_as_one_and_unequal_batches_are_refused(tmp_path: Path) -> None:
    assert on_two_ranks(train_rank, tmp_path) == [0, 0]
    for negatives, (encoded, losses, parameters, logged) in torch.load(tmp_path / "found.pt").items():
        clips = torch.cat([make_views(0).rgb, make_views(1).rgb])
        origin = [int((clip == clips).flatten(1).all(1).nonzero()) for clip in encoded]
        assert len(set(origin)) == 4
        assert {number % 4 // 2 for number in origin} == {0, 1}  # clips of both ranks

        network = make_simclr(negatives=negatives)
        settings = {"lr": OPTIM.lr, "momentum": OPTIM.momentum, "weight_decay": OPTIM.weight_decay}
        optimizer = torch.optim.SGD(network.parameters(), **settings)
        for step in range(2):
            optimizer.zero_grad()
            output = network(make_views(2 * step), make_views(2 * step + 1), step)
            output.loss.backward()
            optimizer.step()
            assert losses[step] == pytest.approx(output.loss.item(), rel=1e-4)
        start = make_simclr().parameters()
        for (name, p), theirs, before in zip(network.named_parameters(), parameters, start, strict=True):
            # Rounding errors are a share of what the two steps changed. The largest found here was 8e-5.
            tolerance = 5e-4 * (p - before).abs().max().item() + 1e-7
            torch.testing.assert_close(theirs, p, rtol=0, atol=tolerance, msg=name)
        assert logged == pytest.approx(network.metrics(output), rel=1e-3)
    messages = {(tmp_path / f"refused{rank}").read_text() for rank in range(2)}
    assert messages == {
        "--method dclr-simclr: the processes have micro-batches of 1, 2 clips, but need equal ones, "
        "because their clips are each other's negatives"
    }


# ---------------------------------------------------------------- a run, and what is refused


def test_a_run_resumes_bit_for_bit_and_logs_the_plateau(train_main, tiny: dict[str, Any], tmp_path: Path) -> None:
    flags = {**tiny, "method": "dclr-simclr", "embedding_dim": 32, "clip_length": 4, "negatives": "all"}
    flags["batch_size"] = 8
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_main("pretrain", **flags, out=straight)
    train_main("pretrain", **{**flags, "epochs": 1}, out=resumed)
    train_main("pretrain", epochs=2, resume=resumed)
    assert_same_end(straight, resumed)
    lines = metrics(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]  # no step only fills a queue
    assert lines[0]["pair_loss/plateau"] == pytest.approx(math.log(15))
    assert not any(name.startswith(("queue/", "alignment")) for name in lines[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "dclr-simclr", "queue_length": 8}, "dclr-simclr, which has no queue: leave"),
        ({"method": "dclr-simclr", "mined_positives": 2}, "dclr-simclr, which has no queue: leave"),
        (
            {"method": "dclr-simclr", "key_momentum": 0.9},
            "--key-momentum has no effect with --method dclr-simclr: leave",
        ),
        ({"method": "dclr-simclr", "alignment_weight": 0.0}, "--alignment-weight has no effect with --method dclr-sim"),
        ({"negatives": "all"}, "--negatives has no effect with --method dclr: leave"),
        ({"method": "moco", "negatives": "all"}, "--negatives has no effect with --method moco: leave"),
    ],
)
def test_settings_of_other_methods_are_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("pretrain", "ucf101", flags)


@pytest.mark.parametrize(
    ("method", "size", "message"),
    [
        ("dclr-simclr", 1, "^--batch-size 8 gives micro-batches of 1 clip, but --method dclr-simclr takes the other"),
        ("simsiam", 1, r"^--batch-size 8 gives micro-batches of 1 clip\(s\) on each of 1 process\(es\), but --method"),
        ("dclr-simclr", 2, None),
        ("simsiam", 2, None),
        ("dclr", 1, None),
    ],
)
def test_too_few_clips_for_a_method_are_refused(method: str, size: int, message: str | None) -> None:
    config = resolve("pretrain", "ucf101", {"method": method, "batch_size": 8})
    assert isinstance(config, PretrainConfig)
    if message is None:
        check_micro_batch(config, size)
        return
    with pytest.raises(UserError, match=message):
        check_micro_batch(config, size)
