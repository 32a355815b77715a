"""How each primitive moves the batch axis: rules for equations that call nothing else."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jtl.boundary.states import Const, Known, Mixed, Row, State, join, moved, opaque, without

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
    igamma igamma_grad_a igammac
    integer_pow is_finite le lgamma log log1p log2 logistic lt max min mul mulhi name ne neg
    nextafter not one_minus_square or
    optimization_barrier polygamma population_count pow real reduce_precision
    regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    sharding_constraint xor zeta""".split()
)
REDUCTIONS = frozenset(
    """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor""".split()
)
CUMULATIVE = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())
LAYOUT = frozenset(
    "broadcast_in_dim concatenate iota pad reshape rev slice split squeeze stack tile transpose unstack".split()
)


def _elementwise(eqn: Any, states: list[State], _: Known) -> State | list[State]:
    if eqn.primitive.name == "optimization_barrier":
        return states
    return join([(state, atom.aval.shape) for state, atom in zip(states, eqn.invars, strict=True)])


def _broadcast(eqn: Any, states: list[State], _: Known) -> State:
    dims, shape, operand = eqn.params["broadcast_dimensions"], eqn.params["shape"], eqn.invars[0].aval
    state = states[0]
    if isinstance(state, Row) and operand.shape[state.axis] != shape[dims[state.axis]]:
        return Mixed("one example is repeated over the batch axis")
    after = moved(state, dict(enumerate(dims)))
    if not isinstance(after, Const):
        return after
    repeated = {dims[axis] for axis, size in enumerate(operand.shape) if size == 1}
    return Const(after.uniform | repeated | (set(range(len(shape))) - set(dims)))


def _transpose(eqn: Any, states: list[State], _: Known) -> State:
    return moved(states[0], {old: new for new, old in enumerate(eqn.params["permutation"])})


def _squeeze(eqn: Any, states: list[State], _: Known) -> State:
    return moved(states[0], without(eqn.invars[0].aval.ndim, eqn.params["dimensions"]))


def _reshape(eqn: Any, states: list[State], _: Known) -> State:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    state = states[0]
    if eqn.params.get("dimensions") is not None:
        return Mixed("a reshape that permutes")
    if isinstance(state, Const):
        return Const(_reshaped_uniform(state.uniform, before, after))
    if not isinstance(state, Row):
        return state
    batch = before[state.axis] // (state.outer * state.inner)
    stride = math.prod(before[state.axis + 1 :]) * state.inner
    for axis, size in enumerate(after):
        tail = math.prod(after[axis + 1 :])
        inner = stride // tail if tail and stride % tail == 0 else 0
        if inner and size % (inner * batch) == 0:
            return Row(axis, size // (inner * batch), inner)
    return Mixed("a reshape that cuts through the batch axis")


def _reshaped_uniform(uniform: frozenset[int], before: Sequence[int], after: Sequence[int]) -> frozenset[int]:
    """The axes of `after` whose group of factors comes from uniform axes of `before` alone."""
    found = {axis for axis, size in enumerate(after) if size == 1}
    i = j = 0
    while i < len(before) and j < len(after):
        left, right, first_left, first_right = before[i], after[j], i, j
        i, j = i + 1, j + 1
        while left != right and (i < len(before) if left < right else j < len(after)):
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if all(axis in uniform or before[axis] == 1 for axis in range(first_left, i)):
            found |= set(range(first_right, j))
    return frozenset(found)


def _reduce(eqn: Any, states: list[State], _: Known) -> State:
    axes = eqn.params["axes"]
    if isinstance(states[0], Row) and states[0].axis in axes:
        return Mixed(f"{eqn.primitive.name} over the batch axis")
    return moved(states[0], without(eqn.invars[0].aval.ndim, axes))


def _along(parameter: str) -> Callable[..., State | list[State]]:
    """Primitives that mix the places along one axis: sorts, cumulative sums, reversals, concatenations."""

    def rule(eqn: Any, states: list[State], _: Known) -> State:
        axes = np.atleast_1d(eqn.params[parameter]).tolist()
        state = join([(state, atom.aval.shape) for state, atom in zip(states, eqn.invars, strict=True)])
        if isinstance(state, Row) and state.axis in axes:
            return Mixed(f"{eqn.primitive.name} along the batch axis")
        return Const(state.uniform - set(axes)) if isinstance(state, Const) else state

    return rule


def _pad(eqn: Any, states: list[State], _: Known) -> State:
    state = states[0]
    touched = {axis for axis, config in enumerate(eqn.params["padding_config"]) if any(config)}
    if isinstance(state, Row) and (state.axis in touched or not isinstance(states[1], Const)):
        return Mixed("padding of the batch axis")
    if isinstance(states[1], Row):
        return Mixed("padding with a value of an example")
    return Const(state.uniform - touched) if isinstance(state, Const) else state


def _slice(eqn: Any, states: list[State], _: Known) -> State:
    state = states[0]
    if isinstance(state, Row):
        axis, size = state.axis, eqn.invars[0].aval.shape[state.axis]
        strides = eqn.params["strides"] or (1,) * (axis + 1)
        if (eqn.params["start_indices"][axis], eqn.params["limit_indices"][axis], strides[axis]) != (0, size, 1):
            return Mixed("a slice of the batch axis")
    return state


def _stack(eqn: Any, states: list[State], _: Known) -> State:
    axis, ndim = eqn.params["axis"], eqn.invars[0].aval.ndim
    state = join([(state, atom.aval.shape) for state, atom in zip(states, eqn.invars, strict=True)])
    return moved(state, {old: old + (old >= axis) for old in range(ndim)})


def _unstack(eqn: Any, states: list[State], _: Known) -> State:
    return moved(states[0], without(eqn.invars[0].aval.ndim, [eqn.params["axis"]]))


def _tile(eqn: Any, states: list[State], _: Known) -> State:
    state, reps = states[0], eqn.params["reps"]
    if isinstance(state, Row) and (len(reps) != eqn.invars[0].aval.ndim or reps[state.axis] != 1):
        return Mixed("examples are repeated over the batch axis")
    return state if len(reps) == eqn.invars[0].aval.ndim else opaque(eqn.outvars[0].aval)


def _update(eqn: Any, states: list[State], _: Known) -> State:
    """`dynamic_update_slice`: a part of each example is overwritten, at one place for all."""
    operand, update = (atom.aval.shape for atom in eqn.invars[:2])
    state = join([(states[0], operand), (states[1], update)])
    if any(not isinstance(index, Const) for index in states[2:]):
        return Mixed("an update at a place that an example names")
    if isinstance(state, Row) and operand[state.axis] != update[state.axis]:
        return Mixed("an update of a part of the batch")
    return state if isinstance(state, Row | Mixed) else opaque(eqn.outvars[0].aval)


def _scatter(eqn: Any, states: list[State], _: Known) -> State:
    """The same by scattering, as in `x.at[:, 0].set(y)`."""
    numbers, (operand, _, update) = eqn.params["dimension_numbers"], (atom.aval.shape for atom in eqn.invars)
    if all(isinstance(state, Const) for state in states):
        return opaque(eqn.outvars[0].aval)
    if not isinstance(states[1], Const):
        return Mixed("an update at a place that an example names")
    hidden = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(operand)) if axis not in hidden]
    to = dict(zip(window, numbers.update_window_dims, strict=True))
    back = {theirs: mine for mine, theirs in to.items()}
    state = join([(states[0], operand), (moved(states[2], back), operand)])
    if isinstance(state, Row) and state.axis in to and state.axis not in numbers.scatter_dims_to_operand_dims:
        return state if operand[state.axis] == update[to[state.axis]] else Mixed("an update of a part of the batch")
    return state if isinstance(state, Mixed) else Mixed("an update of examples at places of the batch")


def _dynamic_slice(eqn: Any, states: list[State], _: Known) -> State:
    state = states[0]
    if any(not isinstance(index, Const) for index in states[1:]):
        return Mixed("a slice at a place that an example names")
    if isinstance(state, Row) and eqn.outvars[0].aval.shape[state.axis] != eqn.invars[0].aval.shape[state.axis]:
        return Mixed("a slice of the batch axis")
    return state


def _iota(eqn: Any, states: list[State], _: Known) -> State:
    return Const(frozenset(range(len(eqn.params["shape"]))) - {eqn.params["dimension"]})


def _dot_general(eqn: Any, states: list[State], _: Known) -> State:
    contracting, batch = eqn.params["dimension_numbers"]
    moves, offset = [], len(batch[0])
    for side in (0, 1):
        ndim = eqn.invars[side].aval.ndim
        free = [axis for axis in range(ndim) if axis not in contracting[side] and axis not in batch[side]]
        moves.append({axis: k for k, axis in enumerate(batch[side])} | {a: offset + k for k, a in enumerate(free)})
        offset += len(free)
    left, right = (moved(state, move) for state, move in zip(states, moves, strict=True))
    if isinstance(left, Mixed) or isinstance(right, Mixed):
        return Mixed("a product that sums over the batch axis")
    shared = set(range(len(batch[0])))
    if isinstance(left, Const) and isinstance(right, Const):
        own = [state.uniform - shared for state in (left, right)]
        return Const(own[0] | own[1] | (left.uniform & right.uniform & shared))
    if isinstance(left, Row) and isinstance(right, Row):
        return left if left == right and left.axis in shared else Mixed("a product of every example with every other")
    for row, other in ((left, right), (right, left)):
        if isinstance(row, Row) and not (row.axis in shared and not _goes_with(other, row)):
            return row
    return Mixed("weights that differ from place to place in the batch")


def _conv(eqn: Any, states: list[State], _: Known) -> State:
    image, kernel = states
    spec = eqn.params["dimension_numbers"]
    if isinstance(image, Row) and isinstance(kernel, Const):
        if image.axis == spec.lhs_spec[0] and eqn.params["batch_group_count"] == 1:
            return image._replace(axis=spec.out_spec[0])
    elif isinstance(image, Const) and isinstance(kernel, Const):
        return opaque(eqn.outvars[0].aval)
    return Mixed("a convolution over the batch axis, or with a kernel made of examples")


def _window(eqn: Any, states: list[State], _: Known) -> State:
    state, params = states[0], eqn.params
    if isinstance(state, Row):
        axis, ones = state.axis, (1,) * (state.axis + 1)
        sizes = (params["window_dimensions"], params["window_strides"], params.get("base_dilation") or ones)
        dilation = params.get("window_dilation") or ones
        plain = all(size[axis] == 1 for size in (*sizes, dilation)) and tuple(params["padding"][axis]) == (0, 0)
        others = all(isinstance(other, Const) for other in states[1:])
        return state if plain and others else Mixed("a window over the batch axis")
    return opaque(eqn.outvars[0].aval)


def _gather(eqn: Any, states: list[State], known: Known) -> State:
    numbers, (operand, indices) = eqn.params["dimension_numbers"], eqn.invars
    of_indices = [axis for axis in range(eqn.outvars[0].aval.ndim) if axis not in numbers.offset_dims]
    hidden = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(operand.aval.ndim) if axis not in hidden]
    of_operand = dict(zip(kept, numbers.offset_dims, strict=True))
    table, places = states
    if isinstance(table, Mixed):
        return table
    if isinstance(table, Const):
        found = moved(places, dict(enumerate(of_indices)))
        for mine, theirs in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            if mine not in table.uniform and isinstance(found, Row) and found.axis == of_indices[theirs]:
                return Mixed("a table that differs from place to place in the batch is looked up")
            if mine not in table.uniform and isinstance(found, Const):
                found = Const(found.uniform - {of_indices[theirs]})
        return found
    axis = table.axis
    whole = eqn.params["slice_sizes"][axis] == operand.aval.shape[axis]
    if isinstance(places, Const) and axis in of_operand and whole and axis not in numbers.start_index_map:
        return table._replace(axis=of_operand[axis])
    for mine, theirs in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        if mine == axis and _goes_with(places, table._replace(axis=theirs)):
            return table._replace(axis=of_indices[theirs])
    if axis in numbers.start_index_map and axis in numbers.collapsed_slice_dims and table == Row(axis):
        along = _own_rows(indices, numbers.start_index_map.index(axis), operand.aval.shape[axis], known)
        if along is not None:
            return Row(of_indices[along])
    return places if isinstance(places, Mixed) else Mixed("rows of the batch are looked up in one another")


def _goes_with(state: State, row: Row) -> bool:
    return state == row or (isinstance(state, Const) and row.axis in state.uniform)


def _own_rows(indices: Any, column: int, batch: int, known: Known) -> int | None:
    """The axis along which each example looks up itself, as in `x[jnp.arange(batch), i]`; None if it does not."""
    eqn = known.producers.get(indices)
    if eqn is None or eqn.primitive.name != "concatenate" or eqn.params["dimension"] != indices.aval.ndim - 1:
        return None
    if any(atom.aval.shape[-1] != 1 for atom in eqn.invars):
        return None
    counted = _evaluate(eqn.invars[column], known)
    others = [known.states[atom] for k, atom in enumerate(eqn.invars) if k != column and atom in known.states]
    if counted is None or len(others) != len(eqn.invars) - 1:
        return None
    for axis, size in enumerate(counted.shape[:-1]):
        along = np.arange(batch).reshape([-1 if k == axis else 1 for k in range(counted.ndim)])
        if size == batch and np.array_equal(counted, np.broadcast_to(along, counted.shape)):
            return axis if all(_goes_with(state, Row(axis)) for state in others) else None
    return None


def _evaluate(atom: Any, known: Known, depth: int = 12) -> np.ndarray | None:
    """An integer array that depends on no input, computed; None where it depends on one."""
    if isinstance(atom, jex.Literal):
        return np.asarray(atom.val)
    eqn = known.producers.get(atom)
    if eqn is None or not depth or eqn.effects or eqn.primitive.name not in {*ELEMENTWISE, "iota", "broadcast_in_dim"}:
        return None
    values = [_evaluate(operand, known, depth - 1) for operand in eqn.invars]
    if any(value is None for value in values):
        return None
    with jax.ensure_compile_time_eval():  # a split may be made while a step is being traced
        result = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
        return np.asarray(result[0] if eqn.primitive.multiple_results else result)


RULES: dict[str, Callable[..., State | list[State]]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _along("axis")),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"), _window),
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension"),
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-max", "scatter-min", "scatter-sub"), _scatter),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "slice": _slice,
    "sort": _along("dimension"),
    "split": _along("axis"),
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _along("axis"),
    "transpose": _transpose,
    "unstack": _unstack,
}
