"""Features in files of torch.save and safetensors, read as data: nothing in them is executed."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from shine.data.arrays import check_claim, chosen
from shine.errors import InputError
from shine.published.pickled import StoredTensor, open_torch_file

_FLOAT32 = np.dtype(np.float32)
_SAFETENSORS = {  # the types with a meaning as features, and what each takes in memory
    **{name: np.dtype(f"float{name[1:]}") for name in ("F64", "F32", "F16")},
    "BF16": np.dtype(np.float16),
    **{name: np.dtype(f"int{name[1:]}") for name in ("I64", "I32", "I16", "I8")},
    "U8": np.dtype(np.uint8),
}


def read_torch(path: Path, key: str, form: str) -> np.ndarray:
    """The tensor in a file of torch.save: alone, or in a dictionary under `key` or alone.

    Raises:
        InputError: the file holds none, or asks for more than data.
    """
    with open_torch_file(path) as file:
        content = file.content
        if isinstance(content, StoredTensor):
            entry = content
        elif isinstance(content, dict):
            tensors = {str(k): v for k, v in content.items() if isinstance(v, StoredTensor)}
            entry = tensors[chosen(tensors.keys(), key, str(path))]
        else:
            raise InputError(f"{path}: expected a tensor or a dictionary of tensors")
        # Types without a like in NumPy are read as float32.
        check_claim(entry.size, _FLOAT32, str(path), form)
        tensor = file.tensors({"": entry})[""]
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.numpy()


def read_safetensors(path: Path, key: str, form: str) -> np.ndarray:
    """The tensor in a safetensors file, under `key` or alone.

    Raises:
        InputError: the file holds none, or is not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            name = chosen(file.keys(), key, str(path))
            part = file.get_slice(name)
            dtype = _SAFETENSORS.get(part.get_dtype())
            if dtype is None:
                raise InputError(f"{path}: expected numbers, got the type {part.get_dtype()}")
            check_claim(tuple(part.get_shape()), dtype, str(path), form)
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); write it again"
        ) from None
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.numpy()
