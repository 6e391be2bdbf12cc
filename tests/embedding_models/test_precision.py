import pytest
import torch

from common.errors import UserError
from embedding_models.precision import check_precision, float32_products, precision_on

CUDA, CPU = torch.device("cuda"), torch.device("cpu")  # naming a device takes none


def flags():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("device", "precision", "half", "comes_to"),
    [
        (CUDA, "float32", True, "float32"),
        (CUDA, "tf32", True, "tf32"),
        (CUDA, "float16", True, "float16"),
        (CUDA, "float16", False, "tf32"),
        (CPU, "tf32", True, "float32"),
        (CPU, "float16", True, "float32"),
    ],
)
def test_what_a_precision_comes_to(device, precision, half, comes_to):
    assert precision_on(device, precision, half) == comes_to


def test_other_names_are_one_line():
    with pytest.raises(UserError, match='precision: expected one of "float32", "tf32", "float16", found \'bf16\''):
        check_precision("bf16")


@pytest.mark.parametrize("tf32", [True, False])
def test_products_are_set_inside_and_as_before_afterwards(tf32):
    before = flags()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = not tf32
        outside = flags()
        inside = []
        with pytest.raises(ZeroDivisionError), float32_products(CUDA, tf32):
            inside.append(flags()) or 1 / 0
        assert inside == [("high" if tf32 else "highest", tf32, tf32)]
        assert flags() == outside
        with float32_products(CPU, tf32):
            assert flags() == outside
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
