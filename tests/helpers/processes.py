"""Start processes that have imported torch and the engine already, because that takes seconds."""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
# A server imports these once, without threads. Each process begins as a copy of it.
FORKED.set_forkserver_preload(["launch.train", "launch.evaluate"])
