"""What the parity tests of the vision families share: a random reference, loading by a layout, comparisons.

    reference = randomised(SomeTorchModel(...), seed)
    model, variables = loaded(FAMILY, config, state(reference))          # or outputs=5, layout=FAMILY.layouts[1]
    check_features(FAMILY, model, variables, reference, run, pictures(seed))
    check_training_step(FAMILY, model, variables, reference, run, pictures(seed))

`run(reference, pixels)` gives torch's `(spatial [batch, channels, height, width], pooled [batch, width])`. Models and
pictures are `[batch, height, width, channels]`, PyTorch's `[batch, channels, height, width]`.

The reference's gradients are computed in float64, so that an error is ours alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jtl
from jtl import heads
from jtl.weights import convert

OUTPUTS = 1e-4
"""Largest difference of outputs and of statistics, relative to the largest magnitude where that is above one."""

GRADIENTS = 1e-3
"""Largest difference of a leaf's gradient, relative to the largest magnitude in that leaf."""


# References


def randomised(module, seed):
    """A torch module in float32 and evaluation mode, with every parameter and statistic random."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module.float().eval()


def state(module):
    """Copies of a torch module's tensors by name, as float32 of numpy."""
    return {name: value.detach().float().numpy().copy() for name, value in module.state_dict().items()}


def pictures(seed, shape=(2, 33, 47, 3)):
    """Normal noise, `[batch, height, width, channels]`."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(images):
    """`[batch, height, width, channels]` of numpy to PyTorch's `[batch, channels, height, width]`."""
    import torch

    return torch.from_numpy(np.transpose(images, (0, 3, 1, 2)).copy())


def to_numpy(tensor):
    """The values of a torch tensor; maps as `[batch, height, width, channels]`."""
    array = tensor.detach().numpy()
    return np.transpose(array, (0, 2, 3, 1)) if array.ndim == 4 else array


# Loading


def shapes(family, model):
    """The shapes of all variables; nothing is computed."""
    if model not in _SHAPES:
        inputs = family.example(model.config)

        def init():
            return model.init(jax.random.key(0), **{name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()})

        _SHAPES[model] = jax.eval_shape(init)
    return _SHAPES[model]


_SHAPES = {}  # tracing a large model takes longer than all else that a test does with its shapes


def random_variables(family, model, seed=0):
    """Random values for every leaf, variances among them; quicker than to compile the model's own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.array(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes(family, model))


def merged(variables):
    """The leaves of all collections in one tree, which have no path in common."""
    whole = {}
    for collection in variables.values():
        _add(whole, collection)
    return whole


def _add(whole, part):
    for name, value in part.items():
        if isinstance(value, dict):
            _add(whole.setdefault(name, {}), value)
        else:
            assert name not in whole, name
            whole[name] = value


def split(whole, like):
    """The leaves of `whole` by collection, in the structure of `like`."""
    leaves = dict(jtl.tree.leaves_with_paths(whole))
    return jtl.tree.map_with_paths(lambda path, _: leaves[path.partition("/")[2]], like)


def converted(family, model, tensors, layout=None):
    """Tensors by a layout's names, as variables of the model; strict both ways."""
    layout, like = layout or family.layouts[0], shapes(family, model)
    renamed = {layout.rename(name): value for name, value in tensors.items()}
    assert len(renamed) == len(tensors), "two tensors have the same normalised name"
    keys, ignored = layout.keys(model.config), layout.ignored(model.config)
    if model.head is None:
        # As `jtl.load` does: the head's rules say which tensors a model without a head leaves out.
        sources = [rule.source.replace(".", "/") for rule in keys if rule.path.startswith("head/")]
        ignored = (*ignored, *sources)
    whole = convert.convert(merged(like), renamed, keys, ignored=ignored)
    return split(whole, like)


def loaded(family, config, tensors, outputs=None, layout=None):
    """A model, with the family's own head where `outputs` are asked for, and its variables of float32."""
    head = None if outputs is None else heads.Linear(outputs)
    model = family.build(config, head)
    return model, jax.tree.map(jnp.array, converted(family, model, tensors, layout))


# Comparisons


def run_once(fn, *args):
    """A function's value; compiled in about half the usual time, to code that is slower."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn).lower(*args).compile(compiler_options=quick)(*args)


def assert_close(got, expected, tolerance=OUTPUTS, message=""):
    """The largest difference is within a tolerance, absolute below and relative above a magnitude of one."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape, f"{message}: {got.shape} instead of {expected.shape}"
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    error = float(np.max(np.abs(np.asarray(got, np.float64) - expected), initial=0))
    assert error <= tolerance * scale, f"{message}: off by {error:.2e}, with magnitudes up to {scale:.2e}"


def noise(gradients):
    """Four units in the last place of float32, of the global norm: what sums of thousands of terms are off by."""
    return 5e-7 * float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradients)))


def assert_gradients_close(got, expected, tolerance=GRADIENTS):
    """Each leaf's largest difference is within a tolerance of its largest magnitude.

    A gradient that is zero in exact arithmetic, such as that of a bias before a batch normalisation, is rounding
    noise in any other: for all leaves a difference of `noise` is allowed.
    """
    floor = noise(jax.tree.leaves(expected))
    right = dict(jtl.tree.leaves_with_paths(expected))
    for path, leaf in jtl.tree.leaves_with_paths(got):
        error, size = np.max(np.abs(np.asarray(leaf, np.float64) - right[path])), np.max(np.abs(right[path]))
        message = f"{path}: off by {error:.2e}, with magnitudes up to {size:.2e}, floor {floor:.2e}"
        assert error <= tolerance * size + floor, message


def gradients(family, model, reference, layout=None):
    """What `backward` left in a torch module, in the structure of the model's params."""
    tensors = {name: np.zeros(value.shape) for name, value in reference.state_dict().items()}
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            tensors[name] = parameter.grad.detach().numpy()
    return converted(family, model, tensors, layout)["params"]


def _weights(features):
    rng = np.random.default_rng(0)
    return [rng.normal(size=values.shape).astype(np.float32) for values in features]


def _backward(reference, run, images, weights):
    """Leave the gradients of weighted features in a module of float64."""
    import torch

    reference.zero_grad()
    out = [value.movedim(1, 3) if value.ndim == 4 else value for value in run(reference, to_torch(images).double())]
    sum((x * torch.from_numpy(w)).sum() for x, w in zip(out, weights, strict=True)).backward()


def _away_from_kinks(reference, run, images, weights, tolerance, before):
    """Pictures at which the gradient is continuous as far as rounding reaches.

    Where a rectifier's input, or the difference of two values that are pooled, is within rounding of zero, the
    gradient of any two implementations may differ by whole terms.
    """
    rng = np.random.default_rng(0)

    def found(images):
        _backward(reference, run, images, weights)
        reference.load_state_dict(before)
        return [p.grad.clone().numpy() for p in reference.parameters() if p.grad is not None]

    for _ in range(200):  # of a deep network with ReLU6, one picture in thirty
        here = found(images)
        floor = noise(here)

        def differ(a, b, floor=floor):
            return np.max(np.abs(a - b)) > 5 * tolerance * np.max(np.abs(a)) + floor

        for _ in range(3):
            there = found(images * (1 + 3e-6 * rng.normal(size=images.shape)))
            if any(map(differ, here, there)):
                break
        else:
            return images
        images = rng.normal(size=images.shape).astype(np.float32)
    raise AssertionError("no pictures away from kinks")


def _compare(family, model, variables, reference, run, images, layout, tolerance, outputs, *, training):
    """Features and gradients of both; what the model's statistics became."""
    reference.train(training)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    weights = _weights([to_numpy(value) for value in run(reference, to_torch(images))])
    reference.load_state_dict(before)
    images = _away_from_kinks(reference.double(), run, images, weights, tolerance, before)
    reference.float().load_state_dict(before)
    expected = [to_numpy(value) for value in run(reference, to_torch(images))]
    after = state(reference)
    reference.load_state_dict(before)

    def loss(params):
        out, changed = model.apply(
            {**variables, "params": params},
            jnp.array(images),
            deterministic=not training,
            method="features",
            mutable=["batch_stats"] if training else [],
        )
        return sum(jnp.sum(x * w) for x, w in zip(out, weights, strict=True)), (out, changed)

    (_, (got, changed)), found = run_once(jax.value_and_grad(loss, has_aux=True), variables["params"])
    for name, x, y in zip(("spatial", "pooled"), got, expected, strict=True):
        assert_close(x, y, outputs, name)

    _backward(reference.double(), run, images, weights)
    right = gradients(family, model, reference, layout)
    reference.float().eval().load_state_dict(before)
    backbone = {name: leaf for name, leaf in found.items() if name != "head"}
    assert_gradients_close(backbone, right, tolerance)
    return changed, after


def check_features(family, model, variables, reference, run, images, layout=None, tolerance=GRADIENTS, outputs=OUTPUTS):
    """Spatial and pooled features in evaluation, and the gradient of every leaf below the head, are torch's."""
    _compare(family, model, variables, reference, run, images, layout, tolerance, outputs, training=False)


def check_training_step(
    family, model, variables, reference, run, images, layout=None, tolerance=GRADIENTS, outputs=OUTPUTS
):
    """Features, gradients and moved statistics in training are torch's; dropout rates must be zero in both."""
    changed, after = _compare(
        family, model, variables, reference, run, images, layout, tolerance, outputs, training=True
    )
    expected = converted(family, model, after, layout)
    assert set(changed) == set(expected) - {"params"}
    moved = dict(jtl.tree.leaves_with_paths(expected))
    for path, leaf in jtl.tree.leaves_with_paths(changed):
        assert_close(leaf, moved[path], 1e-5, path)


def check_logits(model, variables, images, expected, outputs=OUTPUTS):
    """What the head gives in evaluation is torch's."""
    assert_close(run_once(model.apply, variables, jnp.array(images)), to_numpy(expected), outputs, "logits")


def depth_groups_partition(family, model):
    """Whether each leaf of the parameters is in exactly one of the family's groups."""
    params = shapes(family, model)["params"]
    taken = [jtl.select(*group)(params) for group in family.depth_groups(model) if group]
    return set(jax.tree.leaves(jax.tree.map(lambda *leaves: sum(leaves), *taken))) == {1}


def parameter_count(family, config, outputs):
    """The number of parameters of a configuration with its head, from shapes alone."""
    return jtl.tree.size(shapes(family, family.build(config, family.head(config, outputs)))["params"])


def tensor_shapes(family, config, outputs, layout=None):
    """The names and shapes that a checkpoint of a layout has, from the shapes of the model alone."""
    layout = layout or family.layouts[0]
    whole = merged(shapes(family, family.build(config, heads.Linear(outputs))))
    tensors = {}
    for path, leaf in jtl.tree.leaves_with_paths(whole):
        source, written = convert.locate(path, layout.keys(config))
        tensors[source] = written.write(np.broadcast_to(np.float32(0), leaf.shape)).shape
    return tensors
