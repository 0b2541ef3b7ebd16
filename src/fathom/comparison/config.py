"""What is compared, and with what budget (``params:comparison``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fathom.tuning import Range, TuningConfig

Space = dict[str, Range]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SlicesConfig(_Frozen):
    """How the slices that test the claims are cut; see `fathom.comparison.slices`.

    Args:
        head_share: the head is the fewest items that make up so much of the training exposures.
        exception_min_count: a value of a cross is an exception only if training has it so often,
        exception_z: its rate is so many standard errors from the expected one,
        exception_odds: and its odds differ by at least this factor.
    """

    head_share: float = Field(default=0.5, gt=0, lt=1)
    exception_min_count: int = Field(default=20, ge=1)
    exception_z: float = Field(default=3.0, gt=0)
    exception_odds: float = Field(default=2.0, ge=1)


class ComparisonConfig(_Frozen):
    """What is compared, and with what budget (``params:comparison``).

    Args:
        models: name in `fathom.models.family.MODELS` → the settings that are searched for it, as
            in ``params:tuning``; null takes out a model that another environment declares.
        reference: the model that the others are compared with.
        trials: trainings of each model's search, on the validation window.
        tuning_seed: of the draws of every search.
        seeds: each model's best settings are trained once with each.
        epochs: the most of every training; null for that of ``training``.
        ladder: widths of the hidden layers at which joint training and the ensemble are compared;
            those that tuning chose for either are added. None at all if it is empty.
        resamples: of the users, for intervals; in place of that of ``evaluation``.
        slices: how they are cut.
    """

    models: dict[str, Space] = Field(min_length=1)
    reference: str = "wide_deep"
    trials: int = Field(default=4, ge=1)
    tuning_seed: int = Field(default=0, ge=0)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=2)
    epochs: int | None = Field(default=None, ge=1)
    ladder: list[list[int]] = Field(default=[])
    resamples: int = Field(default=300, ge=20, le=100_000)
    slices: SlicesConfig = SlicesConfig()

    @field_validator("models", mode="before")
    @classmethod
    def _sound(cls, models: Any) -> Any:
        """Read each space as tuning does, and name the faults of all models together."""
        if not isinstance(models, Mapping):
            return models
        spaces: dict[str, Space] = {}
        faults: list[str] = []
        for name, space in models.items():
            if space is None:
                continue
            try:
                spaces[name] = TuningConfig.model_validate({"space": space}).space
            except ValidationError as error:
                faults += [f"{name}: {fault['msg']}" for fault in error.errors()]
        if faults:
            raise ValueError("; ".join(faults))
        return spaces

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = []
        if self.reference not in self.models:
            there = ", ".join(self.models)
            faults.append(f"reference is {self.reference!r}; it must be one of models: {there}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            faults.append(f"seeds are {self.seeds}; they must differ and be 0 or more")
        if any(width < 1 for widths in self.ladder for width in widths):
            faults.append(f"ladder is {self.ladder}; it must be lists of layer widths of 1 or more")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def tuning(self, model: str) -> TuningConfig:
        """A model's search; its budget is that of all others."""
        return TuningConfig(trials=self.trials, seed=self.tuning_seed, space=self.models[model])
