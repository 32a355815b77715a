"""Adapters: small trained leaves beside frozen ones, each a pair of pure functions `init` and `merge`.

adapter = peft.lora(["**/query", "**/value"], rank=8)
variables = peft.attach(adapter, variables, key=key)            # params gain subtrees `lora` beside kernels
loss_fn = jtl.supervised(peft.adapted(model, adapter), ...)
state, frozen = jtl.init(variables, tx, trainable=jtl.select("**/lora", "head"), key=key)
...
variables = peft.merge(adapter, jtl.variables(state, frozen))   # the plain model's variables again

The base may be stored in few bits: `variables = peft.quantize(variables, "nf4")` before `attach`.
"""

from jtl.peft.adapted import Adapted, adapted
from jtl.peft.adapter import Adapter, attach, detach, merge
from jtl.peft.bottleneck import bottleneck
from jtl.peft.ia3 import ia3
from jtl.peft.lora import dora, lora
from jtl.peft.many import route, stack, unstack
from jtl.peft.prompts import prefix, prompt
from jtl.peft.quantization import dequantize, quantize, quantized
from jtl.peft.store import load, save

__all__ = [
    "Adapted",
    "Adapter",
    "adapted",
    "attach",
    "bottleneck",
    "dequantize",
    "detach",
    "dora",
    "ia3",
    "load",
    "lora",
    "merge",
    "prefix",
    "prompt",
    "quantize",
    "quantized",
    "route",
    "save",
    "stack",
    "unstack",
]
