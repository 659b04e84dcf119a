"""Configuration: YAML files and command line merged into one typed, documented schema."""

from hsft.config.loader import load_config, parse_command_line
from hsft.config.schema import Config

__all__ = ["Config", "load_config", "parse_command_line"]
