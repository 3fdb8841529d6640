"""The environment is input too: where it can work it works, else one line says which variable or limit is wrong."""

import os
import re
import resource
import subprocess
import sys

import jax
import pytest

from tests.train import launching, small
from train import environment
from train.environment import load_jax, require_devices
from train.errors import ConfigError

MOEJAX = f"{sys.executable} -m train"


def shell(line, folder, **variables):
    """Exit code, standard output and standard error of a line for the shell, whatever the caller has set for jax."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if "_CACHE_" in name or not name.startswith(("JAX_", "XLA_"))
    }
    cpu = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environ = ours | cpu | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""} | variables
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environ, capture_output=True, timeout=240, encoding="utf-8"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("limits", "variables", "message"),
    [
        (
            "",
            {"XLA_FLAGS": "--xla_foo=1"},
            "XLA_FLAGS = --xla_foo=1: Unknown flag in XLA_FLAGS: --xla_foo=1; unset it",
        ),
        ("", {"JAX_NUM_CPU_DEVICES": "abc"}, "JAX_NUM_CPU_DEVICES = abc: jax refuses it: Invalid value"),
        (
            "",
            {"JAX_PLATFORMS": "cuda"},
            # The second where jax has the plugin.
            "JAX_PLATFORMS = cuda: (there is no such device, or its driver or plugin is |Unable .* 'cuda')",
        ),
        ("", {"JAX_NUM_CPU_DEVICES": "9999"}, "JAX_NUM_CPU_DEVICES = 9999: must be at most 4096"),
        ("ulimit -n 20; ", {}, "ulimit -n = 20: must be at least 128 open files"),
    ],
)
def test_what_cannot_work_is_one_line_and_doctor_prints_the_rest(tmp_path, limits, variables, message):
    code, out, err = shell(f"{limits}{MOEJAX} doctor", tmp_path, **variables)
    assert code == 2 and re.match(f"error: {message}", err) and err.count("\n") == 1, err
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines[:2] == ["python", "moejax"] and "cluster" in lines
    assert ("native" in lines) == ("JAX_PLATFORMS" in variables), "what needs no device is shown before"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "variables", "message"),
    [
        ("", {"XLA_FLAGS": "/none"}, 'XLA_FLAGS = /none: Could not open file "/none"'),
        (
            "",
            {"XLA_FLAGS": "--xla_backend_optimization_level=x"},
            "XLA_FLAGS = .*: XLA refuses a value; unset it",
        ),
        (
            "",
            {"JAX_PLATFORMS": "nonsense"},
            "JAX_PLATFORMS = nonsense: .* is not in the list of known backends",
        ),
        ("", {"JAX_ENABLE_X64": "maybe"}, "JAX_ENABLE_X64 = maybe: jax refuses it: invalid truth value"),
        ("", {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "x"}, "SLURM_NTASKS = x: must be a whole number"),
        ("ulimit -v 300000; ", {}, "ulimit -v = 300000: must be at least 2097152 KiB"),
        (
            "ulimit -f 1; ",
            {"JAX_COMPILATION_CACHE_DIR": ""},
            r"workdir = .*: has no room for a checkpoint of .*ulimit -f",
        ),
        (
            "",
            dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
            r"workdir = .*: must be UTF-8, but this process reads names as ascii; set LC_ALL=C.UTF-8",
        ),
    ],
)
def test_no_run_begins_with_it(tmp_path, limits, variables, message):
    config = launching.write_config(tmp_path)
    code, out, err = shell(f"{limits}{MOEJAX} train {config} --workdir café", tmp_path, **variables)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.match(f"error: {message}", err), err
    assert not (tmp_path / "café").exists()


@pytest.mark.slow
def test_what_a_run_must_not_mind(tmp_path):
    """All at once: the numbers are those of a run without any of it."""
    config = launching.write_config(tmp_path)
    (tmp_path / "file").write_text("")
    odd = dict(
        JAX_ENABLE_X64="1",
        JAX_DISABLE_JIT="1",
        JAX_THREEFRY_PARTITIONABLE="0",
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "file"),
        PYTHONWARNINGS="error",
        PYTHONOPTIMIZE="2",
        PYTHONIOENCODING="ascii",
        TMPDIR="/none",
        MPLBACKEND="nonsense",
        COLUMNS="x",
    )
    train = f"{MOEJAX} train {config} --cpu-devices 2 --steps 4 --workdir"
    code, _, err = shell(f"unset HOME; {train} 'odd ☃'", tmp_path, **odd)
    assert code == 0 and all(f"warning: {name} = " in err for name in list(odd)[:4]), err
    assert "Error reading" not in err and err.count("warning: ") == 4
    assert shell(f"HOME= {train} closed <&- >&- 2>&-", tmp_path) == (0, "", "")
    assert shell(f"{train} unread 2>&1 | true", tmp_path)[0] == 0
    code, out, err = shell(f"{MOEJAX} report 'odd ☃'", tmp_path, **odd)
    assert code == 0 and out == "odd \\u2603/report/report.html\n", err
    metrics = [small.read_metrics(tmp_path / name) for name in ("odd ☃", "closed", "unread")]
    assert metrics[0] == metrics[1] == metrics[2] and len(metrics[0]) >= 4


def test_settings_of_jax_that_would_change_a_run_are_undone(caplog, tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
        load_jax()
        load_jax()
        assert not jax.config.jax_enable_x64 and jax.config.jax_compilation_cache_dir is None
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
        load_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        jax.config.update("jax_enable_x64", False)
        jax.config.update("jax_compilation_cache_dir", before)
    assert caplog.messages == [
        "JAX_ENABLE_X64 = True is ignored: a run's numbers follow from its config",
        f"JAX_COMPILATION_CACHE_DIR = {tmp_path / 'file'} is left out: File exists",
    ]


def test_a_driver_that_does_not_answer(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda':\n CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        ConfigError, match=r"^JAX_PLATFORMS = .*: Unable .*'cuda': CUDA_ERROR_NO_DEVICE; JAX_PLAT"
    ):
        require_devices()


@pytest.mark.parametrize(("most", "asked"), [(resource.RLIM_INFINITY, 32768), (1024, 1024)])
def test_more_files_are_asked_for(monkeypatch, most, asked):
    limits = {resource.RLIMIT_NOFILE: (64, most), resource.RLIMIT_AS: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", limits.get)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    environment._check_limits()
    assert limits[resource.RLIMIT_NOFILE] == (asked, most)


STREAMS = """
import os, sys
from train.cli import main
main(["--version"])
code = main(["nosuchcommand"])
os._exit(code if os.open("new", os.O_CREAT | os.O_WRONLY) > 2 else 1)
"""


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """Or what XLA writes to standard error would go into a checkpoint."""
    line = f"{sys.executable} -c '{STREAMS}'"
    assert shell(f"{line} <&- >&- 2>&-", tmp_path) == (2, "", "")
    full = (3, "", "error: standard output: No space left on device\n")
    for command, unbuffered in (("--help", ""), ("--help", "1"), ("report --help", "")):
        assert shell(f"{MOEJAX} {command} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered) == full
    assert shell(f"{MOEJAX} nosuchcommand 2> /dev/full", tmp_path) == (2, "", "")
