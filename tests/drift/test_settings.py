"""The settings of monitoring: conf states each, and bounds hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from fathom.drift import MonitoringConfig

CONF = Path(__file__).parents[2] / "conf" / "base" / "parameters_monitoring.yml"


def test_conf_states_the_defaults() -> None:
    stated = yaml.safe_load(CONF.read_text())["monitoring"]
    assert MonitoringConfig.model_validate(stated) == MonitoringConfig()
    assert set(stated) == set(MonitoringConfig.model_fields)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("numeric_threshold", 0.0, "greater than 0"),
        ("numeric_method", "ks", "'psi' or 'jensenshannon'"),
        ("thresholds", {"price": -1.0}, "greater than 0"),
        ("draws", 19, "greater than or equal to 20"),
        ("confidence", 1.0, "less than 1"),
        ("min_loss", 0.0, "greater than 0"),
        ("persistence", 0, "greater than or equal to 1"),
        ("cool_down", -1, "greater than or equal to 0"),
        ("unit_factor", 1.0, "greater than 1"),
        ("min_rows", "many", "valid integer"),
        ("colour", 1, "Extra inputs"),
    ],
)
def test_a_bad_setting_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MonitoringConfig.model_validate({key: value})
