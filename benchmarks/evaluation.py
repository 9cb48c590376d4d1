"""What an evaluation costs: the Fréchet distance, its memory, a whole FID, and everything but the network.

python -m benchmarks.evaluation frechet [width=2048] [count=5000]      against scipy's matrix square root
python -m benchmarks.evaluation memory [width=256] [counts=1000,10000,50000]   peak of all figures on stored features
python -m benchmarks.evaluation whole PACKAGES [count=128] [size=256]  a whole FID against torch-fidelity's, same files
python -m benchmarks.evaluation share BUNDLE SHARDS [samples=256] [inception=1]   time of an evaluation by part

`whole`: PACKAGES is the directory of `pip install --no-deps --target PACKAGES torch-fidelity==0.4.0`. It needs
torchvision, which cannot be imported with the CPU build of torch; the two functions that a FID calls are replaced here.
Inception has random weights: the values agree only if pictures, resizing and network do.
"""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.config.experiment import ExtractorConfig
from training.evaluation.metrics.frechet import Moments, frechet_distance, frechet_figure
from training.evaluation.metrics.kernels import kid


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result) of a call."""
    began = time.perf_counter()
    value = call()
    return time.perf_counter() - began, value


def frechet(width: int = 2048, count: int = 5000) -> None:
    """Print the seconds of both, their ratio, and the difference of the values."""
    import scipy.linalg

    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5 for _ in range(2))
    a, b = Moments.of(x), Moments.of(y)
    ours, value = timed(lambda: frechet_distance(a, b))
    theirs, root = timed(lambda: scipy.linalg.sqrtm(a.covariance @ b.covariance))
    shift = a.mean - b.mean
    expected = float(shift @ shift + np.trace(a.covariance + b.covariance - 2 * root.real))
    print(f"frechet_distance: {ours:.2f} s, scipy.linalg.sqrtm: {theirs:.2f} s, ratio {theirs / ours:.1f}")
    print(f"values {value:.10g} and {expected:.10g}, relative difference {abs(value / expected - 1):.1e}")
    print(f"with its interval (frechet_figure): {timed(lambda: frechet_figure(x, y))[0]:.2f} s")
    print(f"KID of {count} and {count} pictures with its standard error: {timed(lambda: kid(x, y))[0]:.2f} s")


def memory(width: int = 256, counts: str = "1000,10000,50000") -> None:
    """Print the peak memory of a process that computes all figures of N samples and N references from their parts."""
    for count in str(counts).split(","):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"{key}={value}" for key, value in {"folder": folder, "count": count, "width": width}.items()]
            for step in ("fill", "figures"):
                subprocess.run([sys.executable, "-m", "benchmarks.evaluation", step, *words], check=True)


PART = 256


def fill(folder: str, count: int, width: int) -> None:
    """Write the parts of an evaluation, with random features."""
    from training.evaluation.parts import Parts

    parts = Parts(Path(folder), {}, -(-count // PART))
    rng = np.random.default_rng(0)
    for number in range(parts.count):
        rows = min(PART, count - number * PART)
        arrays = {f"{side}/f": rng.normal(size=(rows, width)).astype(np.float32) for side in "xy"}
        parts.write(number, arrays | {"text": arrays["y/f"], "place": np.arange(rows) + number * PART})


def figures(folder: str, count: int, width: int) -> None:
    """Compute all figures as `cascade evaluate` does; print the peak memory."""
    from training.evaluation import measure
    from training.evaluation.parts import Parts

    before = peak_mb()
    arrays = Parts(Path(folder), {}, -(-count // PART)).read()
    x, y = {"f": arrays["x/f"]}, {"f": arrays["y/f"]}
    began = time.process_time()
    found = measure.against_reference(x, y, "f") | measure.of_samples(x, arrays["place"] // 2, arrays["text"], "f")
    seconds = time.process_time() - began
    features = 2 * count * width * 4 / 2**20
    print(
        f"N = {count:6,}: features {features:6.1f} MiB, peak {peak_mb():.0f} MiB, {peak_mb() - before:.0f} MiB above "
        f"the imports; {len(found)} figures in {seconds:.1f} s of CPU time",
        flush=True,
    )


def peak_mb() -> float:
    """Return the peak resident memory of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def whole(packages: str, count: int = 128, size: int = 256) -> None:
    """Print the seconds of a whole FID, from PNG files (ours in a shard) to the value, and the values of both."""
    from PIL import Image

    from data_pipeline.config import DataConfig
    from data_pipeline.shards.writer import ShardWriter
    from training.evaluation.extractors.base import open_extractors
    from training.evaluation.references import References

    calculate = torch_fidelity(packages)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rng = np.random.default_rng(0)
        for side, tint in (("a", 0), ("b", 40)):
            (folder / side).mkdir()
            with ShardWriter(str(folder / f"{side}.tar")) as shard:
                for number in range(count):
                    coarse = rng.integers(tint, 216 + tint, (16, 16, 3), dtype=np.uint8)
                    data = io.BytesIO()
                    Image.fromarray(coarse).resize((size, size)).save(data, "PNG")
                    (folder / side / f"{number:05d}.png").write_bytes(data.getvalue())
                    shard.write(f"{number:05d}", {"png": data.getvalue(), "txt": b"x"})
        config = lively(folder)
        config.batch = 64

        def ours() -> float:
            network = open_extractors({"inception": config})[-1]
            sides = []
            for side in "ab":
                source = References(str(folder / f"{side}.tar"), DataConfig(), size, 0)
                sides.append(np.concatenate([network.pictures(r.pictures) for r in source.chunks(PART, count)]))
            return frechet_distance(*(Moments.of(features) for features in sides))

        def theirs() -> float:
            found = calculate(
                input1=str(folder / "a"),
                input2=str(folder / "b"),
                fid=True,
                cuda=False,
                batch_size=64,
                cache=False,
                verbose=False,
                feature_extractor_weights_path=config.path,
            )
            return float(found["frechet_inception_distance"])

        took = {"ours": [], "theirs": []}  # type: dict[str, list[float]]
        for _ in range(2):
            for name, call in (("ours", ours), ("theirs", theirs)):
                seconds, value = timed(call)
                took[name].append(seconds)
                print(f"{name}: {seconds:.1f} s, {value:.9g}", flush=True)
        print(f"torch-fidelity / ours, shortest of each: {min(took['theirs']) / min(took['ours']):.2f}")


def lively(folder: Path) -> ExtractorConfig:
    """Write random Inception weights whose features differ between pictures.

    After so many random layers the differences would vanish; so the normalisation statistics of each layer are
    computed from some pictures.
    """
    import torch

    from tests.training.evaluation.extractors.tiny_weights import inception_file, stated
    from training.evaluation.extractors.inception import Inception

    state = torch.load(inception_file(folder).path)
    network = Inception().train()
    network.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("fc.")})
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)))
    torch.save(state | network.state_dict(), folder / "inception.pth")
    return stated("inception", folder / "inception.pth")


def torch_fidelity(packages: str) -> Callable[..., dict[str, float]]:
    """Import `calculate_metrics` of torch-fidelity, with stand-ins for torchvision."""
    import torch

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    for name in ("CIFAR10", "STL10", "CIFAR100"):
        setattr(sys.modules["torchvision.datasets"], name, object)
    sys.modules["torchvision.transforms"].Compose = (  # type: ignore[attr-defined]
        lambda steps: lambda image: functools.reduce(lambda found, step: step(found), steps, image)
    )
    sys.modules["torchvision.transforms.functional"].pil_to_tensor = (  # type: ignore[attr-defined]
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    )
    sys.path.append(packages)
    from torch_fidelity import calculate_metrics  # type: ignore[import-not-found]

    return calculate_metrics  # type: ignore[no-any-return]


def share(bundle: str, shards: str, samples: int = 256, inception: int = 1) -> None:
    """Print how much of an evaluation is neither drawing nor the extractor's network."""
    from tests.training.evaluation.extractors.tiny_weights import inception_file
    from training.cascade.cascade import Cascade
    from training.commands import evaluate
    from training.config.commands import EvaluateCommand
    from training.evaluation.extractors.base import Extractor

    spent = {"drawing": 0.0, "features": 0.0, "figures and report": 0.0}

    def counted(kind: type, name: str, what: str) -> None:
        original = getattr(kind, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seconds, value = timed(lambda: original(*arguments, **options))
            spent[what] += seconds
            return value

        setattr(kind, name, call)

    counted(Cascade, "draw", "drawing")
    counted(Extractor, "pictures", "features")
    counted(evaluate.Evaluation, "result", "figures and report")
    with tempfile.TemporaryDirectory() as place:
        config = EvaluateCommand()
        config.bundle.dir, config.evaluation.reference, config.evaluation.output = bundle, shards, f"{place}/out"
        config.evaluation.kind, config.evaluation.samples, config.cluster.gpus = "pictures", samples, False
        if inception:
            config.evaluation.extractors = {"inception": inception_file(Path(place))}
        seconds, result = timed(lambda: evaluate.main(config))
    parts = spent | {"reading and the rest": seconds - sum(spent.values())}
    print(json.dumps({"seconds": round(seconds, 1), "n": result["n"], **{k: round(v, 2) for k, v in parts.items()}}))
    print(f"not the network: {1 - (spent['drawing'] + spent['features']) / seconds:.1%}")


WHAT: dict[str, Callable[..., None]] = {
    "frechet": frechet,
    "memory": memory,
    "fill": fill,
    "figures": figures,
    "whole": whole,
    "share": share,
}

if __name__ == "__main__":
    given = [word for word in sys.argv[2:] if "=" not in word]
    options = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
    WHAT[sys.argv[1] if len(sys.argv) > 1 else "frechet"](
        *given, **{key: int(value) if value.isdecimal() else value for key, value in options.items()}
    )
