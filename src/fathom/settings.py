"""Kedro's settings: how configuration is found and merged."""

import atexit
import os
import sys
import warnings
from pathlib import Path

from kedro.config import OmegaConfigLoader

from fathom.hooks import RunSummary


def _quiet_teardown() -> None:
    """Close stderr as the last thing of all.

    With torch in the process, DuckDB's bindings list their own constants as leaks when the
    interpreter is gone: 80 lines behind the closing table that say nothing about the run.
    """
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


atexit.register(_quiet_teardown)  # callbacks run last in, first out

# Nothing is sent anywhere, and BentoML keeps its store inside the project, however Kedro is called.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("BENTOML_HOME", str(Path.cwd() / "data" / "06_models" / "bentoml"))

# Kedro 1.7 calls what OmegaConf 2.4 deprecates: two long warnings at the top of every run.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")

CONF_SOURCE = "conf"

CONFIG_LOADER_CLASS = OmegaConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # An environment names only what it changes: without this, one key of `training` in
    # conf/<env> would drop all the others of conf/base.
    "merge_strategy": {"parameters": "soft"},
}

HOOKS = (RunSummary(),)
