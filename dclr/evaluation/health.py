"""Is a training run healthy? Each check turns the log of a run into one sentence with its numbers.

A check is a function of a RunRecord alone. It returns None if the run has nothing to check, such as pairs of clips in
finetuning. docs/curves.md explains the names of the log, and docs/LOG.md the failures.

One line of the log is one batch, so single values are noisy. Checks use the mean of the last LINES values.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dclr.evaluation.monitor import TEST_VIDEOS
from dclr.evaluation.run_record import Curve, RunRecord

State = Literal["ok", "warning", "bad", "unknown"]

LINES = 5
"""Log lines that are averaged. The loss of single batches of 32 clips differs by 0.1 to 0.2 nats in our runs."""

PLATEAU_MARGIN = math.log(1.5)
"""A pair has left its plateau if its loss is at least this far below the plateau, in nats.

The loss is the mean of -ln(share of the positive), so this is a share 1.5 times that of a network that cannot tell
clips apart. In docs/LOG.md ("Leaving the plateau on two cores"), the pairs of a run that had learned nothing yet are
0.06 to 0.3 below the plateau. The pairs of runs that had learned something are 0.6 to 1.7 below it. Among the keys of a
batch, the loss of the runs in tests/stored_runs ends 0.7 (healthy) and 0.02 (shortcut) below its plateau. In the run
own-key-lost, three pairs end 1.2 to 1.3 below it, and the two that lost their own keys 0.0."""

ALIKE = 0.02
"""Embeddings count as alike if the similarities of positive and hardest negative differ by less than this. They differ
by 0.001 at the end of the run shortcut in tests/stored_runs, and by 0.001 to 0.009 in the run that tests/test_health.py
collapses. In the other stored runs they differ by 0.06 or more.

A high similarity is no criterion. In the collapsed run, all queries are alike and all keys are alike, but the
similarity of query and key changes from -0.97 to 0.94, because the key encoder follows the query encoder later."""

SPREAD_LOW, SPREAD_COLLAPSED = 0.5, 0.1
"""Spread of SimSiam's projections. It is 1 if they are spread over the sphere. Chen and He (CVPR 2021, figure 2) report
values near 1 for training that works and 0 for a collapse. Our runs on rendered videos have 0.7 to 0.9."""

LEAST_AGREEMENT = 0.2
"""Least cosine of SimSiam's prediction and the projection that it should equal. Unrelated vectors have 0: the mean of
LINES batches of 8 clips with 32 numbers differs from it by 0.02. Our runs on rendered videos reach 0.6 to 0.9."""

WAIT_SHARE, MOST_WAIT_SHARE = 0.1, 0.5
"""Shares of the time in which a run waits for data: more than docs/curves.md allows, and more than it computes."""

SKIPPED_SHARE = 0.01
"""Share of the steps with a non-finite loss or gradient above which the state is "bad" instead of "warning"."""

CHANCE_ODDS = 2.0
"""An accuracy is "ok" only if its odds are at least this many times the odds of chance. Odds are p / (1 - p), so the
rule has a meaning for 2 and for 400 classes. It says how large the difference is, not how certain."""

CHANCE_PROBABILITY = 0.05
"""An accuracy may be chance if chance gives at least as much with this probability on TEST_VIDEOS test videos.

The log does not have the number of test videos, and TEST_VIDEOS is the most that are measured. With fewer videos, the
probability of an accuracy above chance is higher. So an accuracy that passes this check may be chance too: chance gives
3 of 15 videos of 10 classes, or more, with a probability of 18 %."""

OVERFIT_POINTS = 0.05
"""Fall of the test accuracy from its best value that counts as overfitting. The standard deviation of an accuracy on
500 test videos, the most that are measured during training, is at most 2.2 points."""


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    name: str
    state: State
    sentence: str
    advice: str = ""
    """What to do; empty if there is nothing to do."""


def check_health(run: RunRecord) -> list[Finding]:
    """Return the findings of all checks that apply to a run."""
    checks = (
        check_end,
        check_plateau,
        check_own_key,
        check_collapse,
        check_spread,
        check_agreement,
        check_neighbours,
        check_accuracy,
        check_overfitting,
        check_finite,
        check_learning_rate,
        check_waiting,
    )
    found = [check(run) for check in checks]
    return [finding for finding in found if finding is not None]


# ---------------------------------------------------------------- the end


def check_end(run: RunRecord) -> Finding:
    """Check that the run has reached its last step."""
    if run.ended:
        return Finding("end", "ok", f"The run has ended after {_number(run.last_step)} steps.")
    of = f" of {_number(run.steps)}" if run.steps is not None else ""
    return Finding(
        "end",
        "warning",
        f"The run has not ended: its last logged step is {_number(run.last_step)}{of}.",
        "If it no longer trains, train.py COMMAND --resume RUN continues it.",
    )


# ---------------------------------------------------------------- pairs of clips


def check_plateau(run: RunRecord) -> Finding | None:
    """Check that pairs have left the plateau, the loss of a network that cannot tell clips apart.

    A pair has left it at the first step from which its averaged loss stays PLATEAU_MARGIN below its plateau. An early
    fall that does not last does not count: while the key encoder still moves fast, new keys differ from older ones.
    """
    if not run.pairs:
        return _without_pairs(run, "plateau")
    gaps = {pair: _averaged(_gap(run, pair)) for pair in run.pairs}
    if not all(gaps.values()):
        return Finding("plateau", "unknown", "The log has no plateau to compare the loss with.")
    left = {pair: step for pair, gap in gaps.items() if (step := _left_at(gap)) is not None}
    stayed = [pair for pair in run.pairs if pair not in left]
    loss = sum(_late(run.curve(f"pair_loss/{pair}")) for pair in run.pairs)
    plateau = len(run.pairs) * _late(run.curve("pair_loss/plateau"))
    values = f"the loss of the pairs is {loss:.2f} at the end, the plateau {plateau:.2f}"
    if left:
        first = min(left.values())
        order = sorted(left, key=lambda pair: left[pair])
        steps = ", ".join(f"{pair} at step {_number(left[pair])}" for pair in order)
        sentence = f"The loss left the plateau at step {_number(first)} ({steps}); {values}."
        if not stayed:
            return Finding("plateau", "ok", sentence)
        still = f" {_listed(stayed)} {'is' if len(stayed) == 1 else 'are'} still on it."
        return Finding("plateau", "ok", sentence + still, "Pairs leave the plateau one after another: train longer.")
    state: State = "bad" if run.ended else "warning"
    below = [gap for gap in gaps.values() if max(value for _, value in gap) >= PLATEAU_MARGIN]
    if below:
        last = max(step for gap in below for step, value in gap if value >= PLATEAU_MARGIN)
        return Finding(
            "plateau",
            state,
            f"The loss was below the plateau until step {_number(last)}, and is on it again: {values}. What lowered "
            "it did not last.",
            _shortcut_advice(run),
        )
    return Finding(
        "plateau",
        state,
        f"The loss is still on the plateau: {values}.",
        "Train longer, or raise --lr. With a queue, raise --queue-length to 2 or 3 times the number of videos if the "
        "data set is small.",
    )


def _shortcut_advice(run: RunRecord) -> str:
    """Return what to do if the loss fell by a shortcut."""
    if run.setting("key_momentum") < 0.999:
        remedy = 'Raise --key-momentum to 0.999: see "Key momentum in short runs" in docs/LOG.md.'
    else:
        remedy = "In the first steps of a run, this is usual: train longer."
    return f"The network may tell new keys from old ones, and not clips apart. {remedy}"


def check_own_key(run: RunRecord) -> Finding | None:
    """Check that queries find their own keys among the keys of their batch.

    The shortcut of docs/LOG.md ("Key momentum in short runs") lowers the loss without learning: a new key differs from
    all older ones, whatever its clip is. The keys of one batch are equally new, so this does not help among them. Their
    loss `batch_loss` stays at ln N, with N keys. It must be PLATEAU_MARGIN below, as the loss must. Without a queue,
    the loss itself is that of one batch.

    This must hold for every pair whose loss with the queue has left its plateau. In "Real videos, second seed" of
    docs/LOG.md, the dynamic pairs lowered their loss by means of mined positives and lost their own keys.

    The mean positive need not exceed the mean hardest negative: one of many negatives is always near, such as an
    earlier clip of the same video.
    """
    if not run.pairs:
        return _without_pairs(run, "own key")
    positive = _excess_of_positives(run)
    kind = "pair_loss" if run.setting("method") == "dclr-simclr" else "batch_loss"
    late = {pair: _late(gap) for pair in run.pairs if (gap := _gap(run, pair, kind))}
    if not late:
        return Finding("own key", "unknown", f"{positive}. The log has no loss among the keys of a batch.")
    if not _late(run.curve(f"{kind}/plateau")):
        return Finding("own key", "unknown", f"{positive}. A batch has one clip, so there is nothing to find.")
    best = max(late, key=lambda pair: late[pair])
    found = f"among the keys of its batch, a query finds its own {math.exp(late[best]):.1f} times as well as a guess"
    left = [pair for pair in late if _left_at(_averaged(_gap(run, pair))) is not None]
    if late[best] >= PLATEAU_MARGIN:
        sentence = f"Clips are told apart: {found} ({best}). {positive}."
        without = [pair for pair in left if late[pair] < PLATEAU_MARGIN]
        if not without:
            return Finding("own key", "ok", sentence)
        have = f"{_listed(without)} {'has' if len(without) == 1 else 'have'}"
        cause, advice = "A shortcut lowers the loss", _shortcut_advice(run)
        if run.setting("mined_positives"):
            cause += ", or mined positives take the place of the own key"
            advice = f'Compare with --mined-positives 0: see "Real videos, second seed" in docs/LOG.md. {advice}'
        sentence += f" But {have} a loss below the plateau without recognising the own key in the batch. {cause}."
        return Finding("own key", "warning", sentence, advice)
    sentence, advice = f"{positive}, and {found} ({best}): nothing was learned yet.", "Train longer: see the plateau."
    if left:
        sentence, advice = f"The loss is below the plateau, but this is a shortcut. {sentence}", _shortcut_advice(run)
    return Finding("own key", "bad" if run.ended else "warning", sentence, advice)


def check_collapse(run: RunRecord) -> Finding | None:
    """Check that embeddings differ.

    If all embeddings of a view are alike, all similarities are equal, see ALIKE, and the loss is on the plateau or
    above it. On the plateau, the hardest negative may also be further from the positive, but within one temperature.
    The embeddings then differ, but the loss treats all keys alike: nothing was learned yet. Untrained embeddings are
    often alike too, so only the end of the log counts.
    """
    if not run.pairs:
        return None  # check_spread
    equal, late = [], {}
    for pair in run.pairs:
        curves = [run.curve(f"{name}/{pair}") for name in ("positive_similarity", "hardest_negative")]
        gap = _gap(run, pair)
        if not (gap and all(curves)):
            return Finding("collapse", "unknown", "The log has no similarities of positives and hardest negatives.")
        late[pair] = positive, hardest = _late(curves[0]), _late(curves[1])
        if abs(hardest - positive) < run.setting("temperature") and _late(gap) < PLATEAU_MARGIN:
            equal.append(pair)
    values = "; ".join(f"{pair} {positive:.2f} and {hardest:.2f}" for pair, (positive, hardest) in late.items())
    similarities = f"similarity of the positive and of the hardest negative: {values}"
    if not equal:
        return Finding("collapse", "ok", f"The embeddings of different clips differ ({similarities}).")
    state: State = "bad" if run.ended and len(equal) == len(run.pairs) else "warning"
    alike = [pair for pair in equal if abs(late[pair][1] - late[pair][0]) < ALIKE]
    shown = alike or equal
    which = "" if len(shown) == len(run.pairs) else f" of {_listed(shown)}"
    if not alike:
        return Finding(
            "collapse",
            state,
            f"The own key and other keys{which} are about equally similar: nothing was learned yet ({similarities}).",
            "Train longer: see the plateau.",
        )
    return Finding(
        "collapse",
        state,
        f"All embeddings{which} are alike ({similarities}).",
        'Train longer, if the run is young. Else lower --lr, and see "Key momentum in short runs" in docs/LOG.md.',
    )


def check_spread(run: RunRecord) -> Finding | None:
    """Check that SimSiam's projections differ: the spread of a batch over the sphere is not near 0.

    The last batch normalisation keeps the spread near 1 until the features of all clips are almost equal. So
    check_agreement looks at the loss too.
    """
    if run.setting("method") != "simsiam" or run.command != "pretrain":
        return None
    curve = run.curve("spread")
    if not curve:
        return Finding("collapse", "unknown", "The log has no spread of the projections.")
    spread = _late(curve)
    sentence = f"the spread of the projections is {spread:.2f} at the end (1: spread over the sphere, 0: all the same)"
    if spread < SPREAD_COLLAPSED:
        below = next(step for step, value in reversed(curve) if value >= SPREAD_COLLAPSED or step == curve[0][0])
        return Finding(
            "collapse",
            "bad",
            f"The network has collapsed after step {_number(below)}: {sentence}.",
            "Lower --lr, raise --batch-size, and start again.",
        )
    if spread < SPREAD_LOW:
        return Finding("collapse", "warning", f"The network may collapse: {sentence}.", "Lower --lr.")
    return Finding("collapse", "ok", f"The projections of different clips differ: {sentence}.")


def check_agreement(run: RunRecord) -> Finding | None:
    """Check that SimSiam's predictions from one clip resemble the projections of the other clip: the loss is below 0.

    A loss of -1 does not show success by itself: a collapsed network has it too, see check_spread.
    """
    if run.setting("method") != "simsiam" or run.command != "pretrain":
        return None
    curve = run.curve("loss")
    if not curve:
        return Finding("agreement", "unknown", "The log has no loss.")
    cosine = -_late(curve)
    sentence = f"The cosine of prediction and projection is {cosine:.2f} at the end (1: equal, 0: unrelated)"
    if cosine >= LEAST_AGREEMENT:
        return Finding("agreement", "ok", f"{sentence}.")
    state: State = "bad" if run.ended else "warning"
    return Finding("agreement", state, f"{sentence}: nothing was learned yet.", "Train longer, or change --lr.")


def _without_pairs(run: RunRecord, name: str) -> Finding | None:
    """Return that no pair was logged, or None if the command or the method has none."""
    if run.command != "pretrain" or run.setting("method") == "simsiam":
        return None
    if run.curve("queue/filled_rows") and not run.curve("loss"):
        return Finding(name, "unknown", "The first steps only fill the queue: no loss is logged yet.")
    return Finding(name, "unknown", f"The log of method {run.setting('method')} has no pairs of clips.")


def _gap(run: RunRecord, pair: str, kind: str = "pair_loss") -> Curve:
    """Return how far the loss of a pair, of the queue or of the batch, is below the plateau of its line, in nats."""
    plateau = dict(run.curve(f"{kind}/plateau"))
    return [(step, plateau[step] - loss) for step, loss in run.curve(f"{kind}/{pair}") if step in plateau]


def _left_at(averaged_gap: Curve) -> int | None:
    """Return the first step from which the gap stays at PLATEAU_MARGIN or more; None if the last one is smaller."""
    found = None
    for step, value in reversed(averaged_gap):
        if value < PLATEAU_MARGIN:
            break
        found = step
    return found


def _excess_of_positives(run: RunRecord) -> str:
    """Return whether and when the averaged positive of a pair first exceeded its averaged hardest negative."""
    found, compared = [], False
    for pair in run.pairs:
        hardest = dict(run.curve(f"hardest_negative/{pair}"))
        positive = run.curve(f"positive_similarity/{pair}")
        difference = _averaged([(step, value - hardest[step]) for step, value in positive if step in hardest])
        compared = compared or bool(difference)
        found += [(step, pair) for step, value in difference if value > 0][:1]
    if not compared:
        return "The log has no similarities of positives and hardest negatives"
    if not found:
        return "The positive never exceeded the hardest negative"
    step, pair = min(found)
    return f"The positive first exceeded the hardest negative at step {_number(step)} ({pair})"


# ---------------------------------------------------------------- measured accuracies


def check_neighbours(run: RunRecord) -> Finding | None:
    """Check that nearest neighbours have the same class more often than by chance, if --knn-every measured them."""
    if run.command != "pretrain":
        return None
    recall, chance = run.curve("knn/recall_at_1"), run.curve("knn/chance")
    if not (recall and chance):
        return Finding(
            "neighbours",
            "unknown",
            "Nearest neighbours were not measured.",
            "--knn-every N measures them if videos have labels.",
        )
    what = "The nearest training video has the class of the test video"
    advice = "The classes may be of something that this method does not learn. Compare with an untrained network."
    return _above_chance("neighbours", what, recall, chance[-1][1], "warning", advice)


def check_accuracy(run: RunRecord) -> Finding | None:
    """Check that a classifier is better than a guess on test videos, if --test-every measured it."""
    if run.command == "pretrain":
        return None
    top1, chance = run.curve("test/top1"), run.curve("test/chance")
    if not (top1 and chance):
        return Finding(
            "accuracy", "unknown", "The accuracy on test videos was not measured.", "--test-every N measures it."
        )
    state: State = "bad" if run.ended else "warning"
    what = "The class of the test video is right"
    return _above_chance("accuracy", what, top1, chance[-1][1], state, "Train longer, or raise --lr.")


def _above_chance(name: str, what: str, curve: Curve, chance: float, state: State, advice: str) -> Finding:
    """Check the last accuracy of a curve, see CHANCE_PROBABILITY and CHANCE_ODDS.

    Returns:
        `state` with `advice` if the accuracy is within chance. If its odds are less than CHANCE_ODDS times those of
        chance: "warning" with `advice`. Else "ok".
    """
    step, last = curve[-1]
    sentence = f"{what} for {_percent(last)} of the test videos at step {_number(step)} (chance {_percent(chance)})"
    probability = probability_by_chance(last, chance)
    if probability >= CHANCE_PROBABILITY:
        why = f"which gives at least as much with a probability of {probability:.0%} on {TEST_VIDEOS} test videos"
        return Finding(name, state, f"{sentence}: this may be chance, {why}.", advice)
    if last * (1 - chance) < CHANCE_ODDS * chance * (1 - last):
        return Finding(name, "warning", f"{sentence}: this is less than twice the odds of chance.", advice)
    return Finding(name, "ok", f"{sentence}.")


def probability_by_chance(accuracy: float, chance: float) -> float:
    """Return the probability that chance gives at least `accuracy` on TEST_VIDEOS test videos: the binomial tail."""
    least = round(accuracy * TEST_VIDEOS)
    return sum(
        math.comb(TEST_VIDEOS, right) * chance**right * (1 - chance) ** (TEST_VIDEOS - right)
        for right in range(least, TEST_VIDEOS + 1)
    )


def check_overfitting(run: RunRecord) -> Finding | None:
    """Check that the test accuracy does not fall while the training accuracy rises."""
    test, train = run.curve("test/top1"), run.curve("train_top1")
    if run.command == "pretrain" or len(test) < 2 or not train:
        return None
    best_step, best = max(test, key=lambda entry: entry[1])
    last = test[-1][1]
    then = [value for step, value in train if step <= best_step][-LINES:]
    rises = bool(then) and _late(train) > statistics.fmean(then)
    sentence = f"Test accuracy: {_percent(last)} at the end, {_percent(best)} at best (step {_number(best_step)})"
    if best - last > OVERFIT_POINTS and rises:
        return Finding(
            "overfitting",
            "warning",
            f"{sentence}, while the accuracy on training clips rose to {_percent(_late(train))}: the network overfits.",
            "Train for fewer epochs, or raise --dropout or --weight-decay.",
        )
    return Finding("overfitting", "ok", f"{sentence}; on training clips {_percent(_late(train))}.")


# ---------------------------------------------------------------- every run


def check_finite(run: RunRecord) -> Finding:
    """Check that few steps were skipped because of a non-finite loss or gradient."""
    skipped = run.curve("nonfinite/skipped_steps")
    if skipped:
        count = int(skipped[-1][1])
    elif run.setting("on_nonfinite") == "stop":
        count = 0
    else:
        return Finding("finite numbers", "unknown", "The log does not count skipped steps.")
    lost = sum(1 for line in run.lines if line.get("loss", 0.0) is None)
    logged = f" {_number(lost)} logged losses are not finite." if lost else ""
    if count == 0 and not lost:
        return Finding("finite numbers", "ok", "No step had a non-finite loss or gradient.")
    few = count <= SKIPPED_SHARE * run.last_step
    return Finding(
        "finite numbers",
        "warning" if few else "bad",
        f"{_number(count)} of {_number(run.last_step)} steps were skipped: loss or gradient was not finite.{logged}",
        "Lower --lr, or use float32 in --ds_config.",
    )


def check_learning_rate(run: RunRecord) -> Finding:
    """Check that the learning rate has fallen by the end, and that the warm-up has ended."""
    curve = run.curve("lr")
    if not curve:
        return Finding("learning rate", "unknown", "The log has no learning rate.")
    (_, last), highest = curve[-1], max(value for _, value in curve)
    full = run.setting("lr")
    if run.setting("warmup_epochs") and highest < full * (1 - 1e-6) and last >= highest:
        return Finding(
            "learning rate",
            "warning",
            f"The learning rate still warms up: {last:.3g} of {full:.3g}.",
            "Lower --warmup-epochs, or train longer." if run.ended else "Wait for the end of --warmup-epochs.",
        )
    if last < highest:
        return Finding("learning rate", "ok", f"The learning rate has fallen from {highest:.3g} to {last:.3g}.")
    if run.ended:
        return Finding(
            "learning rate",
            "warning",
            f"The learning rate never fell: {last:.3g} to the last step.",
            "Choose --milestones below --epochs, or --schedule cosine.",
        )
    return Finding("learning rate", "ok", f"The learning rate is {last:.3g} and has not fallen yet.")


def check_waiting(run: RunRecord) -> Finding:
    """Check that the run does not wait for data, in the second half of its log lines."""
    curve = run.curve("data_wait_share")
    if not curve:
        return Finding("waiting for data", "unknown", "The log has no share of waiting for data.")
    share = statistics.median(value for _, value in curve[len(curve) // 2 :])
    sentence = f"The run waits for data in {share:.0%} of the time."
    if share < WAIT_SHARE:
        return Finding("waiting for data", "ok", sentence)
    return Finding(
        "waiting for data",
        "bad" if share >= MOST_WAIT_SHARE else "warning",
        sentence,
        "Raise --workers, or pack the videos with train.py pack.",
    )


# ---------------------------------------------------------------- curves and words


def _averaged(curve: Curve) -> Curve:
    """Return the mean of each value and the LINES - 1 values before it."""
    values = [value for _, value in curve]
    means = [statistics.fmean(values[max(0, end - LINES) : end]) for end in range(1, len(values) + 1)]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]


def _late(curve: Curve) -> float:
    """Return the mean of the last LINES values; NaN if there are none."""
    return statistics.fmean([value for _, value in curve[-LINES:]]) if curve else math.nan


def _number(value: float) -> str:
    return f"{value:,}"


def _percent(share: float) -> str:
    """Return a share in percent, below 10 % with one decimal: the chance of 400 classes is 0.2 %."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _listed(names: Sequence[str]) -> str:
    """Return names as a text: "a", "a and b", "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
