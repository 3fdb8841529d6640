"""What the README says can be copied and run."""

import pathlib
import re

import pytest

from tests import tolerance

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.repo
def test_the_python_example_runs():
    alone, spread = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(compile(alone, str(README), "exec"), names)
    assert names["y_TD"].shape == names["x_TD"].shape and float(names["loss"]) > 0
    y_TD = names["y_TD"]
    exec(compile(spread, str(README), "exec"), names)
    tolerance.assert_close(names["y_TD"], y_TD, tolerance.F32)
    assert names["layer"].experts.w_in[...].sharding.spec[0] == "expert"


@pytest.mark.repo
def test_the_example_of_a_router_of_ones_own_runs(capsys):
    path = README.parent / "docs" / "routers.md"
    (example,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    names = {}
    exec(compile(example, str(path), "exec"), names)
    assert int(names["stats"].load_E.sum()) == 2 * 64 and 1 <= float(names["stats"].balance_loss) < 8
