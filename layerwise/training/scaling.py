"""Loss scaling for float16: its smallest number is 6e-8, and gradients of single frames are smaller (Micikevicius et al.
2018, arXiv 1710.03740)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

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
