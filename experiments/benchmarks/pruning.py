"""Time and memory of pruning a whole model, and whether a killed run resumes to the same bits.

`python -m experiments.benchmarks.pruning`: a LLaMA of the shape of LLaMA-3.2-1B with random weights
in bfloat16 is pruned to 2:4 in a process of its own; then again in one that is killed in the middle
and started anew.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from flax import nnx
from rich.console import Console

import sparsejax as sj
from experiments.harness.progress import make_table
from experiments.harness.run import versions, write_json
from sparsejax import weights
from sparsejax.models import Llama, LlamaConfig, llama_config, parameter_count
from sparsejax.models.loading import build_llama

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Config:
    """What is pruned: model, calibration windows of so many tokens, windows at a time."""

    model: LlamaConfig
    windows: int
    length: int
    chunk: int


_BF16 = {"dtype": "bfloat16", "param_dtype": "bfloat16", "max_seq_len": 2048}
PRESETS = {
    "laptop": Config(llama_config("llama-3.2-1b", **_BF16), windows=16, length=512, chunk=8),
    "test": Config(
        llama_config("laptop", n_layers=3, dtype="bfloat16", param_dtype="bfloat16"), 4, 32, 2
    ),
}


def prune(config: Config, method: str, folder: str) -> dict[str, Any]:
    """Builds the model, prunes it, and tells time, memory and the bits of the result."""
    rng = np.random.default_rng(0)

    def fetch(path: str, layer: int | None) -> np.ndarray:
        """Normal weights of variance 1 / inputs; scales of 1."""
        leaf = shapes[path]
        shape = leaf.shape if layer is None else leaf.shape[1:]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)

    abstract = nnx.eval_shape(lambda: Llama(config.model, rngs=nnx.Rngs(0)))
    shapes = dict(sj.named_leaves(nnx.state(abstract)))
    model = build_llama(config.model, fetch)
    tokens = rng.integers(0, config.model.vocab_size, (config.windows, config.length))
    started = time.time()
    seconds: list[float] = []

    def on_layer(block: int, path: str, error: float) -> None:
        if len(seconds) <= block:
            seconds.append(round(time.time() - started, 1))
            print(json.dumps({"block": block, "seconds": seconds[-1]}), flush=True)

    weights.prune_model(
        model,
        np.asarray(tokens, np.int32),  # type: ignore[arg-type]
        method=weights.PruneMethod(method, pattern=sj.NM(2, 4)),  # type: ignore[arg-type]
        chunk=config.chunk,
        folder=folder,
        on_layer=on_layer,
    )
    digest = hashlib.sha256()
    for path, leaf in sj.named_leaves(nnx.state(model)):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return {
        "seconds": round(time.time() - started, 1),
        "peak_bytes": _peak_bytes(),
        "sha256": digest.hexdigest(),
    }


def _peak_bytes() -> int:
    """The most memory that this program has taken.

    On Linux not by `getrusage`, which counts what its parent held when it was started.
    """
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start(preset: str, method: str, folder: str) -> subprocess.Popen[str]:
    """A process of its own, so that its peak of memory is its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.pruning", "--worker", method,
               "--preset", preset, "--folder", folder]  # fmt: skip
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process found."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a pruning process ended with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def measure(preset: str, method: str, console: Console) -> dict[str, Any]:
    """One method, whole and interrupted."""
    config = PRESETS[preset]
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        with console.status(f"{method}: whole"):
            found = finish(start(preset, method, whole))
        killed_after = config.model.n_layers // 2
        with console.status(f"{method}: to be killed after block {killed_after}"):
            process = start(preset, method, broken)
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line).get("block") == killed_after:
                    process.send_signal(signal.SIGKILL)
                    break
            process.wait()
            process.stdout.close()
        done = len(list(pathlib.Path(broken).glob("block_*.safetensors")))
        with console.status(f"{method}: resumed after {done} blocks"):
            again = finish(start(preset, method, broken))
    return {
        "method": method,
        **found,
        "blocks_before_the_kill": done,
        "resumed_seconds": again["seconds"],
        "same_bits": again["sha256"] == found["sha256"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and writes `<out>/benchmarks/pruning.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.pruning", description=__doc__
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="sizes")
    parser.add_argument("--out", default="runs", help="folder for the figures")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    config = PRESETS[options.preset]
    if options.worker:
        print(json.dumps(prune(config, options.worker, options.folder)))
        return
    console = Console(highlight=False)
    rows = [measure(options.preset, method, console) for method in options.methods]
    title = (
        f"{parameter_count(config.model):,} parameters in {config.model.param_dtype} pruned to 2:4 "
        f"on {config.windows} windows of {config.length} tokens, {os.cpu_count()} cores"
    )
    header = ("method", "minutes", "peak memory", "resumed after", "minutes", "same bits")
    cells = [
        (
            row["method"],
            f"{row['seconds'] / 60:.1f}",
            f"{row['peak_bytes'] / GIB:.1f} GiB",
            f"{row['blocks_before_the_kill']} blocks",
            f"{row['resumed_seconds'] / 60:.1f}",
            "yes" if row["same_bits"] else "NO",
        )
        for row in rows
    ]
    console.print(make_table(title, header, cells))
    folder = pathlib.Path(options.out) / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    report = {"preset": options.preset, "sizes": title, "rows": rows, "versions": versions()}
    write_json(folder / "pruning.json", report)
    console.print(f"figures in {folder / 'pruning.json'}")


if __name__ == "__main__":
    main()
