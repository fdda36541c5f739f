"""What is predicted of a caching pass, of samples of several lengths: never less than the pass takes."""

import numpy as np
import pytest
import torch

from layerwise.config import Config, resolve
from layerwise.data.batches import group_renderings
from layerwise.data.open import as_data
from layerwise.memory.meter import meter_for
from layerwise.nets import build_network
from layerwise.nets.network import Network
from layerwise.training.context import RunContext
from layerwise.training.forward import InferenceStage, OutputFormat, forward_all, to_host
from layerwise.training.inference_peak import caching_peak
from layerwise.training.loader import SourceLoader
from layerwise.training.spec import StageSpec, stage_specs

CPU = torch.device("cpu")


def small(**net: object) -> Config:
    options = {f"net.{name}": value for name, value in net.items()}
    window = {"data.window": 60, "objective.steps": 1, "objective.negatives": 1}
    return resolve(
        overrides={
            "net.centred": False,
            "net.dense": False,
            "objective.projection": "none",
            "objective.gap": 0,
            **window,
            **options,
        }
    )


def first_stage(config: Config, lengths: list[int], network: Network | None = None) -> StageSpec:
    samples = [(np.random.default_rng(0).standard_normal((length, 1), dtype=np.float32), "a") for length in lengths]
    data = as_data(samples, config.data)
    network = network or build_network(config.net, data.frame_shape, 0)
    return stage_specs(config, data, network, [range(len(network.layers))])[0]


def taken(config: Config, spec: StageSpec, piece: int) -> int:
    """Bytes of the caching pass of noise of the stage's lengths."""

    class Noise:
        lengths, columns, views = spec.lengths, 1, 1

        def read(self, sample: int, start: int, stop: int, view: int = 0) -> torch.Tensor:
            return torch.randn(stop - start, *spec.frame_shape)

    meter = meter_for(CPU, None)
    with meter:
        stage = InferenceStage(1, spec.build_module(0, CPU).eval(), OutputFormat.of(config), resident=True)
        groups, context = group_renderings(spec.lengths, piece), RunContext(CPU, meter)
        for _ in forward_all([stage], SourceLoader(Noise()), groups, lambda *each: to_host(each[2]), context):
            pass
    return meter.peak


GRU = {"kernels": (), "strides": (), "paddings": (), "context": 16}
CONVOLUTION = {"width": 16, "kernels": (4,), "strides": (2,), "paddings": (2,), "context": 0}


@pytest.mark.parametrize("net", [GRU, CONVOLUTION, CONVOLUTION | {"context": 16}, CONVOLUTION | {"strides": (1,)}])
@pytest.mark.parametrize(
    ("lengths", "piece"),
    [
        ([60, 60, 20, 25, 18, 15, 22, 30] * 3, 120),
        ([60, 60, 20, 25, 18, 15, 22, 30] * 3, 59),
        ([60, 300, 200, 15, 70] * 3, 131),
        ([60] * 8, 60),
        ([60] * 8, 240),
    ],
)
def test_a_caching_pass_takes_at_most_what_is_predicted(net: dict[str, object], lengths: list[int], piece: int) -> None:
    config = small(**net)
    spec = first_stage(config, lengths)
    assert taken(config, spec, piece) <= caching_peak(config, spec, piece)


def test_what_is_predicted_of_one_data_set_is_not_said_of_another() -> None:
    config = small(**CONVOLUTION)
    even = first_stage(config, [60] * 8)
    network, piece = even.network, 120
    mixed = first_stage(config, [60, 100] * 4, network)
    assert caching_peak(config, even, piece) < caching_peak(config, mixed, piece)


def test_what_is_asked_by_keyword_is_not_answered_for_something_else() -> None:
    config = small(**CONVOLUTION)
    spec = first_stage(config, [60, 100] * 4)
    alone = caching_peak(config, spec, 240)
    assert caching_peak(config, spec, 240, overlapped=True) > alone == caching_peak(config, spec, 240, overlapped=False)
