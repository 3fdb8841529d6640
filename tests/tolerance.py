"""All tolerances of the test suite, in one place.

"Relative" is the error of a whole tensor: max |a - b| / max |b|.
"""

import numpy as np

# One f32 rounding is 6e-8; a sum of a few thousand terms in another order moves the last few digits.
F32 = 2e-6
# What a router and its losses compute of one token's logits, against NumPy in f64.
ROUTING = 1e-6
# The same sums on another number of devices.
LAYOUT = 1e-6
F64 = 1e-12
# Gradients of a whole model: some tens of layers' roundings on top of each other.
F32_MODEL = 1e-5
# One bf16 rounding is 2**-8 = 4e-3.
BF16 = 8e-3
# One f16 rounding is 2**-11 = 5e-4.
F16 = 1e-3


def relative_error(actual, expected) -> float:
    """max |actual - expected| / max |expected|, in f64; 0 when both are zero everywhere."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.size == 0:
        return 0.0
    if not np.isfinite(actual).all():
        return float("inf")
    difference = np.max(np.abs(actual - expected))
    return float(difference / np.max(np.abs(expected))) if difference else 0.0


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Fail with the relative error when it exceeds the tolerance."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
