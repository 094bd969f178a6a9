# SPDX-License-Identifier: Apache-2.0
"""Threads that start together, for the tests of concurrency."""

from __future__ import annotations

import threading


def at_once(work, count):
    """Runs work(i) in threads that start together; returns the results, raises what they raised."""
    gate, results, failed = threading.Barrier(count), [None] * count, []

    def run(i):
        try:
            gate.wait()
            results[i] = work(i)
        except BaseException as problem:
            failed.append(problem)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if failed:
        raise failed[0]
    return results
