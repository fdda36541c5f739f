"""Adam, or an optimizer of the user's, with its state beside the parameters or in host memory; and loss scaling for float16.

Both places take the same steps. Adam's fused form holds no temporary copies of the gradients. The smallest number of float16 is
6e-8, and gradients of single frames are smaller (Micikevicius et al. 2018, arXiv 1710.03740).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.lr_scheduler import LRScheduler

from layerwise.errors import ConfigError
from layerwise.memory.meter import uncounted

State = dict[str, torch.Tensor]
"""The optimizer's tensors of one parameter, by their names."""


Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True, slots=True)
class Optimization:
    """An optimizer and a schedule of the user's, by the functions that make them anew for each stage."""

    make: Make
    schedule: Schedule | None = None
    identity: str = ""
    """What it does: the kind, its settings, and the learning rate of each epoch; empty for Adam as the options say."""
    warmup_steps: int = 0
    """First steps, over which the learning rate rises evenly."""
    cosine: bool = False
    """Whether the learning rate falls to 0 from the first step to the last, as half a cosine (Loshchilov and Hutter 2017, arXiv
    1608.03983, equation 5, without restarts)."""

    @classmethod
    def of(cls, make: Make, schedule: Schedule | None, max_epochs: int) -> "Optimization":
        """make: parameters to optimizer; schedule: optimizer to scheduler, stepped once an epoch.

        Raises ConfigError where they do not make such, or the optimizer needs more than gradients for a step.
        """
        parameter = nn.Parameter(torch.ones(2, 2))
        try:
            tried = make([parameter])
            scheduler = schedule(tried) if schedule and isinstance(tried, torch.optim.Optimizer) else None
            if not isinstance(tried, torch.optim.Optimizer) or not isinstance(scheduler, LRScheduler | None):
                raise TypeError(f"they give {type(tried).__name__} and {type(scheduler).__name__}")
            specs = []
            for _ in range(max_epochs if scheduler else 1):
                specs.append([_plain(group) for group in tried.param_groups])
                if scheduler:
                    _step_unwarned(scheduler)
            parameter.grad = torch.ones_like(parameter)
            tried.step()
            _state_of(tried, {"tried": parameter}, scheduled=set())
        except Exception as error:
            raise ConfigError(
                f"The optimizer or its schedule cannot be used ({type(error).__name__}: {error}); let them give a "
                "torch.optim.Optimizer that steps by gradients alone, and a scheduler of torch.optim.lr_scheduler that needs "
                "no metric and lasts max_epochs."
            ) from error
        kind = f"{type(tried).__module__}.{type(tried).__qualname__}"
        of_schedule = type(scheduler).__qualname__ if scheduler else None
        return cls(make, schedule, f"{kind} {of_schedule} {specs}")


def _plain(group: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((name, repr(value)) for name, value in group.items() if name != "params")


def adam(lr: float, eps: float, warmup_steps: int = 0, cosine: bool = False, weight_decay: float = 0.0) -> Optimization:
    """Adam in its fused form, with the state that it would make itself at its first step: so a step never asks for memory.

    weight_decay: apart from the gradients, as in AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).
    """

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    return Optimization(make, warmup_steps=warmup_steps, cosine=cosine)


class Optimizer:
    """Steps some parameters, by name, and can be saved. Its state lies beside the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], how: Optimization) -> None:
        self.parameters = dict(parameters)
        self._optimizer = how.make(list(self.parameters.values()))
        self._scheduler = how.schedule(self._optimizer) if how.schedule else None
        self._how = how
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    def step(self) -> None:
        """Takes a step, and the gradients off the device."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, State]:
        """Parameter name to state."""
        return _state_of(self._optimizer, self.parameters, scheduled={"lr"} if self._scheduler else set())

    def load(self, state: Mapping[str, State]) -> None:
        """Takes over a state: tensors on the host."""
        with torch.no_grad():
            for name, values in state.items():
                parameter = self.parameters[name]
                for written, value in values.items():
                    key, _, kind = written.partition(SEPARATOR)
                    if key.startswith(GROUP):
                        number, _, key = key.removeprefix(GROUP).partition(".")
                        self._optimizer.param_groups[int(number)][key] = KINDS[kind](value.item())
                    elif kind == ON_HOST:
                        self._optimizer.state[parameter][key] = value.clone()
                    elif kind:
                        self._optimizer.state[parameter][key] = KINDS[kind](value.item())
                    elif key in self._optimizer.state[parameter]:
                        self._optimizer.state[parameter][key].copy_(value)  # two sets of moments may not fit
                    else:
                        self._optimizer.state[parameter][key] = value.to(parameter.device, copy=True)

    def begin_epoch(self, epoch: int) -> None:
        """Sets the learning rate of an epoch, from 0."""
        while self._scheduler is not None and self._scheduler.last_epoch < epoch:
            _step_unwarned(self._scheduler)

    def begin_step(self, number: int, steps: int) -> None:
        """Sets the learning rate of a step, from 0 and counted over all epochs, where it changes. steps: of all epochs."""
        if self._how.warmup_steps or self._how.cosine:
            part = min((number + 1) / max(self._how.warmup_steps, 1), 1)
            if self._how.cosine:
                part *= (1 + math.cos(math.pi * min(number / steps, 1))) / 2
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = part * rate

    def on_device(self) -> Iterable[torch.Tensor]:
        """The tensors of the state that lie on the device."""
        values = ((value, parameter) for parameter, state in self._optimizer.state.items() for value in state.values())
        return [v for v, parameter in values if isinstance(v, torch.Tensor) and v.device == parameter.device]


SEPARATOR, GROUP, ON_HOST = "|", "group-", "host"
KINDS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool}
"""What a checkpoint writes as tensors though it is none: its kind stands behind its name."""


def _state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], scheduled: set[str]
) -> dict[str, State]:
    """Everything that the next step depends on; what groups count for themselves stands with the first parameter.

    scheduled: values of groups that the schedule sets anew. Raises TypeError where something cannot be saved.
    """
    found: dict[str, State] = {name: {} for name in parameters}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                place = "" if value.device == parameter.device else f"{SEPARATOR}{ON_HOST}"
                found[name][f"{key}{place}"] = value
            elif value is not None:
                found[name] |= _written(key, value)
    first = next(iter(parameters))
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if type(value).__name__ in KINDS and key not in scheduled:
                found[first] |= _written(f"{GROUP}{number}.{key}", value)
    return found


def _written(key: str, value: Any) -> State:
    kind = type(value).__name__
    if kind not in KINDS:
        raise TypeError(f"its state {key} is a {kind}, which cannot be saved")
    return {f"{key}{SEPARATOR}{kind}": torch.tensor(value, dtype=torch.float64 if kind == "float" else torch.int64)}


def _step_unwarned(scheduler: LRScheduler) -> None:
    """A resume steps it before the optimizer, which torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step()


class HostOptimizer(Optimizer):
    """Steps parameters that lie in host memory, where their state lies too."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], how: Optimization) -> None:
        with uncounted():
            super().__init__(parameters, how)

    def step(self) -> None:
        """Takes a step, and lets go of the gradients."""
        with uncounted():
            super().step()

    def load(self, state: Mapping[str, State]) -> None:
        with uncounted():
            super().load(state)

    def on_device(self) -> Iterable[torch.Tensor]:
        """None of it."""
        return []


FIRST_SCALE = 2.0**16
STEPS_UNTIL_DOUBLED = 2000


@dataclass(slots=True)
class LossScale:
    """The factor, which halves after a step that overflowed and doubles after many that did not; 1 where none is needed."""

    factor: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        return cls(FIRST_SCALE if precision == "float16" else 1.0)

    def unscale(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Divides the gradients by the factor. False where one overflowed: the step must be left out."""
        if self.factor == 1:
            return True
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # A rehearsal has no values to look at.
        if not isinstance(norm, FakeTensor) and not math.isfinite(norm.item()):
            self.factor, self.good_steps = max(self.factor / 2, 2.0), 0
            return False
        torch._foreach_div_(gradients, self.factor)
        self.good_steps += 1
        if self.good_steps == STEPS_UNTIL_DOUBLED:
            self.factor, self.good_steps = self.factor * 2, 0
        return True
