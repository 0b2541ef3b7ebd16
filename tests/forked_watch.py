"""`kedro watch` whose steps are forked off, so that they find the vendors imported (`forks`)."""

from __future__ import annotations

import os
import runpy
import sys
import traceback

sys.path[:0] = ["src", ""]

from fathom import watch  # noqa: E402


def launch(command, log, lock) -> int:
    """As `fathom.watch` does it: a process of its own, which has the lock and writes to the log."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: object = 1
    try:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.argv = command[2:]
        runpy.run_module("kedro", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


watch._launch = launch
sys.argv[0] = "kedro"
runpy.run_module("kedro", run_name="__main__", alter_sys=True)
