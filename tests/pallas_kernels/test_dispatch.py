"""How an implementation is chosen."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch

AGAINST = {"tpu": ["it is for tpu, this is cpu", "x has no rows"], "triton": [], "xla": []}


def test_the_first_that_can_run_is_chosen():
    assert dispatch.choose(None, AGAINST) == "triton"
    assert dispatch.choose(None, {"tpu": ["no"], "xla": []}) == "xla"
    assert dispatch.choose("xla", AGAINST) == "xla"


def test_a_named_one_runs_or_says_why_not():
    every = "implementation 'tpu' cannot run here: it is for tpu, this is cpu; x has no rows"
    with pytest.raises(ValueError, match=every):
        dispatch.choose("tpu", AGAINST)
    with pytest.raises(ValueError, match="'cuda'; allowed are 'tpu', 'triton', 'xla' and None"):
        dispatch.choose("cuda", AGAINST)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_only_a_named_kernel_is_interpreted(implementation):
    with pytest.raises(ValueError, match=f"implementation is {implementation!r}; it must name"):
        dispatch.choose(implementation, AGAINST, interpret=True)


def test_reasons():
    assert dispatch.not_on("cpu") == []
    assert dispatch.not_on("tpu") == ["it is for tpu, this is cpu"]
    assert dispatch.not_on("tpu", interpret=True) == []
    found = dispatch.not_of_dtype(jnp.float64, ("float32", "bfloat16"))
    assert dispatch.not_of_dtype(jnp.dtype("float32"), ("float32",)) == []
    assert found == ["x is float64, it takes float32, bfloat16"]


@pytest.mark.parametrize(("platform", "known"), [("tpu", "tpu"), ("cuda", "gpu"), ("gpu", "gpu")])
def test_the_target_is_the_device_that_is_described(platform, known):
    device = AbstractDevice(device_kind="a device", num_cores=1, platform=platform)
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    assert dispatch.target().platform == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.target() == dispatch.Target(known, "a device")
