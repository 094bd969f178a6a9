# SPDX-License-Identifier: Apache-2.0
"""Many processes, one cache: each ends with a whole kernel, whoever is killed meanwhile."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.artefacts import OTHER, SMALL

import fmha_runtime
from fmha_runtime.errors import BuildError
from fmha_runtime.kernels import cache, manifest, store
from fmha_runtime.toolchain import build, publish

# Prints the SHA-256 of the image that this process would launch.
BUILDER = f"""
import hashlib
from fmha_runtime.kernels import manifest, store
from fmha_runtime.toolchain import build
from fmha_runtime.kernels.spec import KernelSpec
specs = [KernelSpec.parse("{SMALL.name}"), KernelSpec.parse("{OTHER.name}")]
for result in build.build(specs):
    assert result.error is None, result.error
    print(hashlib.sha256(manifest.load_image(result.row)).hexdigest())
for spec in specs:
    assert store.find(spec) is not None
"""


def start():
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER],
        cwd=Path(fmha_runtime.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition):
    deadline = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for eight minutes"
        time.sleep(0.01)


def test_sixteen_cold_builders_one_of_them_killed(own_cache, fake_nvcc):
    fake_nvcc.write(seconds=0.5)
    victim = start()
    wait_for(lambda: fake_nvcc.runs > 0)
    os.killpg(victim.pid, signal.SIGKILL)  # in the middle of its compilation
    victim.communicate()
    others = [start() for _ in range(15)]
    printed = set()
    for process in others:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        printed.add(out)
    assert len(printed) == 1, "all load the same bytes"
    for spec in (SMALL, OTHER):
        row = store.find(spec)
        assert hashlib.sha256(row.path.read_bytes()).hexdigest() == row.sha256
        assert len(list(own_cache.glob(f"{spec.name}-*"))) == 1
    # What the victim left is invisible, and goes once it is too old to belong to anybody.
    (rest,) = own_cache.glob(".tmp-*")
    assert cache.sweep(own_cache).removed == ()
    os.utime(rest, (0, 0))
    assert len(cache.sweep(own_cache).removed) == 1
    assert not rest.exists()


def test_killed_at_any_moment_leaves_nothing_half_done(own_cache, fake_nvcc):
    """Moments counted in what the builder did, not in seconds, so that each hits a build however slow the machine is:
    the first compilation begins, the second does, a folder got its final name."""
    fake_nvcc.write(seconds=0.2)

    def started(count, before):
        return fake_nvcc.runs >= before + count

    moments = {"first": partial(started, 1), "second": partial(started, 2)}
    moments["published"] = lambda before: any(own_cache.glob("fmha_*"))
    for name, moment in moments.items():
        shutil.rmtree(own_cache, ignore_errors=True)
        reached = partial(moment, fake_nvcc.runs)
        process = start()
        wait_for(reached)
        assert process.poll() is None or name == "published", "it was killed in the middle of a build"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        rows, broken = store.rows()
        assert not broken
        for row in rows:
            if row.path is not None:
                manifest.load_image(row)


def test_the_loser_uses_the_winner(own_cache, fake_nvcc):
    winner = build.build([SMALL])[0].row
    late = publish.scratch(own_cache) / SMALL.name
    shutil.copytree(winner.path.parent, late)
    (late / "mark").write_text("the second")
    row = publish.entry(late, winner.path.parent)
    assert row == winner
    assert not (winner.path.parent / "mark").exists()


def test_a_damaged_winner_is_replaced(own_cache, fake_nvcc):
    winner = build.build([SMALL])[0].row
    late = publish.scratch(own_cache) / SMALL.name
    shutil.copytree(winner.path.parent, late)
    winner.path.write_bytes(b"damaged")
    row = publish.entry(late, winner.path.parent)
    assert manifest.load_image(row) == row.path.read_bytes()


@pytest.fixture
def read_only(own_cache, fake_nvcc):
    build.build([SMALL])
    folders = [own_cache, *(path for path in own_cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield own_cache
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_cache_serves(read_only):
    before = sorted(read_only.rglob("*"))
    row = store.find(SMALL)
    assert manifest.load_image(row)
    assert build.build([SMALL])[0].status == "up to date"
    assert sorted(read_only.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_refuses_builds_with_the_remedy(read_only):
    with pytest.raises(BuildError, match="set FMHA_CACHE_DIR"):
        build.build([OTHER])
