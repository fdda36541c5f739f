"""A GRU as one step that is repeated: torch.export takes nn.GRU apart into as many steps as its example has frames."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.scan import scan

from layerwise.nets.sequence import Recurrence


class StepwiseRecurrence(nn.Module):
    """What `Recurrence` computes, with its very weights, for any number of frames after export (Cho et al. 2014).

    The arithmetic is that of the formula in the documentation of nn.GRU; it differs from nn.GRU's kernel by rounding.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        super().__init__()
        self.gru = recurrence.gru

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) to (B, L, hidden)."""
        gru = self.gru
        input_weight, weight, input_bias, bias = gru.all_weights[0]
        inputs = F.linear(x, input_weight, input_bias).transpose(0, 1)

        def step(state: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            carried = F.linear(state, weight, bias)
            reset_in, update_in, new_in = inputs.chunk(3, 1)
            reset_carried, update_carried, new_carried = carried.chunk(3, 1)
            reset, update = torch.sigmoid(reset_in + reset_carried), torch.sigmoid(update_in + update_carried)
            new = torch.tanh(new_in + reset * new_carried)
            state = new + update * (state - new)
            return state, state.clone()

        _, outputs = scan(step, x.new_zeros(x.shape[0], gru.hidden_size), inputs)
        return outputs.transpose(0, 1)
