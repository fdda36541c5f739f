"""Layer-to-layer streaming (L2L, Pudipeddi et al. 2020, arXiv 2002.05645; ZeRO-Infinity, Rajbhandari et al. 2021, arXiv
2104.07857): weights, gradients, Adam and what passes between the layers lie on the host, one layer is on the device.

A layer's weights come up once in the forward and once in the backward pass, and all samples go through it, one at a time.
Its gradients go down when all samples are through, and its Adam steps on the host."""

from collections.abc import Iterator

import torch
from blocked_infonce import OnDevice, OnHost, Scored, add_gradients
from host import Host
from torch import nn
from workloads import Workload

from layerwise.memory.meter import uncounted


class Streaming:
    """predictors_at_once: of the loss; together: how many layers are one unit, by default each is; inputs_first: whether
    the gradient of what a unit reads goes down before those of its weights are made. Where a unit is one product, that is no
    more work; of several it would be. contexts_on_host: where the loss takes them from, when the targets are others."""

    def __init__(
        self,
        workload: Workload,
        host: Host,
        predictors_at_once: int,
        together: tuple[int, ...] = (),
        inputs_first: bool = False,
        contexts_on_host: bool = False,
    ) -> None:
        self.workload, self.host = workload, host
        self.inputs_first, self.contexts_on_host = inputs_first, contexts_on_host
        self.layers = workload.layers(host)
        shapes = workload.shapes
        ends = [sum(together[: number + 1]) for number in range(len(together))] or [*range(1, len(shapes) + 1)]
        spans = zip([0, *ends[:-1]], ends, strict=True)
        self.units = [nn.Sequential(*self.layers[start:end]) for start, end in spans]
        self.passed = [workload.batch(host), *(host.empty(workload.batch_size, *shapes[end - 1]) for end in ends)]
        """What goes into each unit, and out of the last; in the backward pass its gradients take its place."""
        self.targets_below = self.layers[-1].recurrent
        """Whether the contexts predict the inputs of the last layer, as in CPC, rather than each other."""
        self.frames, contexts = shapes[-1]
        targets = shapes[-2] if self.targets_below else shapes[-1]
        self.grad_targets = host.empty(workload.batch_size, *targets) if self.targets_below else self.passed[-1]
        self.objective = workload.objective(host, targets[1], contexts)
        steps = len(self.objective.predictors)
        self.steps = [slice(start, start + predictors_at_once) for start in range(0, steps, predictors_at_once)]
        with uncounted():
            self.predictors = [nn.Parameter(self.objective.predictors.detach()[steps].clone()) for steps in self.steps]
        self.adams = [host.adam(unit.parameters(), workload.config) for unit in self.units]
        self.adams_of_predictors = [host.adam([predictors], workload.config) for predictors in self.predictors]

    def train(self, number: int) -> None:
        """Step `number`."""
        targets, contexts = self._forward()
        self._score(targets, contexts, number)
        del targets, contexts
        self._backward()

    def weights(self) -> list[list[torch.Tensor]]:
        """Of each layer, and of the predictors."""
        of_layers = [[parameter.detach() for parameter in layer.parameters()] for layer in self.layers]
        return [*of_layers, [torch.cat([predictors.detach() for predictors in self.predictors])]]

    @torch.no_grad()
    def _forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Targets and contexts (B, L, C), which stay on the device, or not; what the units read lies on the host."""
        host, last = self.host, len(self.units) - 1
        for index, unit in enumerate(self.units[:-1]):
            layer = host.up_module(unit)
            for rows in self._slices():
                host.down(layer(host.up(self.passed[index], rows)), self.passed[index + 1], rows)
            host.down_buffers(layer, unit)
            del layer
        layer = host.up_module(self.units[-1])
        shape = self.passed[-1].shape
        contexts = None if self.contexts_on_host else torch.empty(shape, device=host.device)
        targets = torch.empty(self.grad_targets.shape, device=host.device) if self.targets_below else contexts
        for rows in self._slices():
            x = host.up(self.passed[last], rows)
            if self.targets_below:
                targets[rows] = x
            if contexts is None:
                host.down(layer(x), self.passed[-1], rows)
            else:
                contexts[rows] = layer(x)
            del x
        host.down_buffers(layer, self.units[-1])
        return targets, contexts

    def _score(self, targets: torch.Tensor, contexts: torch.Tensor | None, number: int) -> None:
        """The gradients of targets and contexts go down to the host; the predictors step."""
        host, draw = self.host, self.workload.draw(self.objective, self.frames, number)
        scored = Scored.of(draw, host.device)
        grad_targets = torch.zeros_like(targets)
        if contexts is None:
            grad_contexts = host.build(lambda: torch.zeros_like(self.passed[-1]))
            access = host.build(lambda: OnHost.of(host, self.passed[-1], grad_contexts, draw))
        else:
            grad_contexts = torch.zeros_like(contexts) if self.targets_below else grad_targets
            access = OnDevice(contexts.flatten(0, 1), grad_contexts.flatten(0, 1), scored.contexts)
        for steps, predictors, adam in zip(self.steps, self.predictors, self.adams_of_predictors, strict=True):
            here = host.up(predictors)
            gradient = torch.zeros_like(here)
            add_gradients(
                targets.flatten(0, 1),
                access,
                here,
                scored,
                steps,
                grad_targets.flatten(0, 1),
                gradient,
                self.workload.loss_room,
            )
            del here
            host.step(adam, [gradient])
            del gradient
        if contexts is None:
            self.passed[-1] = grad_contexts
        else:
            host.down(grad_contexts, self.passed[-1])
        if self.targets_below:
            host.down(grad_targets, self.grad_targets)

    def _backward(self) -> None:
        """Every unit once more, from the top, and its step."""
        for index in reversed(range(len(self.units))):
            layer = self.host.up_module(self.units[index])
            last = index == len(self.units) - 1
            run_back = self._run_back_inputs_first if self.inputs_first and index > 0 and not last else self._run_back
            for rows in self._slices():
                run_back(layer, index, rows)
            self.host.step(self.adams[index], (parameter.grad for parameter in layer.parameters()))
            del layer

    def _run_back(self, layer: nn.Module, index: int, rows: slice) -> None:
        host = self.host
        x = host.up(self.passed[index], rows).requires_grad_(index > 0)
        y = layer(x)
        y.backward(host.up(self.passed[index + 1], rows))
        del y
        if index == len(self.units) - 1 and self.targets_below:
            x.grad += host.up(self.grad_targets, rows)
        if index > 0:
            host.down(x.grad, self.passed[index], rows)

    def _run_back_inputs_first(self, layer: nn.Module, index: int, rows: slice) -> None:
        host = self.host
        x = host.up(self.passed[index], rows).requires_grad_()
        y, gradient = layer(x), host.up(self.passed[index + 1], rows)
        host.down(*torch.autograd.grad(y, x, gradient, retain_graph=True), self.passed[index], rows)
        torch.autograd.backward(y, gradient, inputs=list(layer.parameters()))

    def _slices(self) -> Iterator[slice]:
        return self.host.slices(self.workload.batch_size, self.workload.at_once)
