"""The lean InfoNCE against plain autograd, at several sizes: time and peak of loss and gradients, and how far they differ.

python benchmarks/loss.py [--device cpu] [--rounds 7]
"""

import argparse

import numpy as np
import torch
from plain_infonce import plain_infonce
from steps import machine, peak_of, seconds_in_turn

from layerwise.memory.plan import NARROW_ROOM, WIDE_ROOM
from layerwise.objectives.contrastive import InfoNCE

SIZES = (
    # samples, frames, columns, channels, context channels, steps, negatives, anchors
    ("speech 1", 8, 4095, 1, 512, 512, 12, 10, 128),
    ("speech 2", 8, 1023, 1, 512, 512, 12, 10, 128),
    ("speech 6", 8, 128, 1, 512, 256, 12, 10, 128),
    ("speech 2, width 128", 32, 255, 1, 128, 128, 12, 10, 128),
    ("speech 2, width 64", 16, 511, 1, 64, 64, 12, 10, 128),
    ("speech 2, batch 64", 64, 1023, 1, 512, 512, 12, 10, 128),
    ("vision 1", 32, 49, 7, 256, 256, 5, 16, 128),
    ("vision 3", 32, 49, 7, 1024, 1024, 5, 16, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{machine(device)}\n")
    print("| size | plain s | lean s | narrow s | lean / plain | plain MB | lean MB | narrow MB | gradients differ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, samples, frames, columns, channels, context, steps, negatives, anchors in SIZES:
        torch.manual_seed(0)
        objective = InfoNCE(channels, context, steps, 0, negatives, anchors).to(device)
        lengths = np.full(samples, frames)
        draw = objective.draw(lengths, frames, columns, np.random.default_rng(0))[0]
        targets = 0.3 * torch.randn(samples, frames, channels, device=device)
        contexts = targets if context == channels else 0.3 * torch.randn(samples, frames, context, device=device)
        rows = torch.as_tensor(draw.rows, device=device)

        def representations(targets=targets, contexts=contexts) -> list[torch.Tensor]:
            made = [targets.clone().requires_grad_()]
            return made if contexts is targets else [*made, contexts.clone().requires_grad_()]

        def plain(objective=objective, draw=draw, representations=representations) -> list[torch.Tensor]:
            given = representations()
            plain_infonce(given[0], given[-1], objective.predictors, draw)[0].backward()
            return _gradients(objective, given)

        def lean(room=WIDE_ROOM, objective=objective, draw=draw, rows=rows, representations=representations):
            given = representations()
            taken = [tensor.detach().flatten(0, 1)[rows].requires_grad_() for tensor in given]
            objective(taken[0], taken[-1], draw, room).loss.backward()
            return _gradients(objective, taken)

        def narrow(lean=lean) -> list[torch.Tensor]:
            return lean(NARROW_ROOM)

        ways = (plain, lean, narrow)
        seconds = seconds_in_turn(ways, device, options.rounds)
        peaks = [peak_of(lambda _, way=way: way, device) / 1e6 for way in ways]
        off = max(
            float((a.flatten(0, -2)[rows] if a.dim() == 3 and a.shape != b.shape else a).sub(b).norm() / b.norm())
            for a, b in zip(plain(), lean(), strict=True)
        )
        times = " | ".join(f"{second:.4f}" for second in seconds)
        memory = " | ".join(f"{peak:.1f}" for peak in peaks)
        print(f"| {name} | {times} | {seconds[1] / seconds[0]:.2f} | {memory} | {off:.0e} |", flush=True)


def _gradients(objective: InfoNCE, representations: list[torch.Tensor]) -> list[torch.Tensor]:
    found = [objective.predictors.grad, *(tensor.grad for tensor in representations)]
    objective.zero_grad()
    return found


if __name__ == "__main__":
    main()
