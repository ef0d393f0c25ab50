"""Runs research scripts: named configs, one command line, one folder that tells it all."""

from vegab.capture import filtered, terminal
from vegab.command_line import main, wrap, wrap_commands, wrap_no_config_registry
from vegab.config import ConfigRegistry, Key, config_from_folder
from vegab.exits import UsageError
from vegab.files import ROOT
from vegab.names import resolve
from vegab.plugins import (
    AutomaticNamer,
    MetaSaver,
    TensorBoardLinker,
    VegabPlugin,
    kwargs_namer,
    timestamp_namer,
)
from vegab.run_folder import read_run
