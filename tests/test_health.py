"""The health checks on real runs: healthy, collapsed, on the plateau, on the shortcut of fast keys, and with pairs that
lost their own keys; damaged logs.

The runs `healthy`, `shortcut` and `own-key-lost` are stored in tests/stored_runs, because they take minutes or hours.
README.md there says how they were made. The other runs are made here.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dclr.config import make_config
from dclr.errors import UserError
from dclr.evaluation.health import Finding, check_health, probability_by_chance
from dclr.evaluation.run_record import RunRecord, read_run
from dclr.training.pretrain import pretrain

STORED = Path(__file__).parent / "stored_runs"


@pytest.fixture(scope="module")
def made(demo_videos, float32, one_process, tmp_path_factory) -> dict[str, Path]:
    """Make tiny runs of 16 steps: on the plateau, and collapsed with and without pairs.

    Weight decay removes the weights: half of them in a step, or without momentum and at 100 times the learning rate of
    0.01, all but the step's gradient. After all layers the features of all clips are equal.
    """
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "data": str(demo_videos), "ds_config": str(float32), "width": 4, "clip_length": 4, "crop_size": 16,
        "batch_size": 8, "epochs": 8, "workers": 0, "log_every": 1, "embedding_dim": 32, "milestones": (7,),
    }  # fmt: skip
    moco = {"method": "moco", "queue_length": 32, "fill_steps": 4}
    recipes: dict[str, dict[str, Any]] = {
        "plateau": {**moco, "lr": 1e-9, "knn_every": 0},
        "collapsed": {**moco, "lr": 1.0, "weight_decay": 0.5},
        "collapsed without pairs": {"method": "simsiam", "lr": 0.01, "weight_decay": 100.0, "momentum": 0.0},
    }
    for name, recipe in recipes.items():
        pretrain(make_config("pretrain", {**settings, **recipe, "out": str(folder / name)}), "demo", one_process)
    return {name: folder / name for name in recipes}


@pytest.fixture
def run(made) -> Callable[[str], RunRecord]:
    return lambda name: read_run(made[name] if name in made else STORED / name)


def found(run: RunRecord) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_health(run)}


@pytest.mark.parametrize(
    ("name", "plateau", "own_key", "collapse"),
    [
        ("healthy", "ok", "ok", "ok"),
        ("own-key-lost", "ok", "warning", "ok"),
        ("shortcut", "bad", "bad", "bad"),
        ("plateau", "bad", "bad", "ok"),
        ("collapsed", "bad", None, "bad"),  # equal keys: which one is the nearest, rounding errors decide
        ("collapsed without pairs", None, None, "bad"),
    ],
)
def test_each_kind_of_run_is_recognised(run, name, plateau, own_key, collapse):
    findings = found(run(name))
    states = {check: finding.state for check, finding in findings.items()}
    assert states["collapse"] == collapse
    if plateau is not None:
        assert states["plateau"] == plateau
    else:
        assert "plateau" not in states
    if own_key is not None:
        assert states["own key"] == own_key
    assert ("bad" in states.values()) == (name not in ("healthy", "own-key-lost"))
    for check in ("end", "finite numbers", "learning rate"):
        assert states[check] == "ok", findings[check]


def test_sentences_have_the_numbers_and_the_step(run):
    healthy, shortcut, plateau, collapsed = (found(run(n)) for n in ("healthy", "shortcut", "plateau", "collapsed"))
    assert healthy["plateau"].sentence.startswith("The loss left the plateau at step ")
    assert healthy["own key"].sentence.startswith(
        "Clips are told apart: among the keys of its batch, a query finds its "
    )
    assert "The positive never exceeded the hardest negative." in healthy["own key"].sentence  # it need not
    assert not healthy["own key"].advice
    words = (
        "The loss was below the plateau until step 136, and is on it again: the loss of the pairs is 5.98 at the end"
    )
    assert shortcut["plateau"].sentence.startswith(words)
    assert "(similarity of the positive and of the hardest negative: vv 1.00 and 1.00)" in shortcut["collapse"].sentence
    assert "--key-momentum" in shortcut["plateau"].advice
    assert plateau["plateau"].sentence.startswith("The loss is still on the plateau: the loss of the pairs is ")
    assert collapsed["collapse"].sentence.startswith("All embeddings are alike (similarity of the positive and of ")
    assert plateau["own key"].sentence.startswith("The positive never exceeded the hardest negative, and among the ")
    assert plateau["own key"].sentence.endswith(" times as well as a guess (vv): nothing was learned yet.")
    without_pairs = found(run("collapsed without pairs"))
    assert "collapsed after step " in without_pairs["collapse"].sentence
    assert (without_pairs["agreement"].state, "nothing was learned" in without_pairs["agreement"].sentence) == (
        "bad",
        True,
    )


def test_pairs_that_lost_their_own_keys_are_named(run):
    """vv, vs and sv recognise their own keys. The loss of vd and dv is as far below the plateau, but they do not."""
    finding = found(run("own-key-lost"))["own key"]
    assert finding.state == "warning"
    assert finding.sentence == (
        "Clips are told apart: among the keys of its batch, a query finds its own 3.8 times as well as a guess (vv). "
        "The positive never exceeded the hardest negative. But vd and dv have a loss below the plateau without "
        "recognising the own key in the batch. A shortcut lowers the loss, or mined positives take the place of the "
        "own key."
    )
    assert finding.advice.startswith("Compare with --mined-positives 0: see ")
    without = run("own-key-lost")
    without = replace(without, settings={**without.settings, "mined_positives": 0})
    assert found(without)["own key"].sentence.endswith("in the batch. A shortcut lowers the loss.")


def test_a_pair_on_the_plateau_of_both_losses_is_no_shortcut():
    """It has learned nothing yet, as the check of the plateau says: the others may be healthy."""
    lines = {"pair_loss/plateau": [7.6], "batch_loss/plateau": [3.5], "pair_loss/vv": [5.0], "batch_loss/vv": [2.0]}
    assert found(record({**lines, "pair_loss/vd": [7.5], "batch_loss/vd": [3.4]}))["own key"].state == "ok"
    finding = found(record({**lines, "pair_loss/vd": [7.1], "batch_loss/vd": [3.4]}))["own key"]
    assert finding.state == "warning"
    assert " But vd has a loss below the plateau without recognising the own key in the batch. " in finding.sentence


@pytest.mark.parametrize(
    ("similarities", "state", "sentence"),
    [
        ({"vv": (0.0, 0.15)}, "bad", "The own key and other keys are about equally similar: nothing was learned yet ("),
        ({"vv": (0.99, 1.0)}, "bad", "All embeddings are alike ("),
        ({"vv": (-0.95, -0.94)}, "bad", "All embeddings are alike ("),
        ({"vv": (0.5, 0.8), "vs": (0.0, 0.15)}, "warning", "The own key and other keys of vs are about equally"),
        ({"vv": (0.99, 1.0), "vs": (0.0, 0.15)}, "bad", "All embeddings of vv are alike ("),
        ({"vv": (0.5, 0.8)}, "ok", "The embeddings of different clips differ ("),
    ],
)
def test_embeddings_are_alike_only_if_their_similarities_are_equal(similarities, state, sentence):
    """The loss is on the plateau, and the temperature is 0.2: 0.00 and 0.15 are alike for the loss, but no collapse."""
    lines = {"pair_loss/plateau": [6.0]}
    for pair, (positive, hardest) in similarities.items():
        lines |= {f"pair_loss/{pair}": [6.0], f"positive_similarity/{pair}": [positive]}
        lines[f"hardest_negative/{pair}"] = [hardest]
    finding = found(record(lines, ended=True, temperature=0.2))["collapse"]
    assert finding.state == state
    assert finding.sentence.startswith(sentence)
    assert bool(finding.advice) == (state != "ok")


@pytest.mark.parametrize(("end", "state"), [(104, "warning"), (144, "bad")])
def test_a_shortcut_is_seen_while_the_loss_is_still_below_the_plateau(run, end, state):
    """Until step 104 the learning rate is high, and the loss is 0.9 to 2.5 below the plateau."""
    whole = run("shortcut")
    lines = [line for line in whole.lines if line["step"] <= 104]
    lines[-1] = {**lines[-1], "step": end}  # at step 144 the run has ended
    findings = found(replace(whole, lines=lines))
    assert findings["plateau"].state == findings["collapse"].state == "ok"
    assert findings["own key"].state == state
    words = (
        "The loss is below the plateau, but this is a shortcut. The positive never exceeded the hardest negative, and "
    )
    assert findings["own key"].sentence.startswith(words)
    assert "finds its own 1.0 times as well as a guess (vv): nothing was learned yet." in findings["own key"].sentence
    assert "--key-momentum" in findings["own key"].advice
    slow = replace(whole, lines=lines, settings={**whole.settings, "key_momentum": 0.999})
    assert found(slow)["own key"].advice.endswith("In the first steps of a run, this is usual: train longer.")


@pytest.mark.parametrize(
    "name", ["healthy", "own-key-lost", "shortcut", "plateau", "collapsed", "collapsed without pairs"]
)
def test_a_run_that_still_trains_is_not_called_bad_yet(run, name):
    still = replace(run(name), report={})
    findings = found(still)
    assert not still.ended
    assert findings["end"].state == "warning"
    assert findings["end"].sentence == f"The run has not ended: its last logged step is {still.last_step:,}."
    timed = ("collapse", "waiting for data")  # waiting depends on the machine
    assert "bad" not in {finding.state for check, finding in findings.items() if check not in timed}
    assert (findings["collapse"].state == "bad") == (name == "collapsed without pairs")  # no training repairs it


def test_a_run_that_is_resumed_with_more_epochs_has_not_ended(run):
    ended = run("plateau")
    assert (ended.ended, ended.steps) == (True, 16)
    longer = replace(ended, settings={**ended.settings, "epochs": 9})
    assert found(longer)["end"].sentence == "The run has not ended: its last logged step is 16 of 18."


def test_before_the_first_loss_nothing_is_known(run):
    first = replace(run("plateau"), lines=run("plateau").lines[:2], report={})
    findings = found(first)
    for check in ("plateau", "own key"):
        assert (findings[check].state, findings[check].sentence) == (
            "unknown",
            "The first steps only fill the queue: no loss is logged yet.",
        )


def test_a_log_without_some_names_gives_unknown_and_no_error(run):
    """So does a log of an earlier version, and a log that lacks any one name."""
    old = run("healthy")
    names = sorted({name for line in old.lines for name in line} - {"step"})
    for gone in [*names, "pair_loss/", "batch_loss/", "hardest_negative/"]:
        lines = [{k: v for k, v in line.items() if not k.startswith(gone)} for line in old.lines]
        states = [finding.state for finding in check_health(replace(old, lines=lines))]
        assert "bad" not in states, gone
    lines = [{k: v for k, v in line.items() if not k.startswith("batch_loss")} for line in old.lines]
    assert found(replace(old, lines=lines))["own key"].state == "unknown"
    only_steps = [{"step": line["step"]} for line in old.lines]
    unknown = {name for name, finding in found(replace(old, lines=only_steps)).items() if finding.state == "unknown"}
    assert {"plateau", "own key", "neighbours", "learning rate", "waiting for data"} <= unknown


# ---------------------------------------------------------------- single checks, on lines with known values


def record(
    lines: dict[str, list[float | None]], command: str = "pretrain", ended: bool = False, **settings
) -> RunRecord:
    """Return a run with these values, logged at the steps 100, 200 and so on."""
    count = len(next(iter(lines.values())))
    made = [
        {"step": 100 * (at + 1), **{name: values[at] for name, values in lines.items() if values[at] is not None}}
        for at in range(count)
    ]
    given = {"batch_size": 10, "epochs": 1, **settings}
    return RunRecord(command, "demo", given, made, {"data": {"videos": 1000 * count}} if ended else {})


def test_a_pair_leaves_the_plateau_when_it_stays_below():
    gap = [0.0] * 5 + [1.0] * 5 + [0.0] * 5 + [1.0] * 10  # an early fall that does not last
    lines = {
        "pair_loss/vv": [6 - value for value in gap], "pair_loss/vs": [6.0] * 25, "pair_loss/plateau": [6.0] * 25,
    }  # fmt: skip
    finding = found(record(lines))["plateau"]
    assert (finding.state, finding.sentence) == (
        "ok",
        "The loss left the plateau at step 1,800 (vv at step 1,800); the loss of the pairs is 11.00 at the end, the "
        "plateau 12.00. vs is still on it.",
    )
    back = {name: values[:15] for name, values in lines.items()}
    finding = found(record(back, ended=True))["plateau"]
    assert finding.state == "bad"
    assert finding.sentence.startswith("The loss was below the plateau until step 1,200, and is on it again: ")


@pytest.mark.parametrize(
    ("lines", "settings", "state", "sentence"),
    [
        ({"batch_loss/vv": [3.0], "batch_loss/plateau": [3.5]}, {}, "ok", "finds its own 1.6 times as well as a guess"),
        ({"batch_loss/vv": [3.4], "batch_loss/plateau": [3.5]}, {}, "bad", "this is a shortcut"),
        ({"batch_loss/vv": [0.0], "batch_loss/plateau": [0.0]}, {}, "unknown", "A batch has one clip"),
        ({"pair_loss/plateau": [5.5]}, {"method": "dclr-simclr"}, "ok", "finds its own 1.6 times as well as a guess"),
        ({"pair_loss/plateau": [5.1]}, {"method": "dclr-simclr"}, "bad", "nothing was learned yet"),
        ({"batch_loss/plateau": [3.5]}, {}, "unknown", "no loss among the keys of a batch"),
    ],
)
def test_own_keys_are_looked_for_in_one_batch(lines, settings, state, sentence):
    lines = {"pair_loss/vv": [5.0], "pair_loss/plateau": [7.6], **lines}
    finding = found(record(lines, ended=True, **settings))["own key"]
    assert finding.state == state
    assert sentence in finding.sentence


@pytest.mark.parametrize(
    ("lines", "settings", "check", "state", "sentence"),
    [
        ({"data_wait_share": [0.9, 0.9, 0.05, 0.05]}, {}, "waiting for data", "ok", "in 5% of the time"),
        ({"data_wait_share": [0.0, 0.0, 0.2, 0.2]}, {}, "waiting for data", "warning", "in 20% of the time"),
        ({"data_wait_share": [0.0, 0.0, 0.8, 0.8]}, {}, "waiting for data", "bad", "in 80% of the time"),
        ({"nonfinite/skipped_steps": [0.0, 0.0]}, {}, "finite numbers", "ok", "No step had"),
        ({"nonfinite/skipped_steps": [0.0, 2.0]}, {}, "finite numbers", "warning", "2 of 200 steps were skipped"),
        ({"nonfinite/skipped_steps": [0.0, 9.0]}, {}, "finite numbers", "bad", "9 of 200 steps were skipped"),
        ({"lr": [0.1, 0.2]}, {"lr": 0.5, "warmup_epochs": 9}, "learning rate", "warning", "still warms up: 0.2 of 0.5"),
        ({"lr": [0.5, 0.05]}, {"lr": 0.5, "warmup_epochs": 9}, "learning rate", "ok", "from 0.5 to 0.05"),
        ({"lr": [0.5, 0.5]}, {"lr": 0.5}, "learning rate", "warning", "never fell: 0.5 to the last step"),
        ({"knn/recall_at_1": [0.13], "knn/chance": [0.125]}, {}, "neighbours", "warning", "this may be chance"),
        ({"knn/recall_at_1": [0.2], "knn/chance": [0.125]}, {}, "neighbours", "warning", "less than twice the odds"),
        ({"knn/recall_at_1": [0.3], "knn/chance": [0.125]}, {}, "neighbours", "ok", "for 30% of the test videos"),
        ({"knn/recall_at_1": [0.6], "knn/chance": [0.5]}, {}, "neighbours", "warning", "less than twice the odds"),
        ({"spread": [0.9, 0.8]}, {"method": "simsiam"}, "collapse", "ok", "is 0.85 at the end"),
        ({"spread": [0.3, 0.3]}, {"method": "simsiam"}, "collapse", "warning", "is 0.30 at the end"),
        ({"spread": [0.9, *[0.0] * 5]}, {"method": "simsiam"}, "collapse", "bad", "collapsed after step 100"),
        ({"x": [0.0]}, {"method": "simsiam"}, "collapse", "unknown", "no spread"),
        ({"x": [0.0]}, {"method": "simsiam"}, "agreement", "unknown", "no loss"),
        ({"loss": [0.01, *[-0.7] * 5]}, {"method": "simsiam"}, "agreement", "ok", "is 0.70 at the end"),
        ({"loss": [0.01]}, {"method": "simsiam"}, "agreement", "bad", "is -0.01 at the end"),
    ],
)
def test_a_check_of_one_curve(lines, settings, check, state, sentence):
    finding = found(record(lines, ended=True, **settings))[check]
    assert finding.state == state
    assert sentence in finding.sentence
    assert bool(finding.advice) == (state in ("warning", "bad"))


def test_a_loss_that_is_not_finite_is_counted(tmp_path):
    lines = [{"step": 1, "loss": 1.0, "nonfinite/skipped_steps": 0.0}, {"step": 2, "loss": None}]
    run = RunRecord("pretrain", "demo", {}, lines)
    assert found(run)["finite numbers"].sentence.endswith("1 logged losses are not finite.")


def test_a_classifier_that_overfits_or_guesses():
    lines = {"train_top1": [0.3, 0.5, 0.9], "test/top1": [0.2, 0.5, 0.4], "test/chance": [0.1] * 3}
    findings = found(record(lines, "finetune", ended=True))
    assert "plateau" not in findings
    assert "collapse" not in findings
    assert findings["accuracy"].state == "ok"
    assert findings["overfitting"].state == "warning"
    assert "40% at the end, 50% at best (step 200), while the accuracy" in findings["overfitting"].sentence
    assert found(record({**lines, "test/top1": [0.2, 0.5, 0.5]}, "finetune"))["overfitting"].state == "ok"
    guess = found(record({**lines, "test/top1": [0.1, 0.1, 0.12]}, "finetune", ended=True))
    assert guess["accuracy"].state == "bad"
    assert found(record({"train_top1": [0.3]}, "linear"))["accuracy"].state == "unknown"


@pytest.mark.parametrize(
    ("right", "classes", "state", "sentence"),
    [
        (325, 2, "warning", "65% of the test videos at step 100 (chance 50%): this is less than twice the odds of"),
        (334, 2, "ok", "67% of the test videos at step 100 (chance 50%)."),
        (250, 2, "bad", "this may be chance, which gives at least as much with a probability of 52% on 500 test"),
        (3, 400, "bad", "0.6% of the test videos at step 100 (chance 0.2%): this may be chance, which gives at least"),
        (4, 400, "ok", "0.8% of the test videos at step 100 (chance 0.2%)."),
        (500, 1, "bad", "with a probability of 100%"),
        (0, 10, "bad", "0.0% of the test videos at step 100 (chance 10%): this may be chance"),
    ],
)
def test_an_accuracy_is_compared_with_what_chance_gives(right, classes, state, sentence):
    lines = {"test/top1": [right / 500], "test/chance": [1 / classes]}
    finding = found(record(lines, "finetune", ended=True))["accuracy"]
    assert finding.state == state
    assert sentence in finding.sentence


@pytest.mark.parametrize(
    ("accuracy", "chance", "probability"), [(3 / 500, 1 / 400, 0.1313), (0.0, 0.1, 1.0), (1.0, 0.5, 0.5**500)]
)
def test_the_probability_by_chance_is_the_tail_of_the_binomial_distribution(accuracy, chance, probability):
    found = probability_by_chance(accuracy, chance)
    assert found == pytest.approx(probability, rel=0.01)
    every = torch.arange(round(accuracy * 500), 501, dtype=torch.float64)
    exact = torch.distributions.Binomial(500, torch.tensor(chance, dtype=torch.float64))
    assert found == pytest.approx(exact.log_prob(every).exp().sum().item(), rel=1e-6)


# ---------------------------------------------------------------- the folder of a run


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Return a copy of what a run has written about itself."""
    for name in ("config.json", "metrics.jsonl", "report.json"):
        shutil.copy(made["plateau"] / name, tmp_path / name)
    return tmp_path


def test_damaged_lines_are_skipped_and_counted(folder):
    whole = read_run(folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_bytes(text[:-30].encode() + b'\n[1]\n{"step": "1"}\n\xff\n{"step": NaN}\n')
    run = read_run(folder)
    assert (run.damaged, len(run.lines)) == (5, len(whole.lines) - 1)
    assert run.lines == whole.lines[:-1]


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"data": 1}'])
def test_a_report_that_is_missing_or_damaged_means_that_the_run_has_not_ended(folder, content):
    (folder / "report.json").unlink()
    if content is not None:
        (folder / "report.json").write_text(content)
    assert not read_run(folder).ended


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), ": no such folder; give the folder of a training run"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file or directory; a run's folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not the configuration of a run"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), ": its metrics.jsonl has no step; wait for the first"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"st'), ": its metrics.jsonl has no step; wait for"),
    ],
)
def test_a_folder_without_a_run_is_refused_in_one_line(folder, damage: Callable[[Path], Any], message):
    damage(folder)
    with pytest.raises(UserError) as caught:
        read_run(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
