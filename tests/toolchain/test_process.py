# SPDX-License-Identifier: Apache-2.0
"""No compiler outlives the process that started it, and none is ended that should not be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.artefacts import OTHER, SMALL

import fmha_runtime
from fmha_runtime.errors import ToolchainError
from fmha_runtime.toolchain import build, process

ROOT = Path(fmha_runtime.__file__).parent.parent

# As nvcc does: the compiler starts another, which does the work, and waits for it.
SLOW = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release 13.0, V13.0.99"; exit 0;; esac
sh -c 'echo $$ >> "{pids}"; exec sleep 300' &
echo $$ >> "{pids}"
wait
"""

BUILD = f"""
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.toolchain import build
build.build([KernelSpec.parse("{SMALL.name}"), KernelSpec.parse("{OTHER.name}")], jobs=2)
"""
PTX = f"""
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.toolchain import ptx
ptx.compile_ptx(KernelSpec.parse("{SMALL.name}"))
"""
EMULATOR = f"""
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.toolchain import gxx
gxx.library(KernelSpec.parse("{SMALL.name}"))
"""


@pytest.fixture
def slow(own_cache, tmp_path, monkeypatch):
    """A compiler in the place of nvcc and of g++ that takes five minutes; the file has the process ids it had."""
    pids, script = tmp_path / "pids", tmp_path / "compiler"
    script.write_text(SLOW.format(pids=pids))
    script.chmod(0o755)
    for name in ("FMHA_NVCC", "FMHA_HOST_CXX"):
        monkeypatch.setenv(name, str(script))
    yield pids
    for pid in started(pids):
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


def started(pids):
    return [int(line) for line in pids.read_text().split()] if pids.exists() else []


def runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def groups():
    """The process groups of all that run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if state != "Z":
            yield int(group)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, here and in children: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("code", "compilers"), [(BUILD, 4), (PTX, 2), (EMULATOR, 2)], ids=["build", "ptx", "emulator"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_ends_leaves_no_compiler(slow, code, compilers, number):
    maker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(started(slow)) == compilers)
    assert all(map(runs, started(slow)))
    maker.send_signal(number)  # to it alone
    maker.wait(timeout=60)
    wait_for(lambda: not any(map(runs, started(slow))), seconds=20)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_build_ends_its_compilers(slow):
    """Ctrl-C raises in the main thread only, and the pool's threads wait for compilers."""

    def interrupt():
        wait_for(lambda: len(started(slow)) == 4)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build.build([SMALL, OTHER], jobs=2)
    thread.join()
    assert time.monotonic() - begin < 60
    wait_for(lambda: not any(map(runs, started(slow))), seconds=20)


def test_what_a_compiler_says_and_how_it_ended(tmp_path):
    done = process.run(["sh", "-c", "pwd; echo wrong >&2; exit 3"], tmp_path)
    assert (done.returncode, done.stdout) == (3, f"{tmp_path}\nwrong\n")
    assert process.run(["sh", "-c", "kill -SEGV $$"], tmp_path).returncode == 128 + signal.SIGSEGV
    assert process.run(["/nowhere/nvcc"], tmp_path).returncode == 127
    assert process.run(["sh", "-c", "cat"], tmp_path).stdout == "", "there is nothing to read"
    assert process.run(["printf", "%s", 'a "b" $c *'], tmp_path).stdout == 'a "b" $c *'


def test_nothing_is_left_of_a_compiler_that_is_done(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    done = process.run(["sh", "-c", "cat /proc/$$/stat"], tmp_path)
    pid, group = int(done.stdout.split()[0]), int(done.stdout.split()[4])
    assert group not in (os.getpgid(0), pid), "the watching shell leads it"
    wait_for(lambda: not [each for each in groups() if each == group])
    assert set(os.listdir("/proc/self/fd")) == before


def test_many_at_once_on_one_leash(tmp_path):
    with process.Leash() as leash:
        results = [None] * 16

        def work(index):
            results[index] = leash.run(["sh", "-c", f"sleep 0.1; echo {index}"], tmp_path)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [int(done.stdout) for done in results] == list(range(16))


def test_a_leash_that_is_cut_ends_what_starts_later(tmp_path):
    with process.Leash() as leash:
        leash.cut()
        begin = time.monotonic()
        assert leash.run(["sleep", "60"], tmp_path).returncode != 0
        assert time.monotonic() - begin < 30


def test_a_program_that_answers_at_once(tmp_path):
    assert process.output(["sh", "-c", "echo yes"]) == "yes\n"
    with pytest.raises(ToolchainError, match="exited with 2"):
        process.output(["sh", "-c", "exit 2"])
    with pytest.raises(ToolchainError, match="cannot run"):
        process.output([str(tmp_path)])
