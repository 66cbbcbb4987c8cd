"""Meshes, layouts of training states, and the N:M groups they must not cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import sparsejax as sj
from experiments.harness.config import ExperimentError, RunConfig
from experiments.harness.sharding import (
    check_groups,
    host_batch,
    initialize_hosts,
    make_mesh,
    place_batch,
    state_shardings,
)

SPECS = {"a/kernel": PartitionSpec(None, "model"), "b/kernel": PartitionSpec("model", None)}


def params():
    return {
        "a": {"kernel": jnp.ones((8, 4))},
        "b": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)},
    }


def test_a_batch_is_divided_among_the_processes(monkeypatch):
    assert host_batch(8) == 8
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert host_batch(8) == 4
    with pytest.raises(ExperimentError, match="batch is 7; 2 processes must divide it"):
        host_batch(7)


def test_meshes():
    assert make_mesh(None) is None
    assert dict(make_mesh("data=4,model=2").shape) == {"data": 4, "model": 2}
    assert dict(make_mesh("model=8").shape) == {"data": 1, "model": 8}
    for text in ("4x2", "data=0", "data=4,data=2", "rows=8", "data=-8"):
        with pytest.raises(ExperimentError, match="it must look like data=4,model=2"):
            make_mesh(text)
    with pytest.raises(ExperimentError, match="'data=3': 3 devices, and there are 8"):
        make_mesh("data=3")


def test_moments_and_masks_lie_where_their_parameter_does(mesh):
    tree = params()
    tx = sj.static_sparsity(
        optax.adam(1e-3), sj.make_masks(sj.magnitude(tree), pattern=sj.NM(2, 4))
    )
    shardings = state_shardings({"params": tree, "opt": tx.init(tree)}, SPECS, mesh)
    adam = shardings["opt"].inner[0]
    for tree in (shardings["params"], shardings["opt"].masks, adam.mu):
        assert tree["a"]["kernel"].spec == SPECS["a/kernel"]
        assert tree["b"]["kernel"].spec == SPECS["b/kernel"]
        assert tree["b"]["bias"].spec == PartitionSpec()
    assert adam.count.spec == PartitionSpec()


def test_a_layout_that_cuts_groups_is_refused(mesh):
    tree = params()
    masks = sj.make_masks(sj.magnitude(tree), pattern=sj.NM(2, 4))
    shardings = state_shardings(tree, SPECS, mesh)
    with pytest.raises(
        ExperimentError, match="cuts groups of 'b/kernel': its axis 0 has 2 entries"
    ):
        check_groups(shardings, masks, sj.NM(2, 4), mesh)
    check_groups(shardings, masks, sj.NM(1, 2), mesh)


def test_batches_are_spread_over_the_data_axis(mesh):
    batch = np.arange(32).reshape(8, 4)
    placed = place_batch(batch, mesh)
    np.testing.assert_array_equal(placed, batch)
    assert placed.sharding.spec == PartitionSpec("data")
    assert place_batch(batch, None) is batch


def test_hosts_need_all_their_numbers():
    initialize_hosts(RunConfig())
    with pytest.raises(ExperimentError, match="go together"):
        initialize_hosts(RunConfig(multihost=True, coordinator="localhost:1"))
    assert jax.process_count() == 1
