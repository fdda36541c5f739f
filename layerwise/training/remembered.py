"""Predictions are asked for again and again, and kept for as long as the stage lives that they are made of."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from layerwise.config import Config
from layerwise.training.plan import StagePlan

P = ParamSpec("P")
T = TypeVar("T")


def remembered(
    predict: Callable[Concatenate[Config, StagePlan, P], T],
) -> Callable[Concatenate[Config, StagePlan, P], T]:
    """`predict`, which works out every answer once; its other arguments must be hashable."""
    answers: WeakKeyDictionary[StagePlan, dict[Any, T]] = WeakKeyDictionary()

    @wraps(predict)
    def ask(config: Config, plan: StagePlan, /, *rest: P.args, **none: P.kwargs) -> T:
        known, key = answers.setdefault(plan, {}), (config, *rest)
        if key not in known:
            known[key] = predict(config, plan, *rest, **none)
        return known[key]

    return ask
