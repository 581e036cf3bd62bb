"""Features stored by codec "linear": bytes per view and measured errors of pooled layers, by bound.

    python bench/features.py [--quick] [--json PATH]

The demo's teacher is trained. The torchvision networks have random weights (nothing is downloaded) and see drawn images
of 64 pixels: their rows show what shapes and depths do, not what the layers of a trained network take. A codec is
fitted to two thirds of the rows, 3,072 (`cache-teacher` fits to 4,096), and scored on the others. Bytes are those of
the shards of an archive, and of the side data shared by a million views. `gaussian_bound` is the least rate of rows
with this covariance at this mean square error if they were Gaussian (reverse water-filling): no rounding of single
coefficients reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import harness
import numpy as np
import torch
from redistill_cache.codecs import fit_codec
from torch import nn

from redistill.demo.run import DIFFICULTY, TEACHER_NETWORK, TEACHER_WEIGHTS, VAL_DATA
from redistill.devices import pick_device
from redistill.models import OpenedModel, open_model
from redistill.sources.open_source import open_source
from redistill.teachers import Teacher

FIDELITIES = (0.05, 0.1, 0.2, 0.4)
BATCH = 32
STAGES = ("layer1", "layer2", "layer3", "penultimate")
BLOCKS = tuple(f"encoder.layers.encoder_layer_{block}" for block in (2, 5, 8))
SIZE, IMAGES, QUICK_IMAGES = 64, 4608, 192
# A ViT takes images of one size, so it is built for this one. The penultimate rows are those of the last stage.
NETWORKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "ResNet-18": ("torchvision:resnet18?weights=random&num_classes=10", STAGES),
    "ResNet-34": ("torchvision:resnet34?weights=random&num_classes=10", STAGES),
    "ResNet-50": ("torchvision:resnet50?weights=random&num_classes=10", STAGES),
    "ViT-B/16": ("torchvision:vit_b_16?weights=random&num_classes=10&size=64", (*BLOCKS, "penultimate")),
}
RANDOM = "random weights"


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    rows = []
    for network, weights, signals in networks(quick=args.quick):
        for layer, values in signals.items():
            where = {"network": network, "weights": weights, "layer": layer, "width": values.shape[1]}
            rows += [where | score(values, fidelity) for fidelity in FIDELITIES]
    harness.report("features", rows, args)
    print(f"Networks with {RANDOM} show what shapes take, not what trained layers take.")


def networks(*, quick: bool) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Name, origin of the weights, and the rows of every layer."""
    demo = f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}"
    layers = ("layer1", "layer2", "penultimate")
    yield "demo teacher", "trained", rows_of(demo, VAL_DATA, 600 if quick else 2000, layers)
    for name, (spec, layers) in NETWORKS.items():
        if quick and name != "ResNet-18":
            continue
        data = f"synthetic?{DIFFICULTY}&n={IMAGES}&size={SIZE}"
        yield name, RANDOM, rows_of(spec, data, QUICK_IMAGES if quick else IMAGES, layers)


def rows_of(spec: str, data: str, count: int, layers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """float32 [count, width] of every layer, in a fixed random order."""
    torch.manual_seed(0)
    source, model = open_source(data), open_model(spec)
    batches = [
        np.stack([np.asarray(source.sample(i).payload) for i in range(start, min(start + BATCH, count))])
        for start in range(0, count, BATCH)
    ]
    pixels = [torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))) for batch in batches]
    if model.weights_source == "random":
        normalise_by(model, pixels[0])
    teacher = Teacher(model, device=pick_device("cpu"), layers=layers)
    outputs = [teacher(batch) for batch in pixels]
    order = np.random.default_rng(0).permutation(count)
    return {layer: torch.cat([batch[layer] for batch in outputs]).numpy()[order] for layer in layers}


@torch.no_grad()
def normalise_by(model: OpenedModel, pixels: torch.Tensor) -> None:
    """Give the batch norms of an untrained network the statistics of a batch, as training would."""
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.module.train()
    model.module(model.normalise()(pixels))


def score(values: np.ndarray, fidelity: float) -> dict[str, float]:
    """Bytes per view, and the errors relative to the distance from the mean row."""
    split = len(values) * 2 // 3
    pilot, scored = values[:split], values[split:]
    codec = fit_codec("linear", pilot, metric="centred", fidelity=fidelity)
    encoded = codec.encode(scored)
    mean = codec.side()["offset"].astype(np.float64)
    exact = scored.astype(np.float64) - mean
    stored = np.asarray(codec.decode(encoded.arrays)).astype(np.float64) - mean
    size = np.maximum(np.linalg.norm(exact, axis=1), float(str(codec.config()["floor"])))
    error = np.linalg.norm(stored - exact, axis=1) / size
    cosine = (stored * exact).sum(1) / np.maximum(np.linalg.norm(stored, axis=1) * np.linalg.norm(exact, axis=1), 1e-30)
    return {
        "fidelity": fidelity,
        "bytes_per_view": harness.written_bytes(codec, encoded),
        "gaussian_bound": gaussian_bytes(values.astype(np.float64) - mean, fidelity),
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
        "exact_rows": int(encoded.exact.sum()),
    }


def gaussian_bytes(centred: np.ndarray, fidelity: float) -> float:
    """The rate of Gaussian rows of this covariance at this relative error, in bytes: reverse water-filling."""
    variances = np.linalg.svd(centred, compute_uv=False) ** 2
    allowed, low, high = fidelity**2 * variances.sum(), 0.0, variances.max()
    for _ in range(100):
        level = (low + high) / 2
        low, high = (low, level) if np.minimum(level, variances).sum() > allowed else (level, high)
    return float(0.5 * np.log2(np.maximum(variances / high, 1.0)).sum() / 8)


if __name__ == "__main__":
    main()
