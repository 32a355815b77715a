"""Convolution, batch normalisation and pooling as the vision families share them.

Pictures are `[batch, height, width, channels]`, kernels `[height, width, in, out]`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jtl.models.depthwise import Window, depthwise, taps
from jtl.models.tracing import random_init
from jtl.tree import wide_dtype
from jtl.weights.convert import HWIO, KEEP, KeyRule

Padding = int | str | tuple[tuple[int, int], tuple[int, int]]
"""Pixels of zeros on each side; or above and below, left and right; or "SAME" as TensorFlow pads: the odd pixel
goes to the right and the bottom."""


class Conv(nn.Module):
    """A convolution in two dimensions.

    A kernel of one pixel is computed as a product of matrices.

    Attributes:
      features: channels of the output.
      kernel: height and width.
      stride: in both directions.
      padding: of both sides; see `Padding`.
      groups: of channels; as many as there are makes it depthwise.
      use_bias: whether a bias is added.
      dilation: pixels from one place of the kernel to the next.
      dtype: of the computation; by default that of inputs and parameters.
    """

    features: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    padding: Padding = 1
    groups: int = 1
    use_bias: bool = False
    dtype: jax.typing.DTypeLike | None = None
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, height, width, channels]` to the same with `features` channels."""
        size = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        shape = (*size, x.shape[-1] // self.groups, self.features)
        # Of all features a channel feeds those of its own group alone.
        init = random_init(nn.initializers.variance_scaling(2.0 * self.groups, "fan_out", "truncated_normal"))
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)) if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        settings = {"stride": self.stride, "groups": self.groups, "dilation": self.dilation}
        y = convolve(x, kernel, padding=self.padding, **settings)
        return y if bias is None else y + jnp.expand_dims(bias, (0, 1, 2))


def convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = 0, groups: int = 1, dilation: int = 1
) -> jax.Array:
    """Convolve pictures with a kernel.

    Args:
      x: `[batch, height, width, channels]`.
      kernel: `[height, width, channels / groups, features]`.
      stride: in both directions.
      padding: of both sides.
      groups: of channels.
      dilation: pixels from one place of the kernel to the next.

    Returns:
      `[batch, height', width', features]`.
    """
    if kernel.shape[:2] == (1, 1) and groups == 1 and padding in (0, "SAME"):
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])
    pads = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
    if groups == x.shape[-1] == kernel.shape[-1]:
        return depthwise(x, kernel, stride=stride, padding=pads, dilation=dilation)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running variance.

    In training the batch's own statistics are used, and the running ones move towards them; the running
    variance is unbiased (divided by n - 1), which that of `nn.BatchNorm` is not.

    Attributes:
      epsilon: added to the variance.
      momentum: what of the running statistics stays; PyTorch and transformers call 1 - momentum so.
      dtype: of the result; by default that of the input. Statistics are float32 at least.

    References:
      Ioffe and Szegedy, Batch normalization, 2015 (arXiv 1502.03167).
    """

    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool = True) -> jax.Array:
        """`[..., channels]` to the same."""
        channels = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones_init(), channels)
        bias = self.param("bias", nn.initializers.zeros_init(), channels)
        wide = wide_dtype(x.dtype)
        wide_x, factors = x.astype(wide), (scale.astype(wide), bias.astype(wide))
        if use_running_average:
            centre, spread = (value.value.astype(wide) for value in (mean, var))
            y = _normalised(wide_x, *factors, centre, spread, self.epsilon)
        else:
            y, centre, spread = batch_normalised(wide_x, *factors, self.epsilon)
            self._move(mean, var, centre, spread, x.size // x.shape[-1])
        return y.astype(self.dtype or x.dtype)

    def _move(self, mean: Any, var: Any, centre: jax.Array, spread: jax.Array, count: int) -> None:
        if self.is_initializing():
            return
        keep, unbiased = self.momentum, spread * (count / max(count - 1, 1))
        mean.value = keep * mean.value + (1 - keep) * centre.astype(mean.value.dtype)
        var.value = keep * var.value + (1 - keep) * unbiased.astype(var.value.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def batch_normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise by the batch's own statistics, over all axes but the last.

    Args:
      x: `[..., channels]`.
      scale: `[channels]`.
      bias: `[channels]`.
      epsilon: added to the variance.

    Returns:
      The normalised values, the mean, and the biased variance.
    """
    mean, var = jnp.mean(x, _leading(x)), jnp.var(x, _leading(x))
    return _normalised(x, scale, bias, mean, var, epsilon), mean, var


@batch_normalised.defjvp
def _(epsilon: float, primals: Any, tangents: Any) -> tuple[Any, Any]:
    # As sums over the batch times values of each channel: its transpose has two reductions, in one pass, where that
    # of the statement above has five, in three.
    x, scale, _ = primals
    dx, dscale, dbias = tangents
    y, mean, var = batch_normalised(*primals, epsilon)
    axes, inverse = _leading(x), jax.lax.rsqrt(var + epsilon)
    factor, centred = scale * inverse, x - _spread(mean, x)
    dmean, half = jnp.mean(dx, axes), jnp.mean(centred * dx, axes)
    slope, offset = inverse * dscale - factor * jnp.square(inverse) * half, dbias - factor * dmean
    dy = _spread(factor, x) * dx + centred * _spread(slope, x) + _spread(offset, x)
    return (y, mean, var), (dy, dmean, 2 * half)


def _normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array, epsilon: float
) -> jax.Array:
    factor = scale * jax.lax.rsqrt(var + epsilon)
    return (x - _spread(mean, x)) * _spread(factor, x) + _spread(bias, x)


def _leading(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _spread(channels: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(channels, _leading(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int = 0) -> jax.Array:
    """Maximum over square windows, `[batch, height, width, channels]`.

    Of equal values the first has the derivative, as in PyTorch.
    """
    return _native_max_pool(window, stride, padding, x)


def _native_max_pool(window: int, stride: int, padding: int, x: jax.Array) -> jax.Array:
    pads: Any = ((padding, padding), (padding, padding))
    return nn.max_pool(x, (window, window), (stride, stride), pads)


@max_pool.defjvp
def _(window: int, stride: int, padding: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # On CPU, XLA scatters the gradient value by value, which takes 4 to 20 times as long.
    shifted, plain = (functools.partial(way, window, stride, padding) for way in (_shifted_max_pool, _native_max_pool))

    def native(x: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(plain, (x,), (dx,))

    both: Any = jax.lax.platform_dependent(*primals, *tangents, cpu=shifted, default=native)
    return both


def _shifted_max_pool(
    window: int, stride: int, padding: int, x: jax.Array, dx: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The maxima, and of the tangents those at the first place of each."""
    place = Window(stride, 1, ((padding, padding), (padding, padding)))
    around = ((0, 0), *place.pads, (0, 0))
    values, slopes = jnp.pad(x, around, constant_values=-jnp.inf), jnp.pad(dx, around)
    seen, moved = (list(taps(place, padded, (window, window), (1, 2))) for padded in (values, slopes))
    y = functools.reduce(jnp.maximum, seen)
    first = jnp.zeros(y.shape, jnp.int32)
    for i in reversed(range(len(seen))):
        first = jnp.where(seen[i] == y, i, first)
    zero = jnp.zeros((), dx.dtype)
    return y, functools.reduce(jnp.add, (jnp.where(first == i, tap, zero) for i, tap in enumerate(moved)))


def conv_rules(path: str, source: str, *, bias: bool = False) -> list[KeyRule]:
    """The key rules of a PyTorch convolution: its weight, and its bias if it has one."""
    rules = [KeyRule(f"{path}/kernel", f"{source}.weight", HWIO)]
    return [*rules, KeyRule(f"{path}/bias", f"{source}.bias", KEEP)] if bias else rules


def norm_rules(path: str, source: str) -> list[KeyRule]:
    """The key rules of a PyTorch batch normalisation: parameters and statistics."""
    leaves = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return [KeyRule(f"{path}/{leaf}", f"{source}.{name}", KEEP) for leaf, name in leaves.items()]
