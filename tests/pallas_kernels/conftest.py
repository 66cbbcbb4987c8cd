"""What the tests of all kernels share: lowering and compiling for devices that are not there."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where races are noted
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

# `topologies` compiles for these; the texts are XLA's GpuTargetConfigProto with the data sheets'
# numbers.
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_core}
  shared_memory_per_block_optin: {shared_block} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: {cores} fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} feature_extension: {features} }}
}}
platform_name: "CUDA"
device_description_str: "{kind}"
"""
A100 = GPU_CONFIG.format(
    kind="NVIDIA A100-SXM4-80GB",
    shared_core=167936,
    shared_block=166912,
    cores=108,
    lanes=64,
    bandwidth=2_039_000_000_000,
    cache=41943040,
    clock=1.41,
    memory=85_100_000_000,
    major=8,
    features="NONE",
)
H200 = GPU_CONFIG.format(
    kind="NVIDIA H200",
    shared_core=233472,
    shared_block=232448,
    cores=132,
    lanes=128,
    bandwidth=4_800_000_000_000,
    cache=52428800,
    clock=1.98,
    memory=150_000_000_000,
    major=9,
    features="ACCELERATED_FEATURES",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device that is not there.

    Attributes:
      platform: "tpu" or "gpu". kind: the device's own name. cores: its compute units.
      topology: what `topologies` knows it by: a name, or the text of a configuration.
      capability: for ptxas.
    """

    platform: str
    kind: str
    cores: int
    topology: str
    capability: str = ""

    @property
    def lowering(self):
        return "cuda" if self.platform == "gpu" else "tpu"


TARGETS = {
    "v5e": Target("tpu", "TPU v5 lite", 1, "v5e:2x2"),
    "v6e": Target("tpu", "TPU v6 lite", 1, "v6e:2x2"),
    "A100": Target("gpu", "NVIDIA A100-SXM4-80GB", 108, A100, "sm_80"),
    "H200": Target("gpu", "NVIDIA H200", 132, H200, "sm_90a"),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made: the whole program, and for GPUs registers and spills by kernel."""

    text: str
    seconds: float
    kernels: dict


def pytest_collection_modifyitems(items):
    """jax 0.11 warns of its Triton backend at every lowering."""
    here = str(pathlib.Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(
                pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
            )


def trace(target, f, *args):
    """`f` traced as on the target; args are shapes."""
    device = AbstractDevice(
        device_kind=target.kind, num_cores=target.cores, platform=target.platform
    )
    mesh = AbstractMesh((1,), ("x",), (AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*args), mesh


@pytest.fixture
def lowered():
    """L3: the text that a function lowers to for a target of `TARGETS`."""

    def lower(name, f, *args):
        target = TARGETS[name]
        traced, mesh = trace(target, f, *args)
        with jax.sharding.use_abstract_mesh(mesh):
            return traced.lower(lowering_platforms=(target.lowering,)).as_text()

    return lower


@pytest.fixture
def compiled(tmp_path, request):
    """L4: a function compiled for a target of `TARGETS`; skips where its compiler is missing."""

    def compile_for(name, f, *args, label):
        target = TARGETS[name]
        device = _device(target)
        sharding = SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), args
        )
        start = time.perf_counter()
        traced, mesh = trace(target, f, *shapes)
        options = {}
        if target.platform == "gpu":
            # the tests' own XLA flags ask for no optimisation
            options = {"xla_dump_to": str(tmp_path), "xla_backend_optimization_level": 3}
        with jax.sharding.use_abstract_mesh(mesh):
            lowered = traced.lower(lowering_platforms=(target.lowering,))
        made = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - start
        kernels = _kernels(tmp_path, target.capability) if target.platform == "gpu" else {}
        rows = request.config.stash.setdefault(REPORT, [])
        rows.append((label, name, f"{seconds:.1f} s", _cells(kernels)))
        return Compiled(made.as_text(), seconds, kernels)

    return compile_for


REPORT = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    """The table of the README, from what `-m aot` compiled."""
    rows = config.stash.get(REPORT, [])
    if rows:
        terminalreporter.section("compiled for devices that are not there")
        for row in (("kernel", "target", "compiled in", "registers (spilled bytes)"), *rows):
            terminalreporter.line("| " + " | ".join(row) + " |")


def _device(target):
    needed = ("libtpu",) if target.platform == "tpu" else ("jax_cuda13_plugin",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if target.platform == "gpu" and _assembler() is None:
        missing.append("ptxas")
    if missing:
        pytest.skip(f"no compiler for {target.kind}: {', '.join(missing)} missing (extra aot)")
    if target.platform == "tpu":
        # libtpu would ask the cloud's metadata server what machine this is
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    else:
        found = topologies.get_topology_desc(
            platform="cuda", topology="1x1x1", target_config=target.topology
        )
    return found.devices[0]


def _assembler():
    """The ptxas of NVIDIA's compiler wheel, or None."""
    found = (p for entry in sys.path for p in pathlib.Path(entry).glob("nvidia/cu*/bin/ptxas"))
    return next(found, None)


def _kernels(folder, capability):
    """(registers, spilled bytes) of every kernel whose PTX lies in a folder."""
    found = {}
    for path in folder.glob("*.ptx"):
        if ".entry" not in path.read_text():
            continue
        command = [_assembler(), "-v", f"-arch={capability}", path, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for part in said.split("Compiling entry function")[1:]:
            name = re.search(r"'(\w+)'", part)[1]
            spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
            found[name] = (int(re.search(r"Used (\d+) registers", part)[1]), spilled)
    return found


def _cells(kernels):
    ours = {name: cell for name, cell in kernels.items() if "fusion" not in name}
    return ", ".join(f"{n}: {regs} ({spill})" for n, (regs, spill) in sorted(ours.items())) or "-"


@pytest.fixture
def tpu_simulator():
    """L2: a simulated TPU: bounds are checked, races found, what is unwritten is NaN."""
    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(detect_races=True)
    try:
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
