"""Depthwise convolution against XLA's own, and what is compiled on which platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jtl.models.convolution import Conv, convolve
from jtl.models.depthwise import depthwise

from ..covering import covering  # noqa: TID252

# Height, width, kernel, stride, padding, dilation
SHAPES = [
    (7, 9, (3, 3), 1, ((1, 1), (1, 1)), 1),
    (8, 8, (3, 3), 2, "SAME", 1),
    (9, 7, (5, 5), 2, ((2, 2), (2, 2)), 1),
    (10, 11, (5, 5), 2, "SAME", 1),
    (8, 9, (3, 3), 2, ((0, 1), (0, 1)), 1),
    (9, 9, (3, 3), 1, "SAME", 2),
    (9, 10, (7, 7), 1, ((3, 3), (3, 3)), 1),
    (9, 8, (2, 4), 3, ((0, 0), (1, 2)), 1),
    (12, 12, (4, 4), 4, "VALID", 1),
    (11, 13, (1, 1), 2, "VALID", 1),
    (11, 12, (3, 2), 2, ((2, 1), (0, 3)), 3),
    (5, 5, (3, 3), 2, ((1, 1), (1, 1)), 1),
    (1, 2, (5, 5), 2, "SAME", 1),
]


def normal(seed, *shape, dtype="float32"):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def native(x, kernel, stride, padding, dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def functions(stride, padding, dilation):
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    return lambda x, k: depthwise(x, k, **settings), lambda x, k: native(x, k, **settings)


@pytest.mark.parametrize(("height", "width", "size", "stride", "padding", "dilation"), covering(SHAPES))
def test_values_and_gradients_are_those_of_the_grouped_convolution(height, width, size, stride, padding, dilation):
    both = functions(stride, padding, dilation)

    @jax.jit
    def values(x, kernel, seed):
        y, back = zip(*(jax.vjp(function, x, kernel) for function in both), strict=True)
        dy = jax.random.normal(seed, y[1].shape)
        return [(y, *back(dy)) for y, back in zip(y, back, strict=True)]

    got = values(normal(0, 3, height, width, 5), normal(1, *size, 1, 5), jax.random.key(2))
    for one, other in zip(*got, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * max(1, float(jnp.max(jnp.abs(other)))))


def test_values_against_a_sum_written_out():
    x, kernel, expected = normal(0, 1, 4, 5, 2), normal(1, 3, 3, 1, 2), np.zeros((1, 2, 3, 2))
    for h, w, i, j in np.ndindex(2, 3, 3, 3):
        row, column = 2 * h + i - 1, 2 * w + j - 1
        if 0 <= row < 4 and 0 <= column < 5:
            expected[0, h, w] += np.asarray(x)[0, row, column] * np.asarray(kernel)[i, j, 0]
    got = depthwise(x, kernel, stride=2, padding=((1, 1), (1, 1)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_each_example_and_each_kernel_under_vmap():
    x, kernel = normal(0, 2, 3, 6, 7, 4), normal(1, 2, 3, 3, 1, 4)
    ours, theirs = functions(2, "SAME", 1)

    def loss(function):
        return lambda x, k: jnp.sum(jnp.sin(function(x, k)))

    for axes in ((0, 0), (None, 0)):
        given = (x if axes[0] == 0 else x[0], kernel if axes[1] == 0 else kernel[0])
        got, expected = (jax.jit(jax.vmap(jax.grad(loss(f), (0, 1)), axes))(*given) for f in (ours, theirs))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_second_derivatives():
    x, kernel = normal(0, 2, 5, 6, 3), normal(1, 3, 3, 1, 3)
    got, expected = (
        jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(jax.grad(lambda k: jnp.sum(jnp.sin(f(x, k))))(k) ** 3), (0, 1)))(
            x, kernel
        )
        for f in functions(2, "SAME", 1)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(other))))


def test_half_precision_is_summed_in_float32():
    x, kernel = normal(0, 8, 15, 15, 4, dtype="bfloat16"), normal(1, 5, 5, 1, 4, dtype="bfloat16")
    ours, theirs = functions(1, "SAME", 1)
    y, back = jax.vjp(jax.jit(ours), x, kernel)
    wide, wide_back = jax.vjp(theirs, x.astype("float32"), kernel.astype("float32"))
    dy = normal(2, *y.shape, dtype="bfloat16")
    for one, other in zip((y, *back(dy)), (wide, *wide_back(dy.astype("float32"))), strict=True):
        assert one.dtype == jnp.bfloat16
        # One rounding to eight bits of the result, none on the way.
        np.testing.assert_allclose(one.astype("float32"), other, rtol=2**-8, atol=1e-4)


# What is compiled


def lowered(platform, function, *arguments):
    """The program for a platform, which need not be there."""
    return export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


GIVEN = (normal(0, 2, 8, 8, 6), normal(1, 3, 3, 1, 6))


def gradient(x, kernel):
    return jax.grad(lambda x, k: jnp.sum(jnp.sin(depthwise(x, k, stride=2, padding="SAME"))), (0, 1))(x, kernel)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_the_convolution_alone(platform):
    forward = lowered(platform, lambda x, k: depthwise(x, k, padding="SAME"), *GIVEN)
    assert forward.count("stablehlo.convolution") == 1
    assert "stablehlo.while" not in forward
    assert "stablehlo.slice" not in forward
    backward = lowered(platform, gradient, *GIVEN)
    assert backward.count("stablehlo.convolution") == 3
    assert "stablehlo.while" not in backward


def test_on_cpu_there_is_no_convolution_and_no_branch():
    for function in (lambda x, k: depthwise(x, k, padding="SAME"), gradient):
        compiled = jax.jit(function).lower(*GIVEN).compile().as_text()
        assert "convolution(" not in compiled
        assert "conditional(" not in compiled


def test_the_cost_is_that_of_one_way_alone():
    outputs, kernel = 2 * 8 * 8 * 6, 9
    ours = jax.jit(lambda x, k: depthwise(x, k, padding="SAME")).lower(*GIVEN).compile().cost_analysis()["flops"]
    assert ours <= 2 * kernel * outputs


def test_backpropagation_keeps_the_inputs_alone():
    _, back = jax.vjp(lambda x, k: depthwise(x, k, padding="SAME"), *GIVEN)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(back))
    assert kept == sorted(value.shape for value in GIVEN)


def test_a_gradient_that_nobody_asks_for_is_not_computed():
    def of(argnums):
        loss = jax.grad(lambda x, k: jnp.sum(jnp.sin(depthwise(x, k, padding="SAME"))), argnums)
        return jax.jit(loss).lower(*GIVEN).compile().as_text()

    assert "while(" in of(1)
    assert "while(" not in of(0)


# Through `Conv`


def test_conv_takes_the_depthwise_way_for_as_many_groups_as_channels():
    x, kernel = normal(0, 2, 9, 9, 6), normal(1, 3, 3, 1, 6)
    for groups, weights in ((6, kernel), (2, normal(1, 3, 3, 3, 6)), (6, normal(1, 3, 3, 1, 12))):
        jaxpr = str(jax.make_jaxpr(lambda w, g=groups: convolve(x, w, padding=1, groups=g))(weights))
        assert ("platform_index" in jaxpr) == (weights is kernel)
        got = convolve(x, weights, padding=((1, 1), (1, 1)), groups=groups, stride=2)
        expected = lax.conv_general_dilated(
            x,
            weights,
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_initial_kernels_keep_the_variance_of_a_channel():
    """A channel feeds the features of its own group alone: 2 / (3 * 3) for a depthwise 3x3."""
    variables = Conv(512, 3, groups=512).init(jax.random.key(0), jnp.zeros((1, 4, 4, 512)))
    np.testing.assert_allclose(np.var(variables["params"]["kernel"]), 2 / 9, rtol=0.1)


def test_a_dilated_convolution():
    x = normal(0, 1, 9, 9, 4)
    for groups, features in ((1, 3), (4, 4)):
        model = Conv(features, 3, padding=2, groups=groups, dilation=2)
        variables = model.init(jax.random.key(0), x)
        expected = lax.conv_general_dilated(
            x,
            variables["params"]["kernel"],
            (1, 1),
            ((2, 2), (2, 2)),
            rhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        np.testing.assert_allclose(model.apply(variables, x), expected, rtol=0, atol=1e-5)
