import sys
import types

import jax
import numpy as np
import pytest

import custom_ops  # noqa: F401  (whole, before one of its modules is replaced)
from train import doctor


def grouped_matmul(rows_ND, w_EDF, group_sizes_E):
    expert_N = np.repeat(np.arange(len(group_sizes_E)), group_sizes_E)
    return np.einsum("nd,ndf->nf", np.float32(rows_ND), np.float32(w_EDF)[expert_N])


@pytest.fixture
def ops(monkeypatch):
    module = types.SimpleNamespace(
        grouped_matmul=grouped_matmul, default_implementation=lambda *_: ("windows", "the platform is cpu")
    )
    monkeypatch.setitem(sys.modules, "custom_ops.grouped_matmul", module)
    return module


def test_doctor_says_what_it_found(capsys, ops):
    assert doctor.doctor() is True
    lines = capsys.readouterr().out.splitlines()
    found = {line[:22].strip(): line[22:] for line in lines}
    assert found["jax"] == jax.__version__
    assert found["platform"] == "cpu, 8 devices"
    assert found["grouped matmul bf16"] == found["grouped matmul f32"] == "windows (the platform is cpu)"
    assert found["native ops, CPU"].startswith("built, uses ")
    assert found["native ops, CUDA"].startswith(("built, for ", "not built: "))
    assert {"device 0", "device 7", "machine", "cluster", "flax", "psum", "all_to_all"} <= set(found)
    assert " ms" in found["psum"] and " ms" in found["all_to_all"]


def test_doctor_notices_a_wrong_grouped_matmul(capsys, ops):
    ops.grouped_matmul = lambda *arguments: grouped_matmul(*arguments) + 1
    assert doctor.doctor() is False
    output = capsys.readouterr().out
    assert "grouped matmul bf16   FAILED: windows (the platform is cpu) gives a wrong answer" in output


@pytest.mark.parametrize("name", ["psum", "all_to_all"])
def test_doctor_notices_a_wrong_collective(capsys, monkeypatch, ops, name):
    right = getattr(jax.lax, name)
    monkeypatch.setattr(jax.lax, name, lambda *a, **k: right(*a, **k).at[0, 0].add(1))
    assert doctor.doctor() is False
    assert f"{name:<22}FAILED: wrong answer on 8 devices" in capsys.readouterr().out


def test_cluster_is_found_from_the_environment(monkeypatch):
    for variables in doctor.CLUSTERS.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    assert doctor.cluster() == "none found: a single process"
    for variable in doctor.CLUSTERS["Slurm"]:
        monkeypatch.setenv(variable, "")
        assert doctor.cluster() == "none found: a single process", "empty is unset"
    for variable in doctor.CLUSTERS["Slurm"]:
        monkeypatch.setenv(variable, "1")
    assert doctor.cluster() == "Slurm"
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "x")
    assert doctor.cluster() == "Open MPI"
