"""Counts the floating point operations of what runs on tensors, with values or without."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}

ATTENTION: dict[Any, tuple[Any, int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}
"""How much, and of how many first arguments."""


class FlopCounter(TorchDispatchMode):
    """Counts floating point operations by the formulas of torch.utils.flop_counter, and by theirs for what these leave out:
    products that are added in place, and the attention of CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in ATTENTION:
            count, tensors = ATTENTION[packet]
            self.total += count(*(tensor.shape for tensor in args[:tensors]))
        elif packet in flop_registry or packet in IN_PLACE:
            self.total += flop_registry[IN_PLACE.get(packet, packet)](*args, **(kwargs or {}), out_val=result)
        return result
