"""First process of the private Ray: starts it, reaps what is orphaned, ends it all.

Its standard input is its life line: at end of file (the supervisor closed it, or died) every
descendant is ended.  In its own process namespace it is process 1; without one it makes itself the
reaper of its descendants, so that none escapes.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 3.0


def _reap() -> dict[int, int]:
    """Exit codes of the children that ended."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _end_all() -> None:
    """Terminate every descendant, then kill what stays."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + _GRACE_S
        signalled: set[int] = set()
        while time.monotonic() < end:
            family = psutil.Process().children(recursive=True)
            if not family:
                return
            # Again and again: a process may have been born meanwhile.
            for member in family:
                if member.pid not in signalled:
                    signalled.add(member.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(number)
            time.sleep(0.05)
            _reap()


def main(command: list[str]) -> int:
    """Run ``command`` until it ends or standard input does; returns its exit code."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A child's end must wake select().
    wake, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    code = 0
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
        ended = _reap()
        if main_child.pid in ended:
            code = ended[main_child.pid]
            break
        if 0 in ready and not os.read(0, 1):
            break
    _end_all()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
