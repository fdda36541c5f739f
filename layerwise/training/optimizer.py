"""Adam, with its state beside the parameters or in host memory. Both take the same steps.

The fused form holds no temporary copies of the gradients.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn

from layerwise.memory.meter import uncounted

State = dict[str, torch.Tensor]
"""The optimizer's tensors of one parameter, by their names."""


class Stepping(Protocol):
    """What a step needs of an optimizer."""

    def step(self) -> None:
        """Takes a step, and the gradients off the device."""
        ...

    def on_device(self) -> Iterable[torch.Tensor]:
        """The tensors of the state that lie on the device."""
        ...


class Optimizer(Stepping, Protocol):
    """Steps some parameters, by name, and can be saved."""

    def state(self) -> dict[str, State]:
        """Parameter name to state."""
        ...

    def load(self, state: Mapping[str, State]) -> None:
        """Takes over a state: tensors on the host."""
        ...


class DeviceAdam:
    """State beside the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float, eps: float) -> None:
        self._parameters = dict(parameters)
        self._adam = torch.optim.Adam(self._parameters.values(), lr=lr, eps=eps, fused=True)
        for parameter in self._parameters.values():
            # As Adam itself would at its first step: made here, a step never asks for memory.
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self) -> None:
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, State]:
        return {name: dict(self._adam.state[parameter]) for name, parameter in self._parameters.items()}

    def load(self, state: Mapping[str, State]) -> None:
        # Into the tensors that are there: two sets of moments may not fit.
        with torch.no_grad():
            for name, tensors in state.items():
                for key, value in tensors.items():
                    self._adam.state[self._parameters[name]][key].copy_(value)

    def on_device(self) -> Iterable[torch.Tensor]:
        return [tensor for state in self._adam.state.values() for tensor in state.values()]


class HostAdam:
    """State and a second copy of the parameters in host memory; gradients go there, new values come back."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], lr: float, eps: float) -> None:
        self._parameters = dict(parameters)
        with uncounted():
            copies = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
            self._copies = {name: nn.Parameter(copy) for name, copy in copies.items()}
            self._adam = DeviceAdam(self._copies, lr, eps)

    def step(self) -> None:
        with torch.no_grad(), uncounted():
            for name, parameter in self._parameters.items():
                self._copies[name].grad = None if parameter.grad is None else parameter.grad.cpu()
                parameter.grad = None
            self._adam.step()
            for name, parameter in self._parameters.items():
                parameter.copy_(self._copies[name])

    def state(self) -> dict[str, State]:
        return self._adam.state()

    def load(self, state: Mapping[str, State]) -> None:
        """The parameters must have their values already: the copies take them over."""
        with torch.no_grad(), uncounted():
            self._adam.load(state)
            for name, parameter in self._parameters.items():
                self._copies[name].copy_(parameter)

    def on_device(self) -> Iterable[torch.Tensor]:
        return []
