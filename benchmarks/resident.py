"""Ways to train with the whole network on the device: plain, checkpointed, Adam inside the backward pass, and exact
micro-batches (GradCache; Gao et al. 2021, arXiv 2101.06983)."""

from collections.abc import Callable

import torch
from blocked_infonce import OnDevice, Scored, add_gradients
from host import Host
from plain_infonce import plain_infonce
from torch import nn
from torch.utils.checkpoint import checkpoint
from workloads import Workload


class Resident:
    """Layers and predictors on the device, and a batch on the host."""

    def __init__(self, workload: Workload, host: Host, recompute: bool) -> None:
        self.workload, self.host, self.recompute = workload, host, recompute
        self.on_host = workload.layers(host)
        self.layers = [host.up_module(layer) for layer in self.on_host]
        self.batch = workload.batch(host)
        *_, below, (self.frames, contexts) = [(0, 0), (0, 0), *workload.shapes]
        self.channels = below[1] if self.targets_below else contexts
        self.objective = workload.objective(host, self.channels, contexts)
        self.predictors = nn.Parameter(host.up(self.objective.predictors))

    @property
    def targets_below(self) -> bool:
        """Whether the contexts predict the inputs of the last layer, as in CPC, rather than each other."""
        return self.on_host[-1].recurrent

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (B, L, *frame) to targets (B, L', C) and contexts (B, L', D)."""
        targets = x
        for layer in self.layers:
            targets = x
            contexts = self.host.checkpoint_contexts
            x = checkpoint(layer, x, use_reentrant=False, context_fn=contexts) if self.recompute else layer(x)
        return (targets if self.targets_below else x), x

    def parameters(self) -> list[nn.Parameter]:
        """Of the layers, on the device."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def weights(self) -> list[list[torch.Tensor]]:
        """Of each layer, and of the predictors."""
        return [[parameter.detach() for parameter in layer.parameters()] for layer in self.layers] + [
            [self.predictors.detach()]
        ]


class Plain(Resident):
    """Forward, loss, backward, Adam."""

    def __init__(self, workload: Workload, host: Host, recompute: bool) -> None:
        super().__init__(workload, host, recompute)
        self.optimizer = workload.adam([*self.parameters(), self.predictors])

    def train(self, number: int) -> None:
        targets, contexts = self.encode(self.host.up(self.batch))
        draw = self.workload.draw(self.objective, self.frames, number)
        loss, _ = plain_infonce(targets, contexts, self.predictors, draw)
        del targets, contexts
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class LossInBlocks(Resident):
    """The gradients of the representations, and the predictors' step, without autograd."""

    def __init__(self, workload: Workload, host: Host, recompute: bool, adam_on_host: bool) -> None:
        super().__init__(workload, host, recompute)
        self.adam_on_host = adam_on_host
        if adam_on_host:
            self.of_predictors = HostAdam(self, [self.predictors], list(self.objective.parameters()))
        else:
            self.of_predictors = workload.adam([self.predictors])

    def gradients(
        self, targets: torch.Tensor, contexts: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of targets and contexts (B, L, C), one tensor where these are one."""
        draw = self.workload.draw(self.objective, self.frames, number)
        targets, contexts = targets.detach(), contexts.detach()
        # Row by row, to be added to as one matrix; what a GRU gives lies otherwise.
        grad_targets = torch.zeros(targets.shape, device=targets.device)
        grad_contexts = torch.zeros(contexts.shape, device=targets.device) if self.targets_below else grad_targets
        self.predictors.grad = torch.zeros_like(self.predictors)
        scored = Scored.of(draw, self.host.device)
        add_gradients(
            targets.flatten(0, 1),
            OnDevice(contexts.flatten(0, 1), grad_contexts.flatten(0, 1), scored.contexts),
            self.predictors.detach(),
            scored,
            slice(None),
            grad_targets.flatten(0, 1),
            self.predictors.grad,
            self.workload.loss_room,
        )
        self.of_predictors.step()
        self.predictors.grad = None
        return grad_targets, grad_contexts


class HostAdam:
    """Adam in host memory for parameters on the device: gradients go down, values come back up."""

    def __init__(self, owner: Resident, parameters: list[nn.Parameter], on_host: list[nn.Parameter]) -> None:
        self.host, self.parameters, self.on_host = owner.host, parameters, on_host
        self.adam = owner.host.adam(on_host, owner.workload.config)

    def step(self) -> None:
        self.host.step(self.adam, (parameter.grad for parameter in self.parameters))
        for parameter, original in zip(self.parameters, self.on_host, strict=True):
            parameter.grad = None
            self.host.refresh(parameter, original)


class AdamInBackward(LossInBlocks):
    """Each parameter steps as soon as its gradient is there, which goes then: there is one gradient at a time."""

    def __init__(self, workload: Workload, host: Host, adam_on_host: bool) -> None:
        super().__init__(workload, host, recompute=True, adam_on_host=adam_on_host)
        originals = (parameter for layer in self.on_host for parameter in layer.parameters())
        for parameter, original in zip(self.parameters(), originals, strict=True):
            step = HostAdam(self, [parameter], [original]) if adam_on_host else workload.adam([parameter])
            parameter.register_post_accumulate_grad_hook(self._stepping(step))

    @staticmethod
    def _stepping(optimizer: "torch.optim.Optimizer | HostAdam") -> Callable[[torch.Tensor], None]:
        def step(parameter: torch.Tensor) -> None:
            optimizer.step()
            parameter.grad = None

        return step

    def train(self, number: int) -> None:
        targets, contexts = self.encode(self.host.up(self.batch))
        grad_targets, grad_contexts = self.gradients(targets, contexts, number)
        if self.targets_below:
            torch.autograd.backward([targets, contexts], [grad_targets, grad_contexts])
        else:
            contexts.backward(grad_contexts)


class MicroBatches(LossInBlocks):
    """The representations of all samples without a graph, the loss and its gradients, then each sample again, through which
    these run back."""

    def __init__(self, workload: Workload, host: Host, recompute: bool, adam_on_host: bool) -> None:
        super().__init__(workload, host, recompute, adam_on_host)
        originals = [parameter for layer in self.on_host for parameter in layer.parameters()]
        self.optimizer = (
            HostAdam(self, self.parameters(), originals) if adam_on_host else workload.adam(self.parameters())
        )

    def train(self, number: int) -> None:
        size, frames, host = self.workload.batch_size, self.frames, self.host
        contexts = torch.empty(size, frames, self.objective.predictors.shape[2], device=host.device)
        targets = torch.empty(size, frames, self.channels, device=host.device) if self.targets_below else contexts
        with torch.no_grad():
            for rows in host.slices(size, self.workload.at_once):
                self._fill(targets, contexts, rows)
        grad_targets, grad_contexts = self.gradients(targets, contexts, number)
        del targets, contexts
        for rows in host.slices(size, self.workload.at_once):
            self._run_back(grad_targets[rows], grad_contexts[rows], rows)
        self.optimizer.step()
        for parameter in self.parameters():
            parameter.grad = None

    def _fill(self, targets: torch.Tensor, contexts: torch.Tensor, rows: slice) -> None:
        targets[rows], contexts[rows] = self.encode(self.host.up(self.batch, rows))

    def _run_back(self, grad_targets: torch.Tensor, grad_contexts: torch.Tensor, rows: slice) -> None:
        targets, contexts = self.encode(self.host.up(self.batch, rows))
        if self.targets_below:
            torch.autograd.backward([targets, contexts], [grad_targets, grad_contexts])
        else:
            contexts.backward(grad_contexts)
