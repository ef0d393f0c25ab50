"""A runner for research scripts: named configs, one command line, one folder that tells it all."""

from vegab.capture import filtered as filtered
from vegab.capture import terminal as terminal
from vegab.command_line import main as main
from vegab.command_line import wrap as wrap
from vegab.command_line import wrap_commands as wrap_commands
from vegab.command_line import wrap_no_config_registry as wrap_no_config_registry
from vegab.config import ConfigRegistry as ConfigRegistry
from vegab.config import Key as Key
from vegab.config import config_from_folder as config_from_folder
from vegab.exits import UsageError as UsageError
from vegab.files import ROOT as ROOT
from vegab.names import resolve as resolve
from vegab.plugins import AutomaticNamer as AutomaticNamer
from vegab.plugins import MetaSaver as MetaSaver
from vegab.plugins import TensorBoardLinker as TensorBoardLinker
from vegab.plugins import VegabPlugin as VegabPlugin
from vegab.plugins import kwargs_namer as kwargs_namer
from vegab.plugins import timestamp_namer as timestamp_namer
from vegab.run_folder import read_run as read_run
