"""Runs .tflite bytes in LiteRT's interpreter, in this process."""

from __future__ import annotations

import numpy as np

from edgekit.model import Tensors


def run(data: bytes, feeds: Tensors, *, kernels: str = "AUTO") -> Tensors:
    """Outputs by signature name. kernels: a name of OpResolverType; AUTO is XNNPACK, BUILTIN_REF the reference."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=data, num_threads=1, experimental_op_resolver_type=getattr(OpResolverType, kernels)
    )
    runner = interpreter.get_signature_runner()
    inputs = {k: v["index"] for k, v in runner.get_input_details().items()}
    outputs = {k: v["index"] for k, v in runner.get_output_details().items()}
    del runner
    for name, value in feeds.items():
        interpreter.resize_tensor_input(inputs[name], value.shape)
    interpreter.allocate_tensors()
    for name, value in feeds.items():
        interpreter.set_tensor(inputs[name], value)
    interpreter.invoke()
    return {name: np.array(interpreter.get_tensor(index)) for name, index in outputs.items()}


def codes(data: bytes) -> list[str]:
    """The operators of the first subgraph, by the schema's names."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    return [names[model.operatorCodes[o.opcodeIndex].builtinCode] for o in model.subgraphs[0].operators]
