"""Tests of the published recipes, the order of sources, the errors for wrong values, and --help."""

import argparse
import dataclasses
import json
import re

import pytest

from dclr import config as configuration
from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.config import (
    AUTOMATIC,
    COMMANDS,
    PRESETS,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    TransferConfig,
    flat,
    make_config,
    read_config,
    resolve,
    write_config,
)
from dclr.errors import UserError

# The values of the released code of DCLR and FAME.
PUBLISHED_CLIPS = {"clip_length": 16, "clip_stride": 2, "crop_size": 112, "backbone": "r2plus1d_10", "width": 64}
PUBLISHED_PRETRAINING = {
    **PUBLISHED_CLIPS,
    "embedding_dim": 128,
    "temperature": 0.07,
    "key_momentum": 0.999,
    "mined_positives": 5,
    "alignment_weight": 0.1,
    "boundary": "wrap",
    "jitter": 1.0,
    "jitter_form": "additive",
    "augmentation": "dclr",
    "distinct_starts": True,
    "repel_weight": 0.0,
    "fill_steps": AUTOMATIC,
    "epochs": 200,
    "batch_size": 64,
    "lr": 0.01,
    "milestones": (120, 160),
    "momentum": 0.9,
    "weight_decay": 1e-4,
}
PUBLISHED_FINETUNE = {
    **PUBLISHED_CLIPS, "dropout": 0.7, "lr": 0.1, "weight_decay": 1e-4, "batch_size": 64, "epochs": 10,
    "milestones": (6, 8),
}  # fmt: skip
PUBLISHED_LINEAR = {
    **PUBLISHED_CLIPS, "normalised_probe": True, "lr": 5.0, "weight_decay": 0.0, "batch_size": 128, "epochs": 10,
    "milestones": (6, 8),
}  # fmt: skip


@pytest.mark.parametrize(("preset", "queue"), [("ucf101", 2048), ("kinetics400", 16384)])
def test_presets_hold_the_published_recipe(preset, queue):
    def assert_holds(command, published):
        found = flat(resolve(command, preset, {}))
        assert {name: found[name] for name in published} == published

    assert_holds("pretrain", {**PUBLISHED_PRETRAINING, "queue_length": queue})
    assert_holds("finetune", PUBLISHED_FINETUNE)
    assert_holds("linear", PUBLISHED_LINEAR)


def test_every_preset_makes_a_configuration_for_every_command():
    assert {preset: set(commands) for preset, commands in PRESETS.items()} == {
        preset: set(COMMANDS) for preset in ("demo", "ucf101", "kinetics400", "videomoco")
    }
    for preset, commands in PRESETS.items():
        for command, values in commands.items():
            found = flat(resolve(command, preset, {}))
            assert {name: found[name] for name in values} == values


def test_a_flag_overrides_the_preset_and_the_preset_the_default():
    default = flat(PretrainConfig())
    preset = flat(resolve("pretrain", "demo", {}))
    assert preset["queue_length"] != default["queue_length"]
    both = flat(resolve("pretrain", "demo", {"queue_length": 99, "seed": 7}))
    assert (both["queue_length"], both["seed"]) == (99, 7)
    assert {**both, "queue_length": preset["queue_length"], "seed": preset["seed"]} == preset


def test_a_resumed_run_keeps_its_own_values_except_for_flags():
    stored = flat(resolve("finetune", "ucf101", {"lr": 0.5, "epochs": 3}))
    resumed = flat(resolve("finetune", "demo", {"epochs": 4}, stored))
    assert resumed == {**stored, "epochs": 4}


def test_a_written_configuration_reads_back_as_it_was(tmp_path):
    config = resolve("pretrain", "demo", {"milestones": [3, 4], "data": "a folder/ü", "weight_decay": 3e-5})
    write_config(tmp_path / "config.json", "pretrain", "demo", config)
    command, preset, values = read_config(tmp_path / "config.json")
    assert (command, preset) == ("pretrain", "demo")
    assert make_config("pretrain", values) == config
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["milestones"] == [3, 4]  # in groups


@pytest.mark.parametrize(
    ("command", "name", "expected"),
    [
        ("pretrain", "distinct_starts", False),
        ("pretrain", "jitter_form", "multiplicative"),
        ("linear", "normalised_probe", False),
        ("finetune", "normalised_probe", None),
    ],
)
def test_a_run_from_before_a_setting_keeps_its_old_behaviour(command, name, expected, tmp_path):
    path = tmp_path / "config.json"
    write_config(path, command, "demo", resolve(command, "ucf101", {}))
    assert read_config(path)[2][name] not in (expected, None)
    stored = json.loads(path.read_text())
    for group in stored.values():
        if isinstance(group, dict):
            group.pop(name, None)
    path.write_text(json.dumps(stored))
    assert read_config(path)[2].get(name) == expected


@pytest.mark.parametrize(
    ("command", "flags", "only"),
    [
        ("finetune", {"normalised_probe": True}, "linear"),
        ("linear", {"finetune_augmentation": "crop"}, "finetune"),
        ("linear", {"dropout": 0.5}, "finetune"),
    ],
)
def test_a_flag_of_the_other_training_on_labels_is_refused(command, flags, only):
    with pytest.raises(UserError, match=rf"^--[a-z-]+ has no effect in {command}, only in {only}: leave the flag out$"):
        resolve(command, "demo", flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; a run's folder holds its config.json"),
        ("{", "not the configuration of a run"),
        ("[]", "not the configuration of a run"),
        ('{"command": "pretrain"}', "not the configuration of a run"),
        ('{"command": "pretrain", "preset": "demo", "run": 3}', "not the configuration of a run"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused_by_its_path(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{path}: {message}")):
        read_config(path)


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        (RunConfig, {"seed": -1}, "--seed is -1, but must be at least 0"),
        (RunConfig, {"log_every": 0}, "--log-every is 0, but must be at least 1"),
        (RunConfig, {"checkpoint_every": 0}, "--checkpoint-every is 0, but must be at least 1"),
        (RunConfig, {"convolutions": "cudnn"}, "--convolutions is cudnn, but must be auto, library or triton"),
        (RunConfig, {"compile": "maybe"}, "--compile is maybe, but must be auto, on or off"),
        (RunConfig, {"pad_channels": 0}, "--pad-channels is 0, but must be from 1 to 64"),
        (DataConfig, {"split": -1}, "--split is -1, but must be at least 0"),
        (DataConfig, {"split": "all"}, "--split is all, which only finetune, linear, accuracy and retrieval take: "),
        (DataConfig, {"clip_length": 0}, "--clip-length is 0, but must be from 1 to 10000"),
        (DataConfig, {"clip_stride": 0}, "--clip-stride is 0, but must be from 1 to 10000"),
        (DataConfig, {"crop_size": 15}, "--crop-size is 15, but must be from 16 to 10000"),
        (DataConfig, {"workers": -1}, "--workers is -1, but must be from 0 to 1024"),
        (ModelConfig, {"backbone": "resnet"}, "--backbone is resnet, but must be r2plus1d_10, r2plus1d_18, "),
        (ModelConfig, {"width": 0}, "--width is 0, but must be from 1 to 1024"),
        (MethodConfig, {"embedding_dim": 0}, "--embedding-dim is 0, but must be 32, 64, 128 or 256"),
        (MethodConfig, {"queue_length": 0}, "--queue-length is 0, but must be at least 1"),
        (MethodConfig, {"temperature": 0.0}, "--temperature is 0.0, but must be above 0"),
        (MethodConfig, {"temperature": float("nan")}, "--temperature is nan, but must be above 0"),
        (MethodConfig, {"key_momentum": 1.1}, "--key-momentum is 1.1, but must be from 0 to 1"),
        (MethodConfig, {"mined_positives": -1}, "--mined-positives is -1, but must be at least 0"),
        (
            MethodConfig,
            {"mined_positives": 9, "queue_length": 8},
            "--mined-positives is 9, but must be from 0 to --queue-length (8)",
        ),
        (MethodConfig, {"fill_steps": -2}, "--fill-steps is -2, but must be at least -1"),
        (MethodConfig, {"alignment_weight": -0.1}, "--alignment-weight is -0.1, but must be at least 0"),
        (MethodConfig, {"alignment_weight": float("nan")}, "--alignment-weight is nan, but must be at least 0"),
        (MethodConfig, {"repel_weight": -1.0}, "--repel-weight is -1.0, but must be at least 0"),
        (MethodConfig, {"alignment": "rawish"}, "--alignment is rawish, but must be relative or raw"),
        (MethodConfig, {"boundary": "mirror"}, "--boundary is mirror, but must be wrap, zero or replicate"),
        (OptimConfig, {"epochs": 0}, "--epochs is 0, but must be at least 1"),
        (OptimConfig, {"batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        (OptimConfig, {"lr": 0.0}, "--lr is 0.0, but must be above 0"),
        (OptimConfig, {"lr": float("inf")}, "--lr is inf, but must be above 0"),
        (OptimConfig, {"momentum": 1.0}, "--momentum is 1.0, but must be at least 0 and below 1"),
        (OptimConfig, {"weight_decay": -1e-4}, "--weight-decay is -0.0001, but must be at least 0"),
        (OptimConfig, {"milestones": (-1,)}, "--milestones is -1, but must be at least 1"),
        (OptimConfig, {"schedule": "linear"}, "--schedule is linear, but must be step or cosine"),
        (OptimConfig, {"warmup_epochs": -1}, "--warmup-epochs is -1, but must be at least 0"),
        (OptimConfig, {"warmup_epochs": 3, "epochs": 3}, "--warmup-epochs is 3, but must be below --epochs (3)"),
        (TransferConfig, {"dropout": 1.0}, "--dropout is 1.0, but must be at least 0 and below 1"),
        # A larger number could not be read from config.json.
        (RunConfig, {"seed": 2**31}, "--seed is 2147483648, but must be below 2 ** 31"),
        (RunConfig, {"log_every": 10**10}, "--log-every is 10000000000, but must be below 2 ** 31"),
        (OptimConfig, {"milestones": (8, 2**31)}, "--milestones is 2147483648, but must be below 2 ** 31"),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_refused_value_is_named_by_its_flag_with_what_would_be_right(group, value, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        group(**value)


def test_a_queue_shorter_than_a_batch_is_refused():
    with pytest.raises(UserError, match=r"^--queue-length is 32, but must be at least --batch-size \(33\)"):
        resolve("pretrain", "ucf101", {"queue_length": 32, "batch_size": 33})
    resolve("pretrain", "ucf101", {"queue_length": 33, "batch_size": 33})  # the smallest queue that takes a batch


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(UserError, match=r"^finetune has no setting named fill_steps, queue_length$"):
        make_config("finetune", {"queue_length": 8, "fill_steps": 1})
    with pytest.raises(UserError, match=r"^--preset is ucf, but must be one of demo, ucf101, kinetics400, videomoco$"):
        resolve("pretrain", "ucf", {})


# ---------------------------------------------------------------- the command line

PARSERS = [(train, command) for command in train.DESCRIPTIONS] + [(evaluation, c) for c in evaluation.DESCRIPTIONS]


def subparser(module, command) -> argparse.ArgumentParser:
    (commands,) = (a for a in module.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


@pytest.mark.parametrize(("module", "command"), PARSERS, ids=lambda value: getattr(value, "__name__", value))
def test_help_is_grouped_and_explains_every_flag(module, command, capsys):
    with pytest.raises(SystemExit) as left:
        module.main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert module.DESCRIPTIONS[command] in " ".join(shown.split())

    parser = subparser(module, command)
    headings = [group.title for group in parser._action_groups if group.title and group._group_actions]
    assert len(headings) >= (2 if command == "check" else 3)
    assert all(f"\n{heading}:\n" in shown for heading in headings)
    ungrouped = [a for a in parser._optionals._group_actions if a.help is not argparse.SUPPRESS]
    assert [a.dest for a in ungrouped] == ["help"]
    for action in (a for a in parser._actions if a.help is not argparse.SUPPRESS):
        assert len(action.help or "") > 5, action.dest
        assert action.option_strings[0] in shown


def test_help_shows_the_defaults_of_its_command_and_the_presets_that_differ():
    shown = {
        command: {action.dest: action.help for action in subparser(train, command)._actions}
        for command in ("pretrain", "finetune", "linear")
    }
    assert shown["pretrain"]["epochs"].endswith("(at least 1; default: 200; demo: 80)")
    assert shown["finetune"]["epochs"].endswith("(at least 1; default: 10; demo: 40)")
    assert shown["linear"]["lr"].endswith("(above 0; default: 5.0)")
    assert shown["pretrain"]["jitter_form"].endswith("(default: additive; demo: multiplicative)")


@pytest.mark.parametrize("command", ["pretrain", "finetune", "linear"])
def test_every_setting_has_a_flag(command):
    flags = {action.dest for action in subparser(train, command)._actions}
    missing = set(flat(make_config(command, {}))) - flags
    assert not missing


@pytest.mark.parametrize(("module", "command"), [(train, None), (evaluation, None)])
def test_help_without_a_subcommand_lists_them_all(module, command, capsys):
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", shown, re.MULTILINE) for name in module.DESCRIPTIONS)


def test_no_subcommand_means_pretrain_also_after_the_flag_of_the_launcher():
    assert train.parse([])["command"] == "pretrain"
    assert train.parse(["--epochs", "3"])["command"] == "pretrain"
    assert train.parse(["--local_rank=0", "--epochs", "3"])["epochs"] == 3
    assert train.parse(["--local_rank=1", "finetune", "--epochs", "3"])["command"] == "finetune"


def test_flags_that_are_not_given_are_absent_and_lists_take_several_values():
    absent = {name for name in flat(make_config("linear", {})) if name in train.parse(["linear"])}
    assert not absent
    assert train.parse(["--milestones", "3", "5"])["milestones"] == [3, 5]
    assert train.parse(["--milestones"])["milestones"] == []
    assert train.parse(["--resume"])["resume"] == ""
    assert train.parse(["--resume", "x"])["resume"] == "x"


@pytest.mark.parametrize(
    "flag", ["--deterministic", "--allow-outside", "--static-pairs", "--dynamic-pairs", "--activation-maps"]
)
def test_a_yes_no_option_is_two_flags_without_a_value(flag):
    name, negated = flag[2:].replace("-", "_"), "--no-" + flag[2:]
    assert train.parse(["pretrain", flag])[name] is True
    assert train.parse(["pretrain", negated])[name] is False
    for given, message in (([flag, "no"], "unrecognized arguments: no"), ([f"{flag}=no"], "ignored explicit argument")):
        with pytest.raises(UserError, match=message) as caught:
            train.main(["pretrain", *given])
        assert "\n" not in str(caught.value)


def test_the_deepspeed_configuration_has_both_spellings():
    assert train.parse(["--ds_config", "a.json"])["ds_config"] == "a.json"
    assert train.parse(["--ds-config", "a.json"])["ds_config"] == "a.json"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (train, ["--epoch", "3"], "unrecognized arguments: --epoch 3"),  # an abbreviation would change meaning later
        (train, ["finetune", "--queue-length", "8"], "unrecognized arguments: --queue-length 8"),
        (train, ["--epochs", "few"], "argument --epochs: invalid int value: 'few'"),
        (
            train,
            ["--preset", "ucf"],
            "argument --preset: invalid choice: 'ucf' (choose from demo, ucf101, kinetics400, videomoco)",
        ),
        (train, ["--backbone", "vit"], "--backbone is vit, but must be r2plus1d_10, "),
        (train, ["pretrian"], "invalid choice: 'pretrian' (choose from pretrain, finetune, linear, check, pack)"),
        (evaluation, ["accuracy"], "the following arguments are required: --checkpoint"),
        (evaluation, ["--checkpoint", "x"], "accuracy, retrieval"),
        (
            evaluation,
            [],
            "arguments are required: {accuracy,retrieval,bias,maps,features,search,predict,export,report}",
        ),
        (evaluation, ["accuracy", "--check", "x"], "--checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_that_names_it(module, arguments, message):
    with pytest.raises(UserError) as caught:
        module.main(arguments)
    assert message in str(caught.value).replace("from '", "from ").replace("', '", ", ").replace("')", ")")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["pretrain", "finetune", "linear"])
def test_each_flag_says_when_to_change_it(command):
    silent = [
        f.name for group in configuration.groups(command).values() for f in dataclasses.fields(group)
        if not re.search(r"change|raise|lower|turn|published|default|without it|try", f.metadata["help"].lower())
    ]  # fmt: skip
    assert not silent


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "simclr"}, "--method is simclr, but must be dclr, moco"),
        ({"static_pairs": False, "dynamic_pairs": False}, "use --method moco"),
        ({"activation_maps": "perhaps"}, "--activation-maps is perhaps, but must be True or False"),
        ({"repel_weight": 1.0, "static_pairs": False}, "it needs --static-pairs and --dynamic-pairs"),
        ({"method": "moco", "mined_positives": 5}, "--mined-positives has no effect with --method moco"),
        ({"method": "moco", "boundary": "wrap"}, "--boundary has no effect with --method moco"),
        ({"method": "moco", "key_encoder_views": "all"}, "no effect with --method moco, which has neither static"),
        (
            {"method": "dclr-simclr", "key_encoder_views": "all"},
            "--key-encoder-views has no effect with --method dclr-",
        ),
        ({"key_encoder_views": "three"}, "--key-encoder-views is three, but must be auxiliary or all"),
        ({"method": "videomoco", "symmetric_loss": True}, "--symmetric-loss has no effect with --method videomoco"),
        ({"method": "dclr-simclr", "symmetric_loss": True}, "--symmetric-loss has no effect with --method dclr-simclr"),
        (
            {"symmetric_loss": True, "queue_length": 79, "batch_size": 40},
            "--queue-length is 79, but must be at least twice --batch-size (80): --symmetric-loss writes two keys",
        ),
        ({"jitter": 2.1}, "--jitter is 2.1, but must be from 0 to 2"),
        ({"jitter": float("nan")}, "--jitter is nan"),
        ({"jitter_form": "added"}, "--jitter-form is added, but must be multiplicative or additive"),
        (
            {"jitter": 0.0, "jitter_form": "additive"},
            "--jitter-form has no effect with --jitter 0.0: leave the flag out",
        ),
    ],
    ids=str,
)
def test_impossible_settings_of_a_method_are_refused(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve("pretrain", "ucf101", flags)


def test_the_auxiliary_views_of_a_method():
    def auxiliary_views(**flags):
        return resolve("pretrain", "ucf101", flags).method.auxiliary_views

    assert auxiliary_views() == ("static", "dynamic")
    assert auxiliary_views(static_pairs=False) == ("dynamic",)
    assert auxiliary_views(dynamic_pairs=False) == ("static",)
    assert auxiliary_views(method="moco") == ()


# ---------------------------------------------------------------- --config FILE


def settings_of(*arguments):
    """Return (flat settings, preset) that train.py makes of a command line."""
    flags = train.parse([str(argument) for argument in arguments])
    config, preset, _ = train.resolve(flags.pop("command"), flags)
    return flat(config), preset


@pytest.fixture
def toml(tmp_path):
    def write(*lines: str):
        path = tmp_path / "settings.toml"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["epochs = 3", "milestones = [1, 2]", "static-pairs = false", "lr = 1"], id="as flags"),
        pytest.param(
            ["static_pairs = false", "[optim]", "epochs = 3", "milestones = [1, 2]", "lr = 1"], id="one table"
        ),
        pytest.param(
            ["[method]", "static_pairs = false", "[optim]", "epochs = 3", "milestones = [1, 2]", "lr = 1"], id="tables"
        ),
    ],
)
def test_a_toml_file_overrides_the_preset_that_it_names_and_flags_override_the_file(toml, lines):
    file = toml('preset = "demo"', 'command = "pretrain"', *lines)
    found, preset = settings_of("pretrain", "--config", file, "--epochs", "4", "--seed", "5")
    assert preset == "demo"
    of_file = {"milestones": (1, 2), "static_pairs": False, "lr": 1}
    assert found == {**flat(resolve("pretrain", "demo", {})), **of_file, "epochs": 4, "seed": 5}


def test_the_preset_of_a_file_that_names_none_depends_on_its_data(toml):
    assert settings_of("--config", toml("epochs = 3"))[1] == "demo"
    assert settings_of("--config", toml("epochs = 3"), "--data", "x")[1] == "ucf101"
    found, preset = settings_of("finetune", "--config", toml("epochs = 3", 'data = "x"'))
    assert (found["data"], found["epochs"], found["lr"], preset) == ("x", 3, 0.1, "ucf101")


def test_a_runs_configuration_repeats_the_run_in_another_folder(tmp_path):
    run = resolve(
        "finetune", "demo", {"out": "runs/a", "allow_outside": True, "data": "x", "epochs": 3, "lr": 0.5, "seed": 9}
    )
    write_config(tmp_path / "config.json", "finetune", "demo", run)
    found, preset = settings_of("finetune", "--config", tmp_path / "config.json", "--lr", "0.25")
    assert preset == "demo"
    assert found == {**flat(run), "out": "", "allow_outside": False, "lr": 0.25}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["epoch = 3"], "--config {file}: pretrain has no setting named epoch"),
        (["dropout = 0.5"], "--config {file}: pretrain has no setting named dropout"),
        (
            ["[optimizer]", "lr = 1.0"],
            "--config {file}: no table is named [optimizer]; the tables are run, data, model",
        ),
        (["lr = 1.0", "[optim]", "lr = 2.0"], "--config {file}: lr is given twice"),
        (["epochs = '3'"], "{file}: epochs is '3', but must be a whole number below 2 ** 31"),
        (["epochs = 3.0"], "{file}: epochs is 3.0, but must be a whole number below 2 ** 31"),
        (["epochs = 2147483648"], "{file}: epochs is 2147483648, but must be a whole number below 2 ** 31"),
        (
            ["epochs = 0x" + 5000 * "f"],
            "{file}: epochs is a value of type int that cannot be printed, but must be a whole number",
        ),
        (["split = 'all'"], "{file}: split is 'all', which only the flag takes: leave it out, and give --split all"),
        (["preset = 3"], "--config {file}: preset is 3, but must be a text"),
        (["lr = true"], "{file}: lr is True, but must be a number"),
        (["lr = 1979-05-27"], "{file}: lr is datetime.date(1979, 5, 27), but must be a number"),
        (["data = 3"], "{file}: data is 3, but must be a text"),
        (["milestones = 3"], "{file}: milestones is 3, but must be a list of whole numbers"),
        (["static-pairs = 'no'"], "{file}: static_pairs is 'no', but must be true or false"),
        (["static-pairs = 0"], "{file}: static_pairs is 0, but must be true or false"),
        (["optim = 3"], "--config {file}: pretrain has no setting named optim"),
        (["lr = nan"], "--lr is nan, but must be above 0"),
        (["lr = -1"], "--lr is -1, but must be above 0"),
        (["preset = 'ucf'"], "--preset is ucf, but must be one of demo, ucf101, kinetics400, videomoco"),
        (["preset = []"], "--config {file}: preset is [], but must be a text"),
        (
            ["command = 'linear'"],
            "--config {file} is for linear, but the command is pretrain: run linear, or give another file",
        ),
        (["epochs"], "--config {file} is not a TOML file: Expected '=' after a key"),
        (["a=" + "[" * 100_000], "--config {file} is not a TOML file: "),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_a_wrong_file_is_refused_in_one_line(toml, lines, message):
    file = toml(*lines)
    with pytest.raises(UserError) as caught:
        settings_of("--config", file)
    assert str(caught.value).startswith(message.format(file=file))
    assert str(caught.value).isprintable()


def test_other_files_and_a_file_with_a_preset_are_refused(toml, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(UserError) as caught:
            settings_of(*arguments)
        return str(caught.value)

    gone = tmp_path / "gone.toml"
    assert refused("--config", gone) == (
        f"--config {gone}: No such file or directory; give a TOML file or a run's config.json"
    )
    assert refused("--config", tmp_path).startswith(f"--config {tmp_path}: Is a directory; give a TOML file")
    (tmp_path / "config.json").write_text("{}")
    assert "config.json: not the configuration of a run" in refused("--config", tmp_path / "config.json")
    write_config(tmp_path / "config.json", "linear", "demo", make_config("linear", {}))
    assert "config.json is for linear, but the command is pretrain" in refused("--config", tmp_path / "config.json")
    (tmp_path / "binary.toml").write_bytes(b"\x80\x00\xff")
    assert refused("--config", tmp_path / "binary.toml").startswith(
        f"--config {tmp_path / 'binary.toml'} is not a TOML"
    )

    file = toml("epochs = 3")
    assert refused("--config", file, "--preset", "demo") == (
        f'--preset cannot be used with --config: write  preset = "demo"  into {file}'
    )
    assert train.run(["--config", str(gone)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def begun(tmp_path):
    """Return a function that writes the run that a command line begins, as far as `--resume auto` looks for it."""

    def begin(*arguments):
        settings, preset = settings_of(*arguments)
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "step-00000004.safetensors").touch()
        write_config(run / "config.json", "pretrain", preset, make_config("pretrain", settings))
        return settings, preset

    return begin


@pytest.mark.parametrize("more", [[], ["--schedule", "cosine"], ["--width", "16"]], ids=" ".join)
def test_one_command_with_a_file_begins_a_run_and_continues_it(more, toml, begun, tmp_path):
    lines = [
        f"out = '{tmp_path / 'run'}'",
        "width = 8",
        "lr = 1",
        "epochs = 9",
        "milestones = [7]",
        "queue_length = 512",
    ]
    command = ["--config", toml("preset = 'demo'", *lines), "--resume", "auto", *more]
    started = begun(*command)
    assert settings_of(*command) == started
    # A setting that may change when a run is resumed.
    toml("preset = 'demo'", *lines[:3], "epochs = 12", *lines[4:])
    assert settings_of(*command) == ({**started[0], "epochs": 12}, "demo")
    assert settings_of(*command, "--epochs", "13") == ({**started[0], "epochs": 13}, "demo")


@pytest.mark.parametrize("by_file", [False, True])
def test_a_run_keeps_the_number_that_it_has_chosen_for_fill_steps(by_file, toml, begun, tmp_path):
    started, preset = begun("--preset", "demo", "--out", tmp_path / "run", "--fill-steps", "48")
    command = ["--preset", "demo", "--fill-steps", "-1"]
    if by_file:
        command = ["--config", toml("preset = 'demo'", "fill_steps = -1")]
    command += ["--out", tmp_path / "run", "--resume", "auto"]
    assert settings_of(*command) == (started, preset)
    assert settings_of(*command, "--epochs", "99") == ({**started, "epochs": 99}, preset)


def test_a_run_is_continued_with_its_own_config_json(begun, tmp_path):
    started = begun("--preset", "demo", "--out", tmp_path / "run", "--seed", "3")
    assert settings_of("--config", tmp_path / "run" / "config.json", "--resume", tmp_path / "run") == started


def test_a_run_is_not_continued_with_a_file_of_another_run(toml, begun, tmp_path):
    run = tmp_path / "run"
    begun("--preset", "demo", "--out", run)
    for line, flag, value, has in (
        ("width = 8", "--width", 8, 16),
        ("preset = 'ucf101'", "--preset", "ucf101", "demo"),
    ):
        file = toml("epochs = 90", line)
        with pytest.raises(UserError, match=rf"^{flag} is {value} in {file}, but the run in {run} has {has}: leave "):
            settings_of("--config", file, "--resume", "auto", "--out", run)


def test_eval_takes_clips_and_network_from_a_file(toml, tmp_path):
    def settings(*arguments):
        flags = vars(evaluation.make_parser().parse_args(["retrieval", "--checkpoint", "x", *map(str, arguments)]))
        return evaluation.settings_of(tmp_path / "backbone.safetensors", {k: flags[k] for k in flags.keys() - {"out"}})

    demo = PRESETS["demo"]["pretrain"]
    file = toml('preset = "demo"', "[data]", "clip_length = 24", "[model]", "width = 8")
    found = settings("--config", file, "--width", "32")
    assert (found["clip_length"], found["crop_size"], found["width"]) == (24, demo["crop_size"], 32)
    # Settings in the folder of the checkpoint come before the file.
    write_config(tmp_path / "config.json", "pretrain", "demo", make_config("pretrain", {"data": "x", "split": 2}))
    with pytest.raises(UserError, match=r"^--data is needed"):
        settings("--config", file)
    found = settings("--config", file, "--data", "y")
    assert (found["data"], found["split"], found["clip_length"], found["crop_size"]) == ("y", 2, 24, 112)
    with pytest.raises(UserError, match=r"preset cannot be used with --config"):
        settings("--config", file, "--preset", "demo")
    with pytest.raises(UserError, match=r"no command has a setting named epoch$"):
        settings("--config", toml("epoch = 3"))
    with pytest.raises(UserError, match=r"preset is ucf, but must be one of demo, ucf101, kinetics400, videomoco$"):
        settings("--config", toml("preset = 'ucf'"))
