"""onnxruntime's MatMulNBits quantizer: default (round to nearest), HQQ and k_quant, on single products."""

import logging

import numpy as np
import onnx
from checkpoint import Checkpoint, Result
from onnx import TensorProto, helper, numpy_helper

PACKAGES = ("onnxruntime", "onnx", "torch")
SCALE = {"float16": np.float16, "float32": np.float32}


def products(linears: dict[str, np.ndarray], dtype) -> onnx.ModelProto:
    """A model that is nothing but the products: what the quantizer replaces one by one."""
    nodes, inputs, outputs, constants = [], [], [], []
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for name, weight in linears.items():
        nodes.append(helper.make_node("MatMul", [f"{name}.x", name], [f"{name}.y"], name=name))
        inputs.append(helper.make_tensor_value_info(f"{name}.x", kind, ["n", weight.shape[1]]))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", kind, ["n", weight.shape[0]]))
        constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.T.astype(dtype)), name))
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    return np.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(per_byte)], axis=-1).reshape(*packed.shape[:-1], -1)


def decode(model: onnx.ModelProto, linears: dict[str, np.ndarray]) -> Result:
    """Reads MatMulNBits nodes back; counts every byte of their operands."""
    constants = {c.name: c for c in model.graph.initializer}
    weights, stored, code = {}, 0, 0
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            raise ValueError(f"{node.name}: left as {node.op_type}")
        name = node.output[0].removesuffix(".y")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        bits, size, columns = attributes["bits"], attributes["block_size"], attributes["K"]
        operands = [numpy_helper.to_array(constants[i]) for i in node.input[1:] if i]
        rows = linears[name].shape[0]
        codes = unpack(operands[0].reshape(rows, -1), bits).astype(np.float32)
        groups = codes.shape[1] // size
        scales = operands[1].reshape(rows, groups).astype(np.float32)
        if len(operands) < 3:
            zeros = np.full((rows, groups), 2 ** (bits - 1), np.float32)
        elif operands[2].dtype == np.uint8:
            zeros = unpack(operands[2].reshape(rows, -1), bits)[:, :groups].astype(np.float32)
        else:
            zeros = operands[2].reshape(rows, groups).astype(np.float32)
        values = (codes.reshape(rows, groups, size) - zeros[..., None]) * scales[..., None]
        weights[name] = values.reshape(rows, -1)[:, :columns]
        stored += 8 * sum(o.nbytes for o in operands)
        code += bits * linears[name].size
    return Result(weights, stored, code)


def quantize(checkpoint: Checkpoint, options: dict) -> Result:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    logging.disable(logging.INFO)
    variant, bits, group = options["variant"], options["bits"], options["group"]
    linears = checkpoint.linears
    if bits == 3:
        raise ValueError("MatMulNBits has no 3-bit operand")
    if variant == "default":
        config = nbits.DefaultWeightOnlyQuantConfig(block_size=group, bits=bits)
    elif variant == "hqq":
        config = nbits.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
    else:
        config = nbits.KQuantWeightOnlyQuantConfig()
        if bits != 4:
            raise ValueError("k_quant writes 4 and 8 bits only")
    # HQQ stores its zero points as the weights are stored; float16 is the cheapest the operator takes.
    model = products(linears, SCALE[options.get("scales", "float16")])
    quantizer = nbits.MatMulNBitsQuantizer(model, bits=bits, block_size=group, algo_config=config)
    quantizer.process()
    return decode(quantizer.model.model, linears)
