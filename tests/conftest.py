"""Settings and fixtures that every test shares.

8 simulated devices, strict dtypes for the library's tests, and the reference vectors.
"""

import gc
import os
import pathlib
import re
import tempfile

# Before jax starts: the same settings reach the processes that tests start. Tests compile far more
# than they compute, so XLA optimises little and all processes share what is compiled.
LIGHT = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {LIGHT}")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="sparsejax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

# the same examples in every run: a failure is one that others see too
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

ROOT = pathlib.Path(__file__).parent
LIBRARY = (
    "tests/core/",
    "tests/weights/",
    "tests/activations/",
    "tests/coding/",
    "tests/models/",
    "tests/pallas_kernels/",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_code_is_dropped():
    """Frees what a module compiled: a process may hold code of some 2,800 functions, no more.

    Each takes about 23 memory maps, and Linux grants 65,530 of them.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """In the library's own tests no operation may promote a dtype silently.

    Optax does in some optimisers: tests that run one carry the mark `standard_promotion`.
    """
    strict = any(folder in request.node.nodeid for folder in LIBRARY)
    strict &= request.node.get_closest_marker("standard_promotion") is None
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@pytest.fixture
def unchecked():
    """Switches the run-time type checks off, so that the library's own errors are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def mesh():
    """Eight simulated devices as a 4 x 2 mesh with axes data and model."""
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


class Case:
    """The arrays of one case, `{prefix}{name}`; remembers which were read."""

    def __init__(self, arrays, prefix):
        self._arrays, self._prefix, self._read = arrays, prefix, set()

    def __getitem__(self, name):
        self._read.add(name)
        value = self._arrays[self._prefix + name]
        return value.item() if value.ndim == 0 else value

    def __contains__(self, name):
        return self._prefix + name in self._arrays

    def names(self):
        """Names of all arrays of the case."""
        return [key[len(self._prefix) :] for key in self._arrays if key.startswith(self._prefix)]

    def ignore(self, name, *, reason):
        """An input that a test truly has no use for."""
        assert reason
        self._read.add(name)

    def unread(self):
        """Keys that nobody looked at."""
        return [self._prefix + name for name in self.names() if name not in self._read]


class Reference:
    """A file of reference vectors, case by case; unread keys fail the test that asked for them."""

    def __init__(self, slug):
        folder = pathlib.Path(os.environ.get("SPARSEJAX_REFERENCE", ROOT / "reference"))
        path = folder / f"{slug}.npz"
        if not path.is_file():
            pytest.skip(f"no reference vectors {path}")
        with np.load(path, allow_pickle=False) as file:
            self._arrays = {key: file[key] for key in file.files}
        self._opened = []

    def cases(self, family):
        """The cases whose keys start with `family`, an optional number and an underscore."""
        match = re.compile(rf"({re.escape(family)}\d*_)").match
        prefixes = sorted({found[1] for key in self._arrays if (found := match(key))})
        assert prefixes, f"the file has no case of {family}"
        for prefix in prefixes:
            case = Case(self._arrays, prefix)
            self._opened.append(case)
            yield case

    def whole(self):
        """The file as one case, where its keys carry no case number."""
        self._opened.append(Case(self._arrays, ""))
        return self._opened[-1]

    def families(self):
        """The first words of the keys, without their number."""
        return {re.match(r"([a-z]+)", key)[1] for key in self._arrays}

    def unread(self):
        """Keys of the opened cases that nobody looked at."""
        return [key for case in self._opened for key in case.unread()]


@pytest.fixture
def reference(x64):
    """Opens `tests/reference/{slug}.npz` (or that of $SPARSEJAX_REFERENCE) in double precision."""
    opened = []

    def open_reference(slug):
        opened.append(Reference(slug))
        return opened[-1]

    yield open_reference
    unread = [key for file in opened for key in file.unread()]
    assert not unread, f"reference vectors that were not compared: {unread}"
