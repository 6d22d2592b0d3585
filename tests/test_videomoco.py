"""VideoMoCo on tiny networks: the generator and its gradient, the two losses, the ages of queue entries, the phases."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import assert_same_end, make_views, tensors_of
from torch import Tensor

from dclr import distributed
from dclr.config import MethodConfig, ModelConfig, flat, resolve
from dclr.errors import UserError
from dclr.methods import VideoMoCo
from dclr.methods.generator import Generator, drop, dropped_count, fill_of, lowest, score_gradient

MODEL = ModelConfig(width=4)
FRAMES = 8  # of helpers.make_views


def make_network(**settings: Any) -> VideoMoCo:
    """Return a network in its second phase, with random heads, so that embeddings of clips differ."""
    torch.manual_seed(0)
    tiny = {"method": "videomoco", "queue_length": 10, "embedding_dim": 32, "adversarial_from": 0, "decay_rate": 0.9}
    network = VideoMoCo(MODEL, MethodConfig(**{**tiny, **settings}), clip_length=FRAMES)
    with torch.no_grad():
        for weight in [network.query.heads["vv"].weight, network.key.heads["vv"].weight]:
            weight.normal_()
    network.begin_step(0, 4)
    return network


def test_a_file_with_the_symmetric_loss_of_another_method_changes_nothing() -> None:
    views = make_views(1), make_views(2)
    network, other = make_network(), make_network(symmetric_loss=True)
    for each in (network, other):
        each.fill(*views, 0)
        assert int(each.enqueued) == 4
    assert torch.equal(network.queue, other.queue)


# ---------------------------------------------------------------- the generator


def test_the_generator_has_the_published_size_and_needs_no_pooling_of_published_clips() -> None:
    assert sum(parameter.numel() for parameter in Generator(32).parameters()) == 567_872
    no_pooling = patch("torch.nn.functional.adaptive_avg_pool2d", side_effect=AssertionError("pooled"))
    # torch.autocast does not know the device "meta".
    with torch.device("meta"), patch("torch.autocast", lambda *_, **__: nullcontext()), no_pooling:
        assert Generator(4)(torch.randn(2, 3, 4, 112, 112)).shape == (2, 4)


def test_scores_of_small_clips_are_a_distribution_and_differ_between_clips() -> None:
    torch.manual_seed(0)
    scores = Generator(FRAMES)(torch.randn(3, 3, FRAMES, 16, 18))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    assert (scores[0] - scores[1]).abs().max() > 1e-5


def test_a_quarter_of_the_frames_is_dropped_and_filled() -> None:
    assert [dropped_count(frames) for frames in (4, 7, 8, 32)] == [1, 1, 2, 8]
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2, 0.1, 0.5, 0.6, 0.7], [0.1] * 8])
    dropped = lowest(scores)
    assert dropped.nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 1]]
    clip = torch.randn(2, 3, 8, 4, 5)
    for fill in ("mean", "zero"):
        found = drop(clip, dropped, fill)
        for b, t in np.ndindex(2, 8):
            expected = clip[b, :, t]
            if dropped[b, t]:
                expected = torch.full_like(expected, clip[b, :, t].mean() if fill == "mean" else 0.0)
            torch.testing.assert_close(found[b, :, t], expected)


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_the_straight_through_gradient_is_that_of_keeping_a_frame(fill: str) -> None:
    """Compare in float64 with autograd through masks that are real numbers, and with the released code's gradient."""
    rng = torch.Generator().manual_seed(0)
    clip, weights = (torch.randn(2, 3, 8, 4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    kept = (~lowest(torch.rand(2, 8, generator=rng))).double().requires_grad_()
    mask = kept[:, None, :, None, None]
    dropped = mask * clip + (1 - mask) * fill_of(clip, fill)
    assert torch.equal(dropped, drop(clip, kept == 0, fill))
    loss = torch.tanh(weights * dropped).sum() + dropped.square().mean()
    (expected,) = torch.autograd.grad(loss, kept, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, dropped)
    torch.testing.assert_close(score_gradient(gradient, clip, fill, "exact"), expected, rtol=1e-12, atol=1e-12)
    released = score_gradient(gradient, clip, fill, "released")
    torch.testing.assert_close(released, gradient.sum(dim=(1, 3, 4)), rtol=1e-12, atol=1e-12)
    assert (released - expected).abs().max() > 0.1


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("form", ["exact", "released"])
def test_each_loss_moves_its_own_network_only(form: str) -> None:
    """Compare the gradients of one step with those of two separate passes, one for each loss."""
    query, key = make_views(1), make_views(2)
    network = make_network(straight_through=form)
    alone, generator_alone = copy.deepcopy(network), copy.deepcopy(network)
    output = network(query, key, 0)
    output.loss.backward()
    assert all(p.grad is None for p in network.key.parameters())

    # L_D alone: the generator chooses frames, and nothing else.
    dropped = lowest(alone.generator(query.rgb))
    embeddings = alone._embed(drop(query.rgb, dropped, "mean"))
    keys, _, _ = alone._encode_key(key, 0)
    logits = torch.cat([(embeddings * keys[0]).sum(1, keepdim=True), embeddings @ alone.queue[0].T], dim=1) / 0.07
    loss = (logits.logsumexp(1) - logits[:, 0]).mean()  # no step has ended: every entry's age is 0
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for (name, parameter), expected in zip(network.query.named_parameters(), alone.query.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)

    # L_G alone, through a straight-through mask.
    scores = generator_alone.generator(query.rgb)
    kept = (~lowest(scores)).float()
    kept = scores + (kept - scores).detach()
    mask, fill = kept[:, None, :, None, None], fill_of(query.rgb, "mean")
    clip = mask * query.rgb + (1 - mask) * fill
    if form == "released":  # the gradient with respect to the mask is the sum of that with respect to the clip
        clip = clip.detach() + mask - mask.detach()
    gone = generator_alone._embed(clip)
    with torch.no_grad():
        whole = generator_alone._embed(query.rgb)
    loss = -100 * (gone - whole).abs().mean()
    assert output.further["generator_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, list(generator_alone.generator.parameters()))
    largest = max(gradient.abs().max().item() for gradient in gradients)
    assert largest > 0
    for (name, parameter), expected in zip(network.generator.named_parameters(), gradients, strict=True):
        # The gradient of a bias before a normalisation is 0 except for rounding errors.
        tolerance = 1e-4 * expected.abs().max().item() + 1e-5 * largest
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=tolerance, msg=name)


def test_the_loss_fades_old_entries_and_never_the_key() -> None:
    """Compare with float64, one clip at a time. Frozen statistics make each clip independent of the others."""
    network = make_network(decay="position", dropping="none").eval()
    network.enqueued.fill_(13)
    queue = network.queue[0].double()
    query, key = make_views(1), make_views(2)
    with torch.no_grad():
        queries, keys = (
            encoder.heads["vv"](encoder.backbone(views.rgb).mean((2, 3, 4))).double()
            for encoder, views in ((network.query, query), (network.key, key))
        )
    age = torch.tensor([3, 2, 1, 10, 9, 8, 7, 6, 5, 4])  # entry 2 holds clip 12, the newest
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T * 0.9**age], dim=1) / 0.07
    expected = (logits.logsumexp(1) - logits[:, 0]).mean().item()
    assert network(query, key, 0).loss.item() == pytest.approx(expected, rel=1e-5)
    network.method = MethodConfig(**{**vars(network.method), "decay": "none"})
    network.enqueued.fill_(13)
    network.queue[0] = queue.float()
    assert network(query, key, 0).loss.item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("micro", "accumulation"), [(4, 1), (2, 2), (3, 1)])
def test_ages_are_those_of_a_list_of_writes(micro: int, accumulation: int) -> None:
    batch, length = micro * accumulation, 10
    network = make_network()
    positions = make_network(decay="position")
    network.begin_step(0, batch)
    written: dict[int, tuple[int, int]] = {}  # entry -> step, number of the clip
    clip = 0
    for step in range(6):
        for _ in range(accumulation):
            ages = [step - written[entry][0] if entry in written else step for entry in range(length)]
            torch.testing.assert_close(network.logit_scale(), 0.9 ** torch.tensor(ages).float())
            positions.enqueued.copy_(network.enqueued)
            places = [clip - (written[entry][1] if entry in written else entry - length) for entry in range(length)]
            assert sorted(places) == list(range(1, length + 1))
            torch.testing.assert_close(positions.logit_scale(), 0.9 ** torch.tensor(places).float())
            network._enqueue(torch.zeros(1, micro, 32))
            for number in range(clip, clip + micro):
                written[number % length] = (step, number)
            clip += micro
    assert make_network(decay="none").logit_scale() is None


def test_the_published_rate_is_exact_for_the_oldest_entry() -> None:
    network = make_network(queue_length=65536, decay="position", decay_rate=0.99999)
    assert network.logit_scale().min().item() == pytest.approx(0.99999**65536, rel=1e-6)


def test_before_its_epoch_it_is_moco_and_the_generator_rests() -> None:
    query, key = make_views(1), make_views(2)
    network = make_network(adversarial_from=3)
    network.enqueued.fill_(13)
    plain = make_network(dropping="none", decay="none")
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("generator.")})
    before = {k: v.clone() for k, v in network.generator.state_dict().items()}
    network.begin_step(2, 4)
    output, expected = network(query, key, 0), plain(query, key, 0)
    assert torch.equal(output.loss, expected.loss)
    assert not output.further
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.generator.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.generator.state_dict().items())
    network.begin_step(3, 4)
    assert "generator_loss" in network(query, key, 1).further


def test_random_frames_are_the_same_on_two_ranks_as_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network, clip = make_network(dropping="random"), torch.zeros(4, 3, FRAMES, 1, 1)
    assert network.generator is None
    assert network(make_views(1), make_views(2), 0).further["generator_loss"] < 0  # the control logs the same change
    whole = network._random_frames(clip, 7)
    assert whole.sum(1).tolist() == [2, 2, 2, 2]
    assert not torch.equal(whole, network._random_frames(clip, 8))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    halves: list[Tensor] = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        halves.append(network._random_frames(clip[:2], 7))
    assert torch.equal(torch.cat(halves), whole)


# ---------------------------------------------------------------- runs


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(train_main, tiny_pretrain, tmp_path: Path) -> None:
    """The second phase begins at the second epoch, so the generator's first step comes after the resume."""
    flags = {**tiny_pretrain, "method": "videomoco", "adversarial_from": 1, "decay_rate": 0.9}
    del flags["mined_positives"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_main("pretrain", **flags, out=straight)
    train_main("pretrain", **{**flags, "epochs": 1}, out=resumed)
    first = tensors_of(resumed, "model")
    train_main("pretrain", epochs=2, resume=resumed)
    assert_same_end(straight, resumed)
    last = tensors_of(resumed, "model")
    learned = [name for name in last if name.startswith("generator.score")]
    assert len(learned) == 2
    assert not any(torch.equal(first[name], last[name]) for name in learned)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"clip_length": 3}, r"^--clip-length is 3, but --dropping generator drops a quarter of the frames: raise "),
        ({"epochs": 80}, r"^--adversarial-from is 100, but the run has 80 epochs, so it would be MoCo: lower it, "),
        ({"mined_positives": 5}, r"^--mined-positives has no effect with --method videomoco"),
        ({"decay": "age"}, r"^--decay is age, but must be steps, position or none$"),
        ({"decay_rate": 1.5}, r"^--decay-rate is 1.5, but must be above 0 and at most 1$"),
        ({"adversarial_from": -1}, r"^--adversarial-from is -1, but must be at least 0$"),
        (
            {"dropping": "none", "dropped_fill": "zero"},
            r"^--dropped-fill has no effect with --dropping none: leave the flag out$",
        ),
        (
            {"dropping": "random", "straight_through": "released"},
            r"^--straight-through has no effect with --dropping random: leave the flag out$",
        ),
        (
            {"decay": "none", "decay_rate": 0.9},
            r"^--decay-rate has no effect with --decay none: leave the flag out$",
        ),
        ({"method": "moco", "decay": "steps"}, r"^--decay has no effect with --method moco: leave the flag out$"),
        (
            {"distinct_starts": True},
            r"^--distinct-starts has no effect with --method videomoco, whose clips are the same frames: leave the ",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve("pretrain", "ucf101", {"method": "videomoco", **flags})


def test_the_preset_holds_the_published_recipe() -> None:
    found = flat(resolve("pretrain", "videomoco", {}))
    published = {
        "method": "videomoco", "clip_length": 32, "clip_stride": 1, "crop_size": 112, "batch_size": 32,
        "backbone": "r2plus1d_18", "lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4, "milestones": (120, 160),
        "epochs": 200, "adversarial_from": 100, "queue_length": 65536, "embedding_dim": 128, "temperature": 0.07,
        "key_momentum": 0.999, "decay": "steps", "decay_rate": 0.99999, "dropping": "generator", "fill_steps": 0,
        "dropped_fill": "mean", "straight_through": "exact", "augmentation": "videomoco",
        "jitter_form": "additive",
    }  # fmt: skip
    assert {name: found[name] for name in published} == published
