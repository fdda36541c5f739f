"""A torchvision ResNet on a folder of pictures, stage by stage, with two renderings of each picture told apart from others.

python examples/picture_folder.py pictures [--net resnet18] [--gpu-mem 1GB] [--epochs 20] [--side 96] [--out runs/pictures]

The folder holds a sub-folder for each class; the classes serve for the probe at the end alone.
"""

import argparse

import torch

import layerwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures")
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--gpu-mem", default="1GB")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=96, help="of the squares that pictures are resized to, pixels")
    parser.add_argument("--out", default="runs/pictures")
    asked = parser.parse_args()

    request = {
        "network": f"torchvision:{asked.net}",
        "data": f"images:{asked.pictures}",
        "gpu_mem": asked.gpu_mem,  # without stages: as few as the budget holds
        "max_epochs": asked.epochs,
        "batch_size": asked.batch_size,
        "out": asked.out,
        "options": {"data.picture": asked.side},
    }
    forecast = layerwise.plan(**request)
    print(
        f"{len(forecast.stages)} stages, {forecast.peak_bytes / 1e6:.0f} MB, caches {forecast.cache_bytes / 1e9:.2f} GB"
    )
    layerwise.run(
        **request,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, asked.epochs),
        on_stage=lambda done: print(
            f"stage {done.stage}: loss {done.best_loss:.3f}, {done.train_peak_bytes / 1e6:.0f} MB"
        ),
    )
    for stage in layerwise.probe(asked.out, "class").stages:
        print(f"stage {stage.stage}: error {stage.error:.1%}, with random weights {stage.untrained_error:.1%}")
    encoder = layerwise.load(asked.out)
    print("features", tuple(encoder(torch.rand(2, 3, asked.side, asked.side)).shape))


if __name__ == "__main__":
    main()
