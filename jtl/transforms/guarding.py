"""Updates that would leave a run not finite, or that come from a loss far above the others, are skipped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtl.errors import ConfigError
from jtl.typing import Params, PyTree


class LossWindow(NamedTuple):
    """The losses of the last updates taken, the latest at the end.

    Attributes:
      losses: float32 `[window]`.
      known: bool `[window]`; False where there was none yet.
      refused: losses in a row that lay above the limit, int32 scalar.
    """

    losses: jax.Array
    known: jax.Array
    refused: jax.Array


class GuardState(NamedTuple):
    """The state of `guard`.

    Attributes:
      inner: of the transform inside, as the last update taken left it.
      skipped: updates skipped so far, int32 scalar.
      in_a_row: updates skipped since the last one taken, int32 scalar.
      recent: the losses that a spike is told by; None without `spike`.
    """

    inner: optax.OptState
    skipped: jax.Array
    in_a_row: jax.Array
    recent: LossWindow | None

    @property
    def ok(self) -> jax.Array:
        """Whether the last update was taken, bool scalar."""
        return self.in_a_row == 0


def guard(
    tx: optax.GradientTransformation, *, spike: float | None = None, window: int = 128
) -> optax.GradientTransformationExtraArgs:
    r"""The transform, without the updates that would do harm.

    An update is skipped, so that the trained leaves and the state of `tx` stay as they are, bit for bit, where

    - the loss (`value=`) or a gradient is not finite;
    - a trained leaf would not be finite after it, or a value of the state of `tx` no longer finite, as a moment whose
      square overflows;
    - with `spike`, the loss is above :math:`m + s \sigma`, by mean and standard deviation of the last `window` losses
      whose updates were taken. Nothing is a spike before there are so many; and where `window` losses in a row lie
      above it they are no spike but the level of the loss: the window starts anew.

    However many are skipped in a row, none that is not finite is ever taken. Whoever wants to stop then looks at
    `in_a_row`. All that decides is in the state, so a resumed run skips as the uninterrupted one.

        tx = jtl.transforms.guard(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), spike=6.0)

    It belongs around the whole chain: what stands behind it is not guarded. `jtl.train_step` then also keeps the
    statistics of a skipped step from moving, takes statistics that are not finite for a loss that is not, and reports
    `skipped` and `skipped_in_a_row`.

    Args:
      tx: any optax transform.
      spike: s, above 0; None skips what is not finite alone. OLMo takes 6.
      window: how many losses the mean is of, 2 or more.

    Returns:
      A transform; its `update(grads, state, params, value=loss)` needs the params, and with `spike` the loss, a real
      scalar. A skipped update is zeros (-0.0, which added to a negative zero leaves it as it is). Other arguments go
      on to `tx`.

    Raises:
      ConfigError: `spike` or `window` is out of range; while an update is traced: it lacks what it needs.

    References:
      Chowdhery et al, PaLM, 2022 (arXiv 2204.02311), section 5.1, on batches that make the loss spike; OLMo et al,
      2 OLMo 2 Furious, 2024 (arXiv 2501.00656), on steps skipped by the standard deviation of the loss.

    >>> tx = guard(optax.sgd(0.1, momentum=0.9))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params, value=jnp.array(1.0))
    >>> updates["w"].tolist(), state.inner[0].trace["w"].tolist(), int(state.skipped)
    ([-0.0, -0.0], [0.0, 0.0], 1)
    """
    if spike is not None and not spike > 0:
        raise ConfigError(f"spike={spike}: expected a number of standard deviations above 0, or None")
    if window < 2:
        raise ConfigError(f"window={window}: a standard deviation is of 2 losses or more")
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        zero = jnp.zeros((), jnp.int32)
        recent = LossWindow(jnp.zeros(window, jnp.float32), jnp.zeros(window, jnp.bool_), zero)
        return GuardState(tx.init(params), zero, zero, None if spike is None else recent)

    def update(updates: PyTree, state: Any, params: Params | None = None, **extra: Any) -> Any:
        if params is None:
            raise ConfigError("a guard needs the params: tx.update(grads, state, params, value=loss)")
        loss = extra.get("value")
        if spike is not None and loss is None:
            raise ConfigError("a guard with spike= needs the loss: tx.update(grads, state, params, value=loss)")
        new, inner = tx.update(updates, state.inner, params, **extra)
        ok = finite(updates) & finite(optax.apply_updates(params, new)) & finite(inner, state.inner) & finite(loss)
        recent = state.recent
        if spike is not None:
            ok, recent = _judged(recent, loss, spike, ok)
        new = choose(ok, new, jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), new))
        skipped = state.skipped + (~ok).astype(jnp.int32)
        return new, GuardState(choose(ok, inner, state.inner), skipped, jnp.where(ok, 0, state.in_a_row + 1), recent)

    return optax.GradientTransformationExtraArgs(init, update)


def finite(tree: PyTree, before: PyTree = None) -> jax.Array:
    """Whether all floats of a tree are finite, bool scalar; with `before`, those that were finite there."""

    def whole(leaf: Any, old: Any = None) -> jax.Array | None:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return None
        fine = jnp.isfinite(leaf)
        return jnp.all(fine if old is None else fine | ~jnp.isfinite(old))

    found = jax.tree.map(whole, tree) if before is None else jax.tree.map(whole, tree, before)
    flags = [jnp.array(True), *jax.tree.leaves(found)]
    # The barrier keeps XLA from writing the conjunction of all leaves' flags into every kernel that asks for it, which
    # makes programs, and the time to compile them, grow with the square of the number of leaves.
    return jnp.all(jax.lax.optimization_barrier(jnp.stack(flags)))


def choose(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """The new leaves, or the old ones, bit for bit, in the dtypes of the new."""
    return jax.tree.map(lambda new, old: jnp.where(ok, new, jnp.asarray(old, jnp.result_type(new))), new, old)


def guards(opt_state: optax.OptState) -> list[GuardState]:
    """The states of the guards in an optimizer's state; outer ones alone, where they are nested."""
    is_guard = lambda node: isinstance(node, GuardState)  # noqa: E731
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_guard) if is_guard(node)]


def _judged(recent: LossWindow, loss: Any, spike: float, ok: jax.Array) -> tuple[jax.Array, LossWindow]:
    """Whether an update that is finite is taken, and what is known then."""
    value = jnp.nan_to_num(jnp.asarray(loss).astype(jnp.float32))
    # From the last loss, and scaled: equal losses deviate by exactly nothing, and squares do not overflow.
    off = recent.losses - recent.losses[-1]
    scale = jnp.maximum(jnp.max(jnp.abs(off)), jnp.finfo(jnp.float32).tiny)
    limit = jnp.mean(off / scale) + spike * jnp.std(off / scale)
    high = jnp.all(recent.known) & ((value - recent.losses[-1]) / scale > limit)
    taken, refused = ok & ~high, recent.refused + (ok & high).astype(jnp.int32)
    level = refused >= recent.losses.size
    pushed = LossWindow(
        jnp.append(recent.losses[1:], value), jnp.append(recent.known[1:], True), jnp.zeros((), jnp.int32)
    )
    kept = LossWindow(recent.losses, recent.known & ~level, jnp.where(level, 0, refused))
    return taken, choose(taken, pushed, kept)
