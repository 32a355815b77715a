"""Strictness for the whole suite: dtype and rank promotion raise, annotations are checked.

`JTL_TEST_DEVICES=8` runs it on eight simulated CPU devices.
"""

import os

devices = os.environ.get("JTL_TEST_DEVICES", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import importlib.util

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("jtl", "beartype.beartype")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore_glob = ["*/torch_*.py"]  # references in PyTorch, imported by the tests that have it


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="compares with PyTorch, which is not installed")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _torch_seed(request):
    """The initial weights of a reference do not depend on which tests ran before in the same process."""
    if request.node.get_closest_marker("torch"):
        pytest.importorskip("torch").manual_seed(0)
