"""Runs a program that cannot outlive whoever started it:  leash.py PARENT_PID SIGNAL PROGRAM ARGUMENT...

The kernel is asked to send SIGNAL when the parent ends, however it ends, and the program then takes this
process's place, keeping its pid. It is a program of its own, run by path and without imports of ours,
because code between fork and exec is unsafe in a process with threads. (On Linux; elsewhere the program
just runs. The kernel watches the *thread* that forked: start leashed programs from a lasting one.)
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
EXIT_ORPHAN = 75


def main() -> None:
    parent, number, *command = sys.argv[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != int(parent):  # it ended before the kernel was asked
            sys.exit(EXIT_ORPHAN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
