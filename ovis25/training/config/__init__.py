"""The training config: one flat JSON file, overridden on the command line."""

from ovis25.training.config.fields import KINDS, LENGTH_STRATEGIES, OWN_KEYS, TrainConfig
from ovis25.training.config.kinds import ConfigError
from ovis25.training.config.load import load_config, parse_overrides
from ovis25.training.config.trainer_keys import DEFAULTS, MUON, TRAINER_KEYS

__all__ = [
    "DEFAULTS",
    "KINDS",
    "LENGTH_STRATEGIES",
    "MUON",
    "OWN_KEYS",
    "TRAINER_KEYS",
    "ConfigError",
    "TrainConfig",
    "load_config",
    "parse_overrides",
]
