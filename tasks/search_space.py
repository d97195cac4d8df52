"""What a search is told: which fields of the recipe vary and how, by which sampler, within which budget. Pydantic only.

space:
  learning_rate: {low: 0.0003, high: 0.03, log: true}
  batch_size: {values: [32, 64, 128]}
  augmentation.shift: {low: 0, high: 0.15}
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.recipe import NOT_IDENTITY, TrainConfig

Scalar = bool | int | float | str | None

# They change nothing that a trial is judged by, or are no property of a model: a seed chosen by its figure is luck, kept.
_FIXED: Final = {"seed", "processes", "max_minutes", "minimum_accuracy", "minimum_balanced_accuracy", *NOT_IDENTITY}
_OWN_LOSS: Final = {"loss", "focal_gamma", "class_weights"}  # the validation loss of such trials is not one quantity
_MOST: Final = 10_000  # trials of any search
_USUAL: Final = 20  # trials of a search that is told neither a number nor a time
_CHECKED: Final = 4096  # combinations tried before any work; of more, as many drawn with a fixed seed


class Values(BaseModel):
    """One of these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Scalar, ...] = Field(min_length=1, max_length=100, description="What the field may be")

    @property
    def ends(self) -> tuple[Scalar, ...]:
        return self.values


class Range(BaseModel):
    """Anything from low to high, both included; whole numbers where the field takes only those."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float = Field(description="Smallest value")
    high: float = Field(description="Largest value")
    log: bool = Field(default=False, description="Even on a logarithmic scale: for rates, which matter by their ratio")
    step: float | None = Field(
        default=None, gt=0, description="Only low, low + step, ...; the sampler grid needs it, or a list of values"
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0, and no step")
        return self

    @property
    def ends(self) -> tuple[Scalar, ...]:
        return (self.low, self.high)


class Search(BaseModel):
    """A search for a better configuration; trials are judged on the validation split, and by nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    space: dict[str, Values | Range] = Field(
        min_length=1,
        max_length=30,
        description="Field of the recipe (learning_rate, augmentation.shift) -> what it may be",
    )
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe",
        description="Tree-structured Parzen estimator (Bergstra et al. 2011), chance, or every combination",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the sampler; trainings keep the seed of the recipe"
    )
    trials: int | None = Field(
        default=None,
        ge=1,
        le=_MOST,
        description="Trials, at most; empty: every combination of a grid, else as many as the minutes allow, without those 20",
    )
    minutes: float | None = Field(
        default=None, gt=0, le=20_160, description="Time of all trials, interruptions not counted; empty: no limit"
    )
    workers: int = Field(default=1, ge=1, le=64, description="Processes that run trials, each one at a time")
    epochs: int | None = Field(
        default=None,
        ge=1,
        le=500,
        description="Epochs of a trial; empty: as the recipe says. The best trains at full length",
    )
    metric: Literal["loss", "accuracy", "balanced_accuracy", "precision", "recall", "f1"] = Field(
        default="loss",
        description="What is best, on the validation split, at the epoch with the lowest validation loss",
    )
    pruning: Literal["median", "successive_halving", "none"] = Field(
        default="median", description="Ends trials early whose validation loss is behind at the same epoch"
    )
    pruning_after: int = Field(default=1, ge=1, le=100, description="Epochs before which no trial is ended")


def searchable() -> dict[str, Any]:
    """Dotted fields of the recipe that a search may vary -> their types."""
    return {name: kind for name, kind in _fields(TrainConfig) if _may_vary(name)}


def with_overrides(config: TrainConfig, overrides: Mapping[str, Scalar]) -> TrainConfig:
    """The configuration with dotted fields replaced, checked as a whole. ValueError names what is wrong."""
    told = config.model_dump()
    for name, value in overrides.items():
        *path, last = name.split(".")
        inner = told
        for key in path:
            inner = inner.get(key) if isinstance(inner, dict) else None  # type: ignore[assignment]
        if not isinstance(inner, dict) or last not in inner:
            raise ValueError(
                f"the recipe has no field {name!r}; it has {', '.join(name for name, _ in _fields(TrainConfig))}"
            )
        inner[last] = value
    try:
        return TrainConfig.model_validate(told)
    except ValidationError as error:
        told_so = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}".lstrip(": ") for each in error.errors())
        raise ValueError(f"{_named(overrides)} is no configuration: {told_so}") from error


def check_space(search: Search, config: TrainConfig) -> tuple[TrainConfig, ...]:
    """The configurations at the ends of the space. ValueError, before any work, for a field that is unknown or may not vary and
    for a value that no configuration can have.
    """
    known = searchable()
    for name, dimension in search.space.items():
        if name not in known:
            raise ValueError(f"a search cannot vary {name!r}; it can vary {', '.join(known)}")
        if isinstance(dimension, Range) and known[name] not in (int, float, float | None):
            raise ValueError(f"{name} is no number: give its values instead of a range")
        if known[name] is int and isinstance(dimension, Range) and not _is_whole(dimension):
            raise ValueError(f"{name} takes whole numbers: low, high and step must be such")
    if search.epochs is not None and "epochs" in search.space:
        raise ValueError("epochs vary in the space: leave the search's own epochs empty")
    own_loss = sorted(_OWN_LOSS & set(search.space))
    if own_loss and (search.metric == "loss" or search.pruning != "none"):
        raise ValueError(
            f"{', '.join(own_loss)} changes what the validation loss is: choose another metric, and no pruning"
        )
    if search.sampler == "grid":
        grid(search)
    return _valid_ends(search, config)


def budget_of(search: Search) -> int | None:
    """Trials, at most; None where the minutes alone end the search."""
    if search.sampler == "grid":
        return min(search.trials or _MOST, combinations(search))
    return search.trials or (None if search.minutes else _USUAL)


def left_out(search: Search) -> str:
    """What a budget leaves of a grid, to be told before any work; empty where nothing is left out."""
    if search.sampler != "grid" or budget_of(search) == (every := combinations(search)):
        return ""
    return f"the grid is tried in part, {search.trials} of {every} combinations: leave trials empty for all of them"


def combinations(search: Search) -> int:
    """How many the grid of the space has. ValueError for a range without steps, and for too many."""
    count = math.prod(len(_steps(name, dimension)) for name, dimension in search.space.items())
    if count > _MOST:
        raise ValueError(
            f"the grid has {count} combinations, at most {_MOST} can be tried: sample it by chance or by tpe"
        )
    return count


def grid(search: Search) -> list[dict[str, Scalar]]:
    """Every combination, in an order that the seed decides. Raises what `combinations` does."""
    combinations(search)
    choices = {name: _steps(name, dimension) for name, dimension in search.space.items()}
    every = [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
    random.Random(search.seed).shuffle(every)
    return every


def whole(name: str) -> bool:
    """Whether the field takes whole numbers only."""
    return searchable()[name] is int


def _valid_ends(search: Search, config: TrainConfig) -> tuple[TrainConfig, ...]:
    """Every listed value and both ends of every range must occur in a valid configuration; some combinations may be none
    (a network without pretrained weights, where others start from them).
    """
    ends = {
        name: tuple(int(end) if whole(name) and isinstance(end, float) else end for end in dimension.ends)
        for name, dimension in search.space.items()
    }
    found: list[TrainConfig] = []
    seen: set[tuple[str, int]] = set()
    why: dict[tuple[str, int], str] = {}
    for places in _some_places([len(each) for each in ends.values()]):
        used = set(zip(ends, places, strict=True))
        overrides = {name: ends[name][place] for name, place in zip(ends, places, strict=True)}
        try:
            found.append(with_overrides(config, overrides))
            seen |= used
        except ValueError as error:
            why |= {each: str(error) for each in used - why.keys()}
    for name, values in ends.items():
        for place in range(len(values)):
            if (name, place) not in seen and (name, place) in why:
                raise ValueError(f"space, {name}: {why[name, place]}")
    return tuple(found)


def _some_places(counts: list[int]) -> Iterator[tuple[int, ...]]:
    if math.prod(counts) <= _CHECKED:
        yield from itertools.product(*(range(count) for count in counts))
        return
    chance = random.Random(0)
    for _ in range(_CHECKED):
        yield tuple(chance.randrange(count) for count in counts)


def _steps(name: str, dimension: Values | Range) -> tuple[Scalar, ...]:
    if isinstance(dimension, Values):
        return dimension.values
    step = dimension.step or (1 if whole(name) and not dimension.log else None)
    if step is None:
        raise ValueError(f"the sampler grid cannot enumerate {name}: give it a step, or a list of values")
    values = [dimension.low + step * n for n in range(int((dimension.high - dimension.low) / step + 1e-9) + 1)]
    return tuple(int(value) if whole(name) else round(value, 12) for value in values)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _may_vary(name: str) -> bool:
    return name not in _FIXED and name != "defect_labels" and not name.startswith("threshold.")


def _is_whole(dimension: Range) -> bool:
    return all(value is None or value == int(value) for value in (dimension.low, dimension.high, dimension.step))


def _named(overrides: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{name}={value}" for name, value in overrides.items())
