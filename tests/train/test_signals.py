"""Signals that stop a run: the first one in order, the second one at once."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import time
from train.signals import stop_signals
with stop_signals() as stop:
    print("ready", flush=True)
    while not stop.here():
        time.sleep(0.01)
    print("asked", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:  # as jax's own callbacks do
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"error: stopped at once by signal {number:d}"
