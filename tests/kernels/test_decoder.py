import pytest
import torch
from kernel_cases import random_decoder

from triplane_kernels import DensityMLP


def test_shapes() -> None:
    decoder = random_decoder(5, widths=(8, 7, 4))
    assert (decoder.in_channels, decoder.out_channels) == (5, 4)
    assert len(decoder.parameters) == 6


def test_to_and_detach_reach_every_parameter() -> None:
    decoder = DensityMLP(
        [torch.ones(3, 2, requires_grad=True), torch.ones(1, 3, requires_grad=True)],
        [None, torch.ones(1, requires_grad=True)],
        output="exp",
        bias_shift=-1.0,
    )
    double = decoder.to(torch.float64)
    assert {p.dtype for p in double.parameters} == {torch.float64}
    assert all(p.requires_grad for p in double.parameters)
    assert not any(p.requires_grad for p in decoder.detach().parameters)
    assert double.biases[0] is None
    assert (double.output, double.bias_shift) == ("exp", -1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (), "biases": ()}, "one weight or more"),
        ({"biases": (None,)}, "got 2 and 1"),
        ({"weights": (torch.ones(3), torch.ones(1, 3))}, r"weights\[0\] must be \[out, in\]"),
        ({"weights": (torch.ones(4, 2), torch.ones(1, 3))}, "takes 3 inputs.*gives 4"),
        ({"biases": (torch.ones(2), None)}, r"biases\[0\] must be \[3\], got \[2\]"),
        ({"hidden": "tanh"}, "hidden must be one of"),
        ({"output": "relu"}, "output must be one of"),
    ],
)
def test_refuses_what_is_no_decoder(change: dict, message: str) -> None:
    good = {"weights": (torch.ones(3, 2), torch.ones(1, 3)), "biases": (None, None)}
    with pytest.raises(ValueError, match=message):
        DensityMLP(**good | change)
