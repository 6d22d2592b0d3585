"""DCLR on tiny networks: pairs, queue, mining, alignment and momentum, each compared with a separate computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_same_end, numbers, tensors_of
from torch.nn import functional as F

from dclr.config import MethodConfig, ModelConfig
from dclr.kernels import Views
from dclr.methods import DCLR
from dclr.methods.dclr import align
from dclr.methods.encoder import KEY_OF_PAIR, PAIRS

MODEL = ModelConfig(backbone="r2plus1d_10", width=4)


def make_views(batch: int, seed: int) -> Views:
    rng = torch.Generator().manual_seed(seed)
    rgb, static, dynamic = (torch.randn(batch, 3, 8, 32, 32, generator=rng) for _ in range(3))
    return Views(rgb, static[:, :, :1].expand(-1, -1, 8, -1, -1), dynamic)


def make_network(**settings) -> DCLR:
    torch.manual_seed(0)
    method = MethodConfig(**{"queue_length": 16, "embedding_dim": 32, "mined_positives": 2, **settings})
    return DCLR(MODEL, method)


def weighted(features: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Return the mean (B, C) of float64 features (B, C, t, h, w), weighted by a map (B, 1, t, h, w) if there is one."""
    if weight is None:
        return features.mean(axis=(2, 3, 4))
    return (features * weight).sum(axis=(2, 3, 4)) / weight.sum(axis=(2, 3, 4))


def embed(encoder, name, features):
    with torch.no_grad():
        return encoder.heads[name](torch.from_numpy(features).float()).double().numpy()


def by_hand(
    network: DCLR, query: Views, key: Views, mined: dict[str, np.ndarray] | None, weigh: bool = True
) -> dict[str, float]:
    """Compute the pair losses and alignment terms of docs/method.md in float64, one clip at a time."""
    features = {}
    with torch.no_grad():
        for side, encoder, views in (
            ("q", network.query, query),
            ("look", network.key, query),
            ("k", network.key, key),
        ):
            stacked = torch.cat(views if side != "look" else views[1:])
            maps = encoder.backbone(stacked).double().numpy()
            names = ("rgb", "static", "dynamic") if side != "look" else ("static", "dynamic")
            features |= {f"{side}.{n}": m for n, m in zip(names, np.split(maps, len(names)), strict=True)}
    maps = {n: features[n].sum(axis=1, keepdims=True) for n in features}
    sides = {}
    for side, look, encoder in (("q", "look", network.query), ("k", "k", network.key)):
        pooled = {
            "vv": weighted(features[f"{side}.rgb"]),
            "vs": weighted(features[f"{side}.rgb"], maps[f"{look}.static"] if weigh else None),
            "vd": weighted(features[f"{side}.rgb"], maps[f"{look}.dynamic"] if weigh else None),
            "sv": weighted(features[f"{side}.static"]),
            "dv": weighted(features[f"{side}.dynamic"]),
        }
        sides[side] = {name: embed(encoder, name, value) for name, value in pooled.items()}
    losses = {}
    for p, name in enumerate(PAIRS):
        per_clip = []
        for b in range(len(sides["q"][name])):
            q, k = sides["q"][name][b], sides["k"][KEY_OF_PAIR[name]][b]
            logits = np.concatenate([[q @ k], network.queue[p].double().numpy() @ q]) / network.method.temperature
            exps = np.exp(logits - logits.max())
            chosen = {0} | ({1 + int(entry) for entry in mined[name][b]} if mined else set())
            per_clip.append(-np.log(sum(exps[list(chosen)]) / exps.sum()))
        losses[name] = float(np.mean(per_clip))
    relative = [
        m / m.mean(axis=(1, 2, 3, 4), keepdims=True) for m in (maps["q.rgb"], maps["look.static"], maps["look.dynamic"])
    ]
    losses["alignment"] = float(np.mean((relative[0] - (relative[1] + relative[2]) / 2) ** 2))
    losses["raw"] = float(np.mean((maps["q.rgb"] - (maps["look.static"] + maps["look.dynamic"])) ** 2))
    relative_key = [
        m / m.mean(axis=(1, 2, 3, 4), keepdims=True) for m in (maps["q.rgb"], maps["k.static"], maps["k.dynamic"])
    ]
    losses["key_maps"] = float(np.mean((relative_key[0] - (relative_key[1] + relative_key[2]) / 2) ** 2))
    return losses


def mined_by_hand(network: DCLR, query: Views, count: int) -> dict[str, np.ndarray]:
    with torch.no_grad():
        maps = network.key.backbone(torch.cat([query.static, query.dynamic])).double().numpy()
    static, dynamic = (m.mean(axis=(2, 3, 4)) for m in np.split(maps, 2))
    like_s = embed(network.key, "sv", static) @ network.queue[PAIRS.index("vs")].double().numpy().T
    like_d = embed(network.key, "dv", dynamic) @ network.queue[PAIRS.index("vd")].double().numpy().T

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    scores = {"vs": like_s, "sv": like_s, "vd": like_d, "dv": like_d, "vv": softmax(like_s) + softmax(like_d)}
    return {name: np.argsort(-score, axis=1)[:, :count] for name, score in scores.items()}


@pytest.mark.parametrize("full", [False, True], ids=["queue not full: no mining", "queue full: mined positives"])
def test_losses_and_alignment_agree_with_a_separate_float64_computation(full):
    network = make_network().eval()  # frozen statistics make each clip independent of the others
    # At initialisation all embeddings are nearly equal. Random heads give each clip and each encoder other embeddings.
    with torch.no_grad():
        for p in [*network.query.heads.parameters(), *network.key.heads.parameters()]:
            p.copy_(torch.randn_like(p))
    query, key = make_views(3, 1), make_views(3, 2)
    if full:
        network.enqueued.fill_(16)
    mined = mined_by_hand(network, query, 2) if full else None
    expected = by_hand(network, query, key, mined)
    output = network(query, key, 0)
    for name, value in zip(PAIRS, output.losses, strict=True):
        # Logits reach 1 / 0.07 = 14, so float32 leaves an absolute error of a few 14 * 2^-24.
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=5e-6), name
    assert output.alignment.item() == pytest.approx(expected["alignment"], rel=2e-5)
    assert output.alignment_other_form.item() == pytest.approx(expected["raw"], rel=2e-5)
    assert output.alignment_key_maps.item() == pytest.approx(expected["key_maps"], rel=2e-5)
    total = sum(expected[name] for name in PAIRS) + 0.1 * expected["alignment"]
    assert output.loss.item() == pytest.approx(total, rel=2e-5)


def test_a_full_queue_changes_the_loss_through_mining_only():
    query, key = make_views(3, 1), make_views(3, 2)
    before, after, none = (make_network(mined_positives=m).eval() for m in (2, 2, 0))
    after.enqueued.fill_(16)
    none.enqueued.fill_(16)
    plain, mined, without = (m(query, key, 0).losses for m in (before, after, none))
    assert (mined < plain).all()  # more positives, lower loss
    assert torch.equal(without, plain)


def test_the_queue_is_a_ring_buffer_for_any_batch_size():
    network = make_network(queue_length=5)
    keys = F.normalize(torch.randn(5, 9, 32), dim=2)
    network._enqueue(keys[:, :3])
    network._enqueue(keys[:, 3:7])  # entries 3, 4, 0, 1
    for entry, source in {2: 2, 3: 3, 4: 4, 0: 5, 1: 6}.items():
        assert torch.equal(network.queue[:, entry], keys[:, source])
    assert network.enqueued.item() == 7
    with pytest.raises(ValueError, match="keys: 6 at once"):
        network._enqueue(torch.zeros(5, 6, 32))


def test_forward_writes_the_keys_of_each_pair_into_its_own_queue():
    network = make_network().eval()
    key = make_views(2, 2)
    network(make_views(2, 1), key, 0)
    expected = make_network().eval()
    expected.fill(make_views(2, 1), key, 0)
    assert torch.equal(network.queue, expected.queue)
    with torch.no_grad():
        static = network.key.heads["sv"](network.key.backbone(torch.cat(key))[2:4].mean((2, 3, 4)))
    assert torch.allclose(network.queue[PAIRS.index("vs"), :2], static, atol=1e-6)  # vs is compared with sv keys


def test_gradient_reaches_the_whole_query_encoder_and_nothing_else():
    network = make_network()
    network(make_views(2, 1), make_views(2, 2), 0).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.query.parameters())
    assert all(p.grad is None and not p.requires_grad for p in network.key.parameters())


def test_alignment_term_has_a_gradient():
    network = make_network(alignment_weight=1.0)
    output = network(make_views(2, 1), make_views(2, 2), 0)
    with_term = torch.autograd.grad(output.loss, network.query.backbone.layer4.parameters())
    plain = make_network(alignment_weight=0.0)
    without = torch.autograd.grad(
        plain(make_views(2, 1), make_views(2, 2), 0).loss, plain.query.backbone.layer4.parameters()
    )
    assert not all(torch.equal(a, b) for a, b in zip(with_term, without, strict=True))


@pytest.mark.parametrize(("views", "first"), [("auxiliary", 1), ("all", 0)])
def test_the_key_encoder_normalises_the_query_clips_views_together(views, first):
    """In training mode, the maps and the mined entries depend on the views that share batch statistics."""
    query = make_views(3, 1)
    network, same = make_network(key_encoder_views=views), make_network()
    maps, mining = network._look_at_query(query)
    with torch.no_grad():
        static, dynamic = same.key.backbone(torch.cat(query[first:]))[-6:].split(3)
        for letter, features, embedding in zip("sd", (static, dynamic), mining, strict=True):
            torch.testing.assert_close(maps[letter], features.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
            expected = same.key.heads[letter + "v"](features.mean((2, 3, 4)))
            torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


def test_frozen_statistics_make_the_views_of_the_key_encoder_independent():
    query, key = make_views(2, 1), make_views(2, 2)
    losses = [make_network(key_encoder_views=views).eval()(query, key, 0).losses for views in ("auxiliary", "all")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_align_by_hand():
    ones = torch.ones(2, 1, 2, 2, 2)
    assert align(3 * ones, [ones, ones], relative=False).item() == 1.0  # (3 - 2)^2
    assert align(3 * ones, [ones, 5 * ones], relative=True).item() == 0.0  # a factor of a map changes nothing
    half = torch.cat([2 * ones[..., :1], 0 * ones[..., :1]], dim=-1)
    assert align(half, [ones, ones], relative=True).item() == pytest.approx(1.0)  # 2 - 1 and 0 - 1, squared
    assert torch.isfinite(align(0 * ones, [ones, 0 * ones], relative=True))


def test_repelling_adds_the_cosine_of_static_and_dynamic_features():
    query, key = make_views(2, 1), make_views(2, 2)
    plain, repelled = make_network().eval()(query, key, 0), make_network(repel_weight=2.0).eval()(query, key, 0)
    assert (repelled.loss - plain.loss).item() == pytest.approx(2 * plain.repel.item(), rel=1e-4)
    assert -1 <= plain.repel.item() <= 1


def test_the_key_encoder_starts_equal_and_follows_by_momentum():
    network = make_network(key_momentum=0.75)
    before = [p.clone() for p in network.key.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(network.key.parameters(), network.query.parameters(), strict=True))
    with torch.no_grad():
        for p in network.query.parameters():
            p.add_(1.0)
    network.update_key()
    assert all(torch.allclose(new, old + 0.25) for new, old in zip(network.key.parameters(), before, strict=True))


def test_similarities_are_cosines():
    output = make_network()(make_views(2, 1), make_views(2, 2), 0)
    for values in (output.positive, output.hardest_negative):
        assert values.shape == (5,)
        assert (values.abs() <= 1 + 1e-5).all()


# ---------------------------------------------------------------- the baseline and the ablations


def test_moco_contrasts_rgb_clips_alone():
    """Compare with the loss of He et al. in float64: one queue, the key as the only positive, no other term."""
    network = make_network(method="moco").eval()
    with torch.no_grad():
        for p in [*network.query.heads.parameters(), *network.key.heads.parameters()]:
            p.copy_(torch.randn_like(p))
    network.enqueued.fill_(16)  # a full queue: DCLR would mine it
    query, key = make_views(3, 1), make_views(3, 2)
    with torch.no_grad():
        q = embed(network.query, "vv", weighted(network.query.backbone(query.rgb).double().numpy()))
        k = embed(network.key, "vv", weighted(network.key.backbone(key.rgb).double().numpy()))
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ network.queue[0].double().numpy().T], axis=1) / 0.07
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])

    output = network(query, key, 0)
    assert network.pairs == ("vv",)
    assert list(network.query.heads) == ["vv"]
    assert network.queue.shape == (1, 16, 32)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.alignment is output.alignment_other_form is output.alignment_key_maps is output.repel is None
    torch.testing.assert_close(network.queue[0, :3], torch.from_numpy(k).float(), rtol=0, atol=1e-6)


def test_moco_uses_the_rgb_view_only():
    query, key = make_views(2, 1), make_views(2, 2)
    nothing = torch.full_like(query.static, torch.nan)
    output = make_network(method="moco")(Views(query.rgb, nothing, nothing), Views(key.rgb, nothing, nothing), 0)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize(
    ("skipped", "pairs", "similar"),
    [("static", ("vv", "vd", "dv"), "dv"), ("dynamic", ("vv", "vs", "sv"), "sv")],
)
def test_without_an_auxiliary_view_its_pairs_and_its_map_are_not_used(skipped, pairs, similar):
    """In evaluation mode the other losses equal those of the full method with the same weights."""
    whole, some = make_network().eval(), make_network(**{f"{skipped}_pairs": False}).eval()
    auxiliary = "dynamic" if skipped == "static" else "static"
    weights = {k: v for k, v in whole.state_dict().items() if k in some.state_dict() and k != "queue"}
    some.load_state_dict({**weights, "queue": whole.queue[[PAIRS.index(name) for name in pairs]]})
    for network in (whole, some):
        network.enqueued.fill_(16)
    query, key = make_views(3, 1), make_views(3, 2)
    nothing = torch.full_like(query.rgb, torch.nan)
    maps = {
        "rgb": whole.query.backbone(query.rgb).sum(1, keepdim=True),
        auxiliary: whole.key.backbone(getattr(query, auxiliary)).sum(1, keepdim=True),
    }
    entries = mined_by_hand(whole, query, 2)[similar]  # vv is mined by the only similarity too

    expected = by_hand(whole, query, key, dict.fromkeys(PAIRS, entries))
    output = some(query._replace(**{skipped: nothing}), key._replace(**{skipped: nothing}), 0)
    assert some.pairs == pairs
    assert set(some.query.heads) == set(pairs)
    for name, value in zip(pairs, output.losses, strict=True):
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=5e-6), name
    one, other = (m / m.mean(dim=(2, 3, 4), keepdim=True) for m in (maps["rgb"], maps[auxiliary]))
    alignment = (one - other).square().mean().item()
    assert output.alignment.item() == pytest.approx(alignment, rel=2e-5)
    assert output.loss.item() == pytest.approx(sum(expected[n] for n in pairs) + 0.1 * alignment, rel=2e-5)
    assert output.repel is None


def test_without_activation_maps_rgb_features_are_pooled_without_weights():
    network = make_network(activation_maps=False).eval()
    with torch.no_grad():
        for p in [*network.query.heads.parameters(), *network.key.heads.parameters()]:
            p.copy_(torch.randn_like(p))
    query, key = make_views(3, 1), make_views(3, 2)
    expected, weighed = (by_hand(network, query, key, None, weigh=weigh) for weigh in (False, True))
    output = network(query, key, 0)
    for name, value in zip(PAIRS, output.losses, strict=True):
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=5e-6), name
        assert (name == "vv") == (expected[name] == pytest.approx(weighed[name], rel=1e-4)), name
    # alignment_weight alone controls the alignment term, so it is the same without activation maps.
    assert output.alignment.item() == pytest.approx(expected["alignment"], rel=2e-5)


# ---------------------------------------------------------------- symmetric loss


@pytest.mark.parametrize("method", ["dclr", "moco"])
def test_the_symmetric_loss_is_the_mean_of_both_directions_on_the_same_queue(method):
    query, key = make_views(3, 1), make_views(3, 2)
    forth, back, both, filled = (make_network(method=method) for _ in range(4))
    for network in (both, filled):
        network.method = replace(network.method, symmetric_loss=True)
    for network in (forth, back, both):
        network.enqueued.fill_(16)  # a full queue is mined
    outputs = [forth(query, key, 0), back(key, query, 0)]
    found = both(query, key, 0)
    for name in ("loss", "losses", "positive", "hardest_negative", "alignment", "alignment_key_maps", "repel"):
        values = [getattr(output, name) for output in outputs]
        if values[0] is not None:
            torch.testing.assert_close(getattr(found, name), sum(values) / 2, rtol=1e-6, atol=0)
    (outputs[0].loss + outputs[1].loss).backward()
    found.loss.backward()
    for one, other, mean in zip(*(n.query.parameters() for n in (forth, back, both)), strict=True):
        torch.testing.assert_close(mean.grad, (one.grad + other.grad) / 2, rtol=1e-5, atol=1e-7)
    # The keys of the key clips, then those of the query clips. A step that only fills the queue writes the same.
    assert both.enqueued.item() == 22
    assert torch.equal(both.queue[:, :6], torch.cat([forth.queue[:, :3], back.queue[:, :3]], dim=1))
    assert torch.equal(both.queue[:, 6:], forth.queue[:, 6:])
    filled.fill(query, key, 0)
    assert torch.equal(filled.queue, both.queue)
    assert filled.enqueued.item() == 6


@pytest.mark.parametrize(("shift", "share"), [(0, 1.0), (1, 0.0)])
def test_the_nearest_key_is_not_that_of_the_query_clip_itself(shift, share):
    """Both encoders are equal, so the key of the query clip itself, in the same queue, has similarity 1."""
    network = make_network(method="moco", symmetric_loss=True).eval()
    with torch.no_grad():
        for one, other in zip(network.query.heads.parameters(), network.key.heads.parameters(), strict=True):
            other.copy_(one.copy_(torch.randn_like(one)))
    query = make_views(3, 1)
    near = (query.rgb + 0.1 * make_views(3, 2).rgb).roll(shift, 0)
    assert network.nearest_key(network(query, query._replace(rgb=near), 0).queries).item() == share


def test_a_run_with_the_symmetric_loss_resumes_bit_for_bit(train_main, tiny_pretrain, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = {**tiny_pretrain, "symmetric_loss": True}
    train_main("pretrain", **flags, out=straight)
    train_main("pretrain", **{**flags, "epochs": 1}, out=resumed)
    train_main("pretrain", epochs=2, resume=resumed)
    assert_same_end(straight, resumed)
    assert [line["queue/filled_rows"] for line in numbers(straight)] == [8, 16, 18, 18, 18, 18, 18, 18]
    assert tensors_of(straight, "model")["enqueued"].item() == 8 * 8
