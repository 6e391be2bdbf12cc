"""Which device a name means: the one choice for audio encoders, training and searching."""

import torch

from common.errors import UserError


def choose_device(name: str, must_be_there: bool = True) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one.

    Raises `UserError` for a name that means none and, where it `must_be_there`, for a device this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"expected device to be auto, cpu, cuda or cuda:N, found {name!r}") from error
    if must_be_there and device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise UserError(f"expected a CUDA device for device {name!r}, found {found or 'no CUDA device'}; use cpu")
    return device
