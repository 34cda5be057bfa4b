"""Calibrated models under the names of FasterTransformer's files."""

from torch import Tensor, nn


def named_by_faster_transformer(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and ranges as NVIDIA's calibration scripts save them."""
    kinds = {"input": "_input", "weight": "_weight", "output": "_aftergemm"}
    parts = {"q": "matmul_q_input", "k": "matmul_k_input", "v": "matmul_v_input"}
    parts |= {"a": "matmul_a_input", "mha_q": "mha_q_input", "mha_k": "mha_k_input"}
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.removesuffix("._amax").rpartition(".")
        kind = leaf.removesuffix("_quantizer")
        if name.endswith("bias_correction"):
            continue
        if name.endswith("._amax"):
            name = f"{owner}.{(kinds | parts)[kind]}_quantizer._amax"
        state[name.replace(".qkv.q_bias", ".q_bias").replace(".qkv.v_bias", ".v_bias")] = tensor
    return state
