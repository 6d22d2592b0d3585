"""Settings of a run: dataclasses with bounds, presets with the published recipes, flags and configuration files."""

from dclr.config.data_url import is_url
from dclr.config.files import PATHS, read_config, read_settings, write_config
from dclr.config.flags import Parser, add_flags
from dclr.config.options import as_flag, flag_of, show
from dclr.config.presets import DATA_PRESET, PRESETS
from dclr.config.resume import check_resume
from dclr.config.settings import (
    ALL,
    AUTOMATIC,
    COMMANDS,
    FIELDS,
    Config,
    DataConfig,
    FinetuneConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    TransferConfig,
    groups,
)
from dclr.config.sources import flat, make_config, resolve

__all__ = [
    "ALL",
    "AUTOMATIC",
    "COMMANDS",
    "DATA_PRESET",
    "FIELDS",
    "PATHS",
    "PRESETS",
    "Config",
    "DataConfig",
    "FinetuneConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "Parser",
    "PretrainConfig",
    "RunConfig",
    "TransferConfig",
    "add_flags",
    "as_flag",
    "check_resume",
    "flag_of",
    "flat",
    "groups",
    "is_url",
    "make_config",
    "read_config",
    "read_settings",
    "resolve",
    "show",
    "write_config",
]
