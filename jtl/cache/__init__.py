"""A store of what the frozen part of a model computes, so that it computes nothing twice."""

from jtl.cache.auto import Mode, Prepared, prepare
from jtl.cache.builder import Cache, CachedBatches, build
from jtl.cache.follow import Following, estimate, follow
from jtl.cache.store import Store

__all__ = ["Cache", "CachedBatches", "Following", "Mode", "Prepared", "Store", "build", "estimate", "follow", "prepare"]
