"""The tensors that a checkpoint of inverted residual blocks has, by arithmetic: no model is traced for them."""


def tensors(network, layout, config, outputs):
    """Names and shapes in a layout, counters left out."""
    leaves = {"head/kernel": (outputs, network.top), "head/bias": (outputs,)}
    _add(leaves, "stem", network.stem, network.channels, 3)
    _add(leaves, "top", network.top, network.blocks[-1].features, 1)
    for block in network.blocks:
        at, inner = f"stages_{block.stage}/blocks_{block.index}", block.expanded or block.inputs
        if block.expanded:
            _add(leaves, f"{at}/expand", inner, block.inputs, 1)
        _add(leaves, f"{at}/depthwise", inner, 1, block.kernel)
        _add(leaves, f"{at}/project", block.features, inner, 1)
        if block.squeezed:
            for part, features, inputs in (("reduce", block.squeezed, inner), ("expand", inner, block.squeezed)):
                leaves[f"{at}/squeeze/{part}/kernel"] = (features, inputs, 1, 1)
                leaves[f"{at}/squeeze/{part}/bias"] = (features,)
    sources = {rule.path: rule.source for rule in layout.keys(config)}
    assert sources.keys() == leaves.keys()
    return {sources[path]: shape for path, shape in leaves.items()}


def _add(leaves, path, features, inputs, kernel):
    leaves[f"{path}/conv/kernel"] = (features, inputs, kernel, kernel)
    leaves.update({f"{path}/norm/{leaf}": (features,) for leaf in ("scale", "bias", "mean", "var")})


def parameters(shapes):
    """The number of parameters among tensors: all but the running statistics."""
    total = 0
    for name, shape in shapes.items():
        size = 1
        for extent in shape:
            size *= extent
        total += 0 if "running_" in name else size
    return total
