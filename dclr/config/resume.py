"""What may change when a run is resumed."""

from pathlib import Path
from typing import Any

from dclr.config.options import flag_of, show
from dclr.config.settings import AUTOMATIC, FIELDS
from dclr.errors import UserError

# Settings that may change when a run is resumed. Any other change would alter the samples or the network.
FREE_ON_RESUME = {
    "data", "workers", "video_timeout", "max_bad", "max_missing",
    "ds_config", "kernels", "compile", "convolutions", "deterministic", "pad_channels", "recompute",
    "log_every", "checkpoint_every", "on_nonfinite",
    "knn_every", "test_every",
    "epochs", "lr", "schedule", "milestones", "warmup_epochs", "momentum", "weight_decay",
    "temperature", "negatives", "key_momentum", "mined_positives", "alignment_weight", "alignment", "repel_weight",
    "adversarial_from", "dropped_fill", "straight_through", "decay", "decay_rate",
    "dropout",
}  # fmt: skip


def check_resume(folder: Path, given: dict[str, Any], stored: dict[str, Any], file: str | None = None) -> None:
    """Raise UserError if a given setting contradicts a stored one that must not change for the run in `folder`.

    Args:
        file: where the settings were given: the file of --config, or None for flags.
    """
    where = f" in {file}" if file else ""
    for name, value in given.items():
        # A configuration of an earlier version lacks settings that were added since.
        then = stored.get(name, FIELDS[name].default)
        chosen = name == "fill_steps" and value == AUTOMATIC  # the run keeps the number that it has chosen
        if name not in FREE_ON_RESUME and value != then and not chosen:
            raise UserError(
                f"{flag_of(name)} is {show(value)}{where}, but the run in {folder} has {show(then)}: "
                f"leave the {'setting' if file else 'flag'} out, or start another run"
            )
