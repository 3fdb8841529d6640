"""One run in several processes: where they stand, that they agree, and that the numbers are those of one process."""

import contextlib
import os
import re
import shutil
import signal
import sys
import time
import types

import pytest

from tests import tolerance
from tests.train import launching, small
from tests.train.launching import children, has_state, is_gone, run, start, wait_for_step, wait_until
from train import joining, launch, processes
from train.config import MeshConfig
from train.errors import ConfigError, TrainingFailed
from train.integrity import find_fault, writer_of
from train.lock import lock_run
from train.place import Place, find_place, gpu_of, open_mpi_place, slurm_place
from train.reporter import QUEUED

pytestmark = pytest.mark.landing


@pytest.mark.parametrize(
    ("options", "environment", "place"),
    [
        ({}, {}, None),
        (
            {},
            {"MOEJAX_COORDINATOR": "h:1", "MOEJAX_PROCESSES": "2", "MOEJAX_PROCESS_ID": "1"},
            Place("h:1", 2, 1, listens_on="h:1"),
        ),
        (
            {"process_id": "0"},
            {"MOEJAX_COORDINATOR": "h:1", "MOEJAX_PROCESSES": "2", "MOEJAX_PROCESS_ID": "1"},
            Place("h:1", 2, 0, listens_on="h:1"),
        ),
        (
            {"coordinator": "[::1]:80", "processes": "3", "process_id": "2"},
            {},
            Place("[::1]:80", 3, 2, listens_on="[::1]:80"),
        ),
        (
            {"coordinator": "h:1", "processes": "4", "process_id": "3"},
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Place("h:1", 4, 3, 2, 1, "h:1"),
        ),
    ],
)
def test_a_place_is_found(options, environment, place):
    assert find_place(options, environment) == place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": "2"}, r"--coordinator = \(nothing\): must be given along with"),
        ({"coordinator": "h", "processes": "2", "process_id": "0"}, "--coordinator = h: must be HOST:PORT"),
        ({"coordinator": "h:99999", "processes": "2", "process_id": "0"}, "--coordinator = h:99999: must be"),
        ({"coordinator": "h:1", "processes": "two", "process_id": "0"}, "--processes = two: must be a whole"),
        ({"coordinator": "h:1", "processes": "0", "process_id": "0"}, "--processes = 0: must be at least 1"),
        (
            {"coordinator": "h:1", "processes": "2", "process_id": "2"},
            r"--process-id = 2: must be below .*\(2\)",
        ),
        ({"coordinator": "h:1", "processes": "2", "process_id": "-1"}, "--process-id = -1: must be a whole"),
    ],
)
def test_a_bad_place_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        find_place(options, {})


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004,9],other",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("find", "environment", "place"),
    [
        (slurm_place, {}, None),
        (slurm_place, SLURM, Place("gpu003:61447", 5, 4, 1, 0)),
        (slurm_place, SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, Place("n1:61447", 5, 4, 1, 0)),
        (slurm_place, SLURM | {"SLURM_STEP_ID": "1", "SLURM_NODEID": "1"}, Place("gpu003:61508", 5, 4, 2, 0)),
        (slurm_place, {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),  # the shell of an allocation
        (slurm_place, SLURM | {"SLURM_NTASKS": "1"}, None),
        (open_mpi_place, {}, None),
        (open_mpi_place, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (
            open_mpi_place,
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "20480.0;tcp://10.0.0.1,10.1.0.1:35851;tcp6://[fd00::2]:1"},
            Place("10.0.0.1:61445", 2, 1, 2, 1),
        ),
        (
            open_mpi_place,
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "20480.0;tcp6://[fd00::2,fd00::3]:51673"},
            Place("[fd00::2]:61445", 2, 1, 2, 1),
        ),
        (
            open_mpi_place,
            OPEN_MPI | {"PMIX_NAMESPACE": "prterun-node-7-4097@1"},
            Place("node-7:61441", 2, 1, 2, 1),
        ),
    ],
)
def test_schedulers_say_where_a_process_stands(find, environment, place):
    assert find(environment) == place


def test_an_open_mpi_that_does_not_say_where_process_0_is_is_refused():
    with pytest.raises(ConfigError, match=r"^--coordinator = .*does not say where process 0 is"):
        open_mpi_place(OPEN_MPI)


def test_the_gpu_of_a_process():
    alone, second = slurm_place(SLURM), open_mpi_place(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-n-1@1"})
    assert gpu_of(alone, {"CUDA_VISIBLE_DEVICES": "0,1"}) is None, "all GPUs of its node"
    assert gpu_of(second, {"CUDA_VISIBLE_DEVICES": "0,1"}) == gpu_of(second, {}) == 1
    with pytest.raises(ConfigError, match=r"^CUDA_VISIBLE_DEVICES = 0: process 1 .*never --gpus-per-task"):
        gpu_of(second, {"CUDA_VISIBLE_DEVICES": "0"})


def test_a_coordinator_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 0.5)
    with pytest.raises(
        ConfigError, match=r"^--coordinator = 127.0.0.1:1: process 1 could not reach port 1 .*refused"
    ):
        joining.join({"coordinator": "127.0.0.1:1", "processes": "2", "process_id": "1"})


def test_variables_that_are_empty_say_nothing(monkeypatch):
    monkeypatch.setattr(joining, "_join_on_kubernetes", pytest.fail)
    kinds = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS", "JOBSET_NAME", "MOEJAX_PROCESSES")
    joining.join({}, dict.fromkeys(kinds, ""))
    for name in kinds:
        joining.join({}, {name: ""})
    alone = {"MOEJAX_COORDINATOR": "localhost:1", "MOEJAX_PROCESSES": "1", "MOEJAX_PROCESS_ID": "0"}
    joining.join({}, alone | {"MOEJAX_PROCESSES_PER_NODE": "", "OMPI_COMM_WORLD_LOCAL_SIZE": ""})


@pytest.fixture
def config(tmp_path):
    return launching.write_config(tmp_path, mesh=MeshConfig(expert=4))


def launched(config, workdir, *options):
    return launching.launched(2, 2, config, workdir, *options)


OPTIONS = ("--steps", 24, "--eval.every", 12)


@pytest.fixture
def undisturbed(config, tmp_path):
    """Metrics of the run in two processes."""
    output = run(*launched(config, tmp_path / "two", *OPTIONS))
    assert "\x1b" not in output and output.count("step 24/24") == 2, "only process 0 shows its progress"
    assert (tmp_path / "two" / "logs" / "process-1.txt").exists()
    return small.read_metrics(tmp_path / "two")


def test_two_processes_train_like_one(config, tmp_path, undisturbed):
    run("train", config, "--workdir", tmp_path / "one", "--cpu-devices", 4, *OPTIONS)
    one = small.read_metrics(tmp_path / "one")
    assert [line["step"] for line in undisturbed] == [line["step"] for line in one]
    for expected, actual in zip(one, undisturbed, strict=True):
        for name in {"loss", "aux_loss", "grad_norm", "eval/loss"} & set(expected):
            tolerance.assert_close(actual[name], expected[name], tolerance.F32_MODEL, name)


@pytest.mark.slow
def test_other_numbers_of_processes_go_on_from_a_checkpoint_of_two(config, tmp_path, undisturbed):
    for count, devices in ((1, 4), (4, 1)):
        workdir = tmp_path / f"two, then {count}"
        shutil.copytree(tmp_path / "two", workdir)
        oldest, *later = sorted((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
        for path in later:
            shutil.rmtree(path)
        output = run(*launching.launched(count, devices, config, workdir, *OPTIONS))
        assert f"going on after step {oldest.name}" in output and "step 24/24" in output
        lines = small.read_metrics(workdir)
        assert [line["step"] for line in lines] == [line["step"] for line in undisturbed]
        for expected, actual in zip(undisturbed, lines, strict=True):
            for name in {"loss", "eval/loss"} & set(expected):
                what = f"{name}, {expected['step']}"
                tolerance.assert_close(actual[name], expected[name], tolerance.F32_MODEL, what)


SIGNALLED_IN_THE_LAST_EVALUATION = """
import os, signal, time
from train import evaluate, evaluator

take, call = evaluate.device_batch, evaluator.Evaluator.__call__

def slow(batch, mesh):
    time.sleep(1)
    return take(batch, mesh)

def signalled(self, step, state):
    if step == 24:
        evaluate.device_batch = slow
        if os.environ["MOEJAX_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
    return call(self, step, state)

evaluator.Evaluator.__call__ = signalled

"""


@pytest.mark.slow
def test_processes_are_stopped_and_killed_together_and_go_on_to_the_same_bits(config, tmp_path, undisturbed):
    workdir = tmp_path / "disturbed"
    process = start(*launched(launching.paced(config), workdir, *OPTIONS))
    wait_for_step(workdir, 7, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143 and "stopped by signal 15" in output, output

    process = start(*launched(launching.paced(config), workdir, *OPTIONS))
    wait_for_step(workdir, 17, process)
    first, second = children(process)
    os.kill(second, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 3 and "error: process 1 of 2 ended with code 137" in output, output
    assert is_gone(first) and is_gone(second)

    signalled = config.with_name("signalled.py")
    signalled.write_text(SIGNALLED_IN_THE_LAST_EVALUATION + config.read_text())
    output = run(*launched(signalled, workdir, *OPTIONS), code=143)
    assert "stopped by signal 15 after step 24" in output and (workdir / "checkpoints" / "24").is_dir()
    assert small.read_metrics(workdir) == undisturbed[:-1], "all but the last evaluation"

    run(*launched(config, workdir, *OPTIONS))
    assert small.read_metrics(workdir) == undisturbed, "to the last bit"


def test_a_killed_process_is_named_although_its_victim_is_seen_to_end_first(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\n[ "$MOEJAX_PROCESS_ID" = 0 ] && exit 3\nsleep 0.3; kill -9 $$\n')
    program.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    with pytest.raises(TrainingFailed, match="process 1 of 2 ended with code 137"):
        launch.launch(["train", "--workdir", str(tmp_path / "run")], processes=2, devices=1)


def test_bad_input_of_a_launched_run_writes_nothing(config, tmp_path):
    output = run(*launched(config, tmp_path / "run", "--mesh.expert", 3), code=2)
    assert output.strip().splitlines()[-1].startswith("error: mesh.expert = 3: ")
    assert not (tmp_path / "run").exists()
    output = run("launch", "--processes", 0, "train", config, code=2)
    assert output == "error: --processes = 0: must be between 1 and 4096\n"
    output = run("launch", "--processes", 2, "eval", "x", code=2)
    assert output.startswith("error: COMMAND... = eval: must be a command line that begins with train")


def test_a_killed_or_failed_process_is_likelier_the_cause_than_one_that_lost_the_others(
    tmp_path, monkeypatch
):
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/sh\n[ "$MOEJAX_PROCESS_ID" = 0 ] && exit 134\nsleep 0.3; echo "error: full"; exit 3\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    with pytest.raises(TrainingFailed, match=r"process 1 of 2 ended with code 3 \| error: full"):
        launch.launch(["train", "--workdir", str(tmp_path / "run")], processes=2, devices=1)


def test_a_process_that_is_stopped_is_the_cause_when_all_others_are_victims(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\n[ "$MOEJAX_PROCESS_ID" = 1 ] && kill -STOP $$\nsleep 0.3; exit 134\n')
    program.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(program))
    monkeypatch.setattr(launch, "GRACE_SECONDS", 2)
    with pytest.raises(
        TrainingFailed, match="process 1 of 3 did not end when the others had, and was killed"
    ):
        launch.launch(["train", "--workdir", str(tmp_path / "run")], processes=3, devices=1)


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_that_comes_while_workers_start_reaches_them_all(monkeypatch, times):
    workers = []

    class Started:
        """A worker that ends as soon as it gets a signal; the first one's start is when signals come."""

        def __init__(self, number, *_):
            self.number, self.came = number, []
            self.process = types.SimpleNamespace(poll=lambda: 143 if self.came else 0, returncode=143)
            workers.append(self)
            for _ in range(times if number == 0 else 0):
                signal.raise_signal(signal.SIGTERM)

        def signal(self, number):
            self.came.append(number)

        def end(self):
            return 143

    monkeypatch.setattr(launch, "Worker", Started)
    if times == 1:
        assert launch.launch(["train"], processes=3, devices=1) == 143
    else:
        with pytest.raises(launch.StoppedAtOnce):
            launch.launch(["train"], processes=3, devices=1)
    asked = [signal.SIGTERM, signal.SIGKILL][:times]
    assert [worker.came[:times] for worker in workers] == [asked] * 3


LAUNCHED = """
import sys
from train import cli
sys.executable, workdir = sys.argv[1:]
sys.exit(cli.main(["launch", "--processes", "2", "train", "quickstart", "--workdir", workdir]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_launched_run_at_once(tmp_path, number):
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport signal, time\nshow = lambda line: print(line, flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: show('asked'))\nshow('[Gloo] Rank 0 is connected')\n"
        "show('ready')\nwhile True:\n    time.sleep(0.1)\n"
    )
    program.chmod(0o700)
    process = start("-c", LAUNCHED, program, tmp_path / "run", command=[sys.executable])
    assert process.stdout.readline() == "ready\n", "what Gloo says is left out"
    wait_until(lambda: len(children(process)) == 2)
    workers = children(process)
    suspended = lambda: [has_state(pid, "T") for pid in (process.pid, *workers)]  # noqa: E731
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(suspended()))
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not any(suspended()))
    process.send_signal(number)
    assert "the same again stops at once" in process.stdout.readline()
    assert process.stdout.readline() == "asked\n"
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "error: stopped at once by signal" in output, output
    assert len(workers) == 2 and all(is_gone(pid) for pid in workers)


def test_nobody_is_left_behind_when_a_suspended_launcher_is_killed(tmp_path):
    """A signal to end, which the workers then get, waits for as long as they are suspended."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport ctypes, os, pathlib, signal, time\n"
        f"saved = pathlib.Path({str(tmp_path)!r}, 'saved.' + os.environ['MOEJAX_PROCESS_ID'])\n"
        "signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), os._exit(143)))\n"
        "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
        "print('ready', flush=True)\nsaved.with_suffix(saved.suffix + '.ready').touch()\n"
        "while True:\n    time.sleep(0.1)\n"
    )
    program.chmod(0o700)
    process = start("-c", LAUNCHED, program, tmp_path / "run", command=[sys.executable])
    wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    workers = children(process)
    process.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(has_state(pid, "T") for pid in (process.pid, *workers)))
    process.kill()
    try:
        wait_until(lambda: all(is_gone(pid) for pid in workers), seconds=20)
    finally:
        for pid in workers:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and {path.name for path in tmp_path.glob("saved.?")} == {"saved.0", "saved.1"}
    process.communicate()


def test_a_signal_is_passed_on_although_nobody_reads_the_launcher_any_more(tmp_path):
    """After Ctrl-C in `moejax launch ... 2>&1 | tee log` the other end of the pipe is gone too."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, sys, time\n"
        f"folder, number = pathlib.Path({str(tmp_path)!r}), os.environ['MOEJAX_PROCESS_ID']\n"
        "def stop(*_):\n    time.sleep(0.3)\n    (folder / f'saved.{number}').touch()\n    os._exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n(folder / f'ready.{number}').touch()\n"
        "while True:\n    time.sleep(0.1)\n"
    )
    program.chmod(0o700)
    process = start("-c", LAUNCHED, program, tmp_path / "run", command=[sys.executable])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 143
    assert len(list(tmp_path.glob("saved.*"))) == 2


@pytest.mark.parametrize(
    ("broken", "code", "message"),
    [
        ("text.txt", 2, r"error: data.path = .*: no such file or folder( \(seen by process 1\))?$"),
        (".lock", 2, r"error: workdir = .*: is in use by process \d+ on [^(]*( \(seen by process 0\))?$"),
        ("config.yaml", 3, r"error: (process 0: )?\[Errno 28\] No space left on device$"),
    ],
)
def test_what_one_process_alone_finds_ends_all_with_the_same_code(config, tmp_path, broken, code, message):
    text = config.read_text()
    if broken == "text.txt":  # process 1 looks for it elsewhere, as on a node without the file system
        name = repr(str(tmp_path / "text.txt"))
        path = f"({name} if __import__('os').environ['MOEJAX_PROCESS_ID'] == '0' else '/none/text.txt')"
        text = text.replace(name, path)
    if broken == "config.yaml":
        full = "def full(*_): raise OSError(28, 'No space left on device')"
        text = f"import train.loop\n{full}\ntrain.loop.save_config = full\n{text}"
    config.write_text(text)
    (tmp_path / "run").mkdir()
    words = ("train", config, "--cpu-devices", 2, "--workdir", tmp_path / "run")
    place = {"MOEJAX_COORDINATOR": f"127.0.0.1:{launch._free_port()}", "MOEJAX_PROCESSES": "2"}
    with lock_run(tmp_path / "run") if broken == ".lock" else contextlib.nullcontext():
        both = [start(*words, env=place | {"MOEJAX_PROCESS_ID": str(number)}) for number in range(2)]
        outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [code, code], outputs
    for output in outputs:
        assert re.search(message, output, re.M) and "barrier" not in output.lower(), output


def test_who_waits_for_others_says_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(joining, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 1)
    with pytest.raises(ConfigError):
        joining.join({"coordinator": "127.0.0.1:1", "processes": "2", "process_id": "1"})
    assert caplog.messages == ["process 1 of 2 waits for process 0 at 127.0.0.1:1, up to 1 s"]


WAITING = """
import sys
from train import cli, joining
joining.PATIENCE_SECONDS, joining.CONNECT_SECONDS = 1, LIMIT
sys.exit(cli.main(["train", "quickstart", "--workdir", "/none", "--processes", "3", *sys.argv[1:]]))
"""


def test_process_0_says_how_many_others_have_come_and_gives_up_without_the_rest():
    address = f"127.0.0.1:{launch._free_port()}"

    def begin(number, limit):
        script = WAITING.replace("LIMIT", limit)
        place = ("--coordinator", address, "--process-id", number)
        return start("-c", script, *place, command=[sys.executable])

    second = begin(1, "60")
    assert (
        second.stdout.readline() == f"warning: process 1 of 3 waits for process 0 at {address}, up to 60 s\n"
    )
    first = begin(0, "4")
    output = first.communicate(timeout=120)[0]
    there = f"the others to come to {address} (1 of 2 are there)"
    assert first.returncode == 2 and output.splitlines() == [
        f"warning: process 0 of 3 waits for {there}, up to 4 s",
        f"error: --coordinator = {address}: process 0 of 3 has waited 4 s for {there}; look at the output of those "
        "that are not",
    ]
    second.kill()
    output = second.communicate(timeout=60)[0]
    assert output == f"warning: process 1 of 3 waits for the others to come to {address}, up to 60 s\n"


# Process 1 is of a release that has a field more or less.
OTHER_FIELDS = """
import os
from train import loop

flatten = loop.flatten
if os.environ["MOEJAX_PROCESS_ID"] == "1":
    loop.flatten = lambda config: CHANGE

"""


@pytest.mark.parametrize(
    ("change", "options", "name", "values"),
    [
        (None, ("--seed", 7), "seed", ("0", "7")),
        pytest.param(
            "flatten(config) | {'new': 1}", (), "new", ("(no such field)", "1"), marks=pytest.mark.slow
        ),
        pytest.param(
            "{k: v for k, v in flatten(config).items() if k != 'seed'}",
            (),
            "seed",
            ("0", "(no such field)"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["value", "field more", "field less"],
)
def test_processes_with_different_configs_refuse_to_begin(config, tmp_path, change, options, name, values):
    if change is not None:
        config.write_text(OTHER_FIELDS.replace("CHANGE", change) + config.read_text())
    place = {"MOEJAX_COORDINATOR": f"127.0.0.1:{launch._free_port()}", "MOEJAX_PROCESSES": "2"}
    words = ("train", config, "--cpu-devices", 2, "--workdir", tmp_path / "run")
    both = [
        start(*words, *more, env=place | {"MOEJAX_PROCESS_ID": str(number)})
        for number, more in enumerate(((), options))
    ]
    outputs = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], outputs
    for number, output in enumerate(outputs):
        rule = "must be the same in every process, but that of process 1 is not that of process 0"
        line = f"error: {name} = {values[number]} in process {number}: {rule}"
        assert line in output.splitlines() and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


def test_versions_are_compared_before_what_follows_from_them():
    first = {"versions": "1", "old": "a", "seed": "0"}
    second = {"versions": "2", "seed": "0", "new": "b"}
    differing = processes._differing([first, second, first])
    assert list(differing.items()) == [("versions", [1]), ("old", [1]), ("new", [1])]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """Folder, config, and the metrics of 50 steps on one device."""
    folder = tmp_path_factory.mktemp("layouts")
    config = launching.write_config(folder)
    run("train", config, "--workdir", folder / "one", "--cpu-devices", 1, "--steps", 50)
    return folder, config, small.read_metrics(folder / "one")


# A further mesh axis is one more row.
MESHES = [
    ("--mesh.expert", 1),
    ("--mesh.expert", 2),
    ("--mesh.expert", 4),
    ("--mesh.expert_node", 2, "--mesh.expert", 2),
]
# Of these, the layout that has them both within processes and across.
FURTHER_MESHES = [("--mesh.tensor", 2, "--mesh.expert", 2), ("--mesh.fsdp", "true", "--mesh.expert", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [(count, 4 // count, mesh) for count in (1, 2, 4) for mesh in MESHES]
    + [(2, 2, mesh) for mesh in FURTHER_MESHES],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_the_loss_does_not_depend_on_processes_and_axes(in_one_process, count, devices, mesh):
    folder, config, one = in_one_process
    workdir = folder / f"{count} {devices} {mesh}"
    run(*launching.launched(count, devices, config, workdir, "--steps", 50, "--checkpoint.every", 0, *mesh))
    for expected, actual in zip(one, small.read_metrics(workdir), strict=True):
        for name in {"loss", "eval/loss"} & set(expected):
            tolerance.assert_close(
                actual[name], expected[name], tolerance.F32_MODEL, f"{name}, {expected['step']}"
            )


@pytest.mark.slow
def test_every_process_writes_and_hashes_its_own_part_of_a_checkpoint(config, tmp_path):
    run(*launched(config, tmp_path / "run", "--steps", 1, "--model.moe.d_hidden", 512))
    directory = tmp_path / "run" / "checkpoints" / "1"
    parts = {number: 0 for number in range(2)}
    for line in (directory / "manifest.sha256").read_text().splitlines():
        path = directory / line[66:]
        if path.parent.name == "d":
            parts[writer_of(line[66:])] += path.stat().st_size
    # Nearly all of this model is experts, which lie half on one process, half on the other.
    assert 0.9 < parts[0] / parts[1] < 1.3
    assert find_fault(directory) is None


STALLED = """
import os, time
from train.data import batches

take = batches.TrainingBatches.__next__

def stall(self):
    batch = take(self)
    if os.environ.get("MOEJAX_PROCESS_ID") == "1" and self.get_state()["next_batch"] == BATCH:
        BREAK
    return batch

batches.TrainingBatches.__next__ = stall
"""


@pytest.mark.slow
def test_a_process_that_does_not_arrive_is_named_and_all_end(config, tmp_path):
    stalled = STALLED.replace("BREAK", "time.sleep(600)").replace("BATCH", "39")
    config.write_text(stalled + config.read_text())
    # With log.every 10 the host runs ahead, as it does in earnest: no step is fetched before the one that never ends.
    options = ("--log.stall_factor", 3, "--log.stall_seconds", 15, "--log.every", 10, "--checkpoint.every", 0)
    process = start(*launched(config, tmp_path / "run", "--steps", 60, *options))
    wait_for_step(tmp_path / "run", 30, process)
    workers = children(process)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 3, output
    found = re.search(
        r"step (\d+) has not ended after \d+ s: step (\d+) has been begun, process 1 is at step (\d+)",
        output,
    )
    assert found and int(found[3]) < int(found[2]) <= 41, output
    assert int(found[3]) - QUEUED < int(found[1]) <= int(found[3]) + 1, output
    assert all(is_gone(pid) for pid in workers)
    stacks = [(tmp_path / "run" / "logs" / f"stacks-{number}.txt").read_text() for number in range(2)]
    assert "in stall" in stacks[1] and "in stall" not in stacks[0]


@pytest.mark.slow
def test_a_process_that_fails_alone_takes_the_others_with_it(config, tmp_path):
    config.write_text(
        STALLED.replace("BREAK", "time.sleep(5); raise OSError('the disk is gone')").replace("BATCH", "9")
        + config.read_text()
    )
    process = start(*launched(config, tmp_path / "run", *OPTIONS))
    wait_for_step(tmp_path / "run", 7, process)
    workers, began = children(process), time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 3 and "the disk is gone" in output, output
    assert all(is_gone(pid) for pid in workers) and time.monotonic() - began < 60


@pytest.mark.slow
def test_nobody_is_left_behind_when_the_launcher_is_killed(config, tmp_path):
    process = start(*launched(config, tmp_path / "run", "--steps", 100_000, "--checkpoint.every", 0))
    wait_for_step(tmp_path / "run", 7, process)
    workers = children(process)
    process.kill()
    process.communicate(timeout=60)  # until nobody holds its output any more
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(is_gone(pid) for pid in workers):
        time.sleep(0.1)
    assert len(workers) == 2 and all(is_gone(pid) for pid in workers)
    assert any((tmp_path / "run" / "checkpoints").iterdir()), "stopped in order"


@pytest.mark.slow
@pytest.mark.repo
def test_killed_again_and_again_it_goes_on_to_the_same_bits(tmp_path):
    from benchmarks import kills

    done = kills.main(6, str(tmp_path), steps=150)
    assert sum(count for what, count in done.items() if what.startswith("killed: ")) == 6
