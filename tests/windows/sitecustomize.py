"""A Windows that is played on Linux, for the project's own code alone: Python loads this file at
the start of every process that has its folder on PYTHONPATH, children of spawn too.

To the project's files (below $PLAYED_ROOT) os and signal lack what Windows lacks, modules of POSIX
cannot be imported, sys.platform is win32. Libraries see Linux: on Windows they have builds of their
own. For everybody processes start by spawn, and below $PLAYED_DISK a file that this process has
open or mapped can neither be replaced nor removed, no file be written under a name that Windows
forbids, and no symbolic link be made."""

import builtins
import multiprocessing
import os
import re
import signal
import sys
import time
import types

ROOT = os.environ.get("PLAYED_ROOT", "")
DISK = os.environ.get("PLAYED_DISK", "") + os.sep
NOT_OURS = tuple(os.path.join(ROOT, name) + os.sep for name in ("tests", ".venv"))

# Python's documentation: "Availability: Unix".
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
MISSING = {
    "os": """chown chroot confstr ctermid fchdir fchmod fchown fork forkpty fpathconf fstatvfs
        getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid
        getuid initgroups killpg lchown lockf login_tty makedev mkfifo mknod nice openpty pathconf
        posix_fadvise posix_fallocate posix_openpt posix_spawn posix_spawnp pread preadv pwrite
        pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile
        setegid seteuid setgid setpgid setpriority setsid setuid statvfs sync sysconf tcgetpgrp
        ttyname uname wait wait3 wait4 waitid writev O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_NONBLOCK
        O_SYNC O_DSYNC WNOHANG""".split(),
    "signal": """SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGQUIT SIGCONT SIGSTOP
        alarm setitimer getitimer pthread_kill pthread_sigmask pause sigwait
        siginterrupt""".split(),
    "sys": [],
    "time": ["tzset", "pthread_getcpuclockid"],
}
OTHER = {"sys": {"platform": "win32"}, "os": {"name": "nt"}}


def is_ours(frame):
    file = frame.f_code.co_filename
    return file.startswith(ROOT + os.sep) and not file.startswith(NOT_OURS)


class Guarded(types.ModuleType):
    """A module that shows the project's files what Windows has of it."""

    def __new__(cls, name, doc=None):
        return types.ModuleType(name, doc)  # for importlib, which makes modules of sys's type

    def __getattribute__(self, name):
        module = super().__getattribute__("__name__")
        if name in MISSING[module] and is_ours(sys._getframe(1)):
            raise AttributeError(f"module {module!r} has no attribute {name!r} (on Windows)")
        if name in OTHER.get(module, ()) and is_ours(sys._getframe(1)):
            return OTHER[module][name]
        return super().__getattribute__(name)


def guarded_import(name, *args, _import=builtins.__import__, **kwargs):
    if name.split(".")[0] in MODULES and is_ours(sys._getframe(1)):
        raise ModuleNotFoundError(f"No module named {name!r} (on Windows)", name=name)
    return _import(name, *args, **kwargs)


def opened_here():
    """Paths that this process has open or mapped."""
    paths = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            paths.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths.update(line.split(None, 5)[5].strip() for line in maps if line.count("/"))
    return paths


def in_use(path):
    """PermissionError with Windows' number if the file, or one below the folder, is open here."""
    path = os.path.realpath(os.fsdecode(path))
    for other in opened_here():
        if other == path or other.startswith(path + os.sep):
            error = PermissionError(13, "The process cannot access the file", path)
            error.winerror = 32
            raise error


FORBIDDEN = re.compile(
    r"""[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)""", re.IGNORECASE
)


def check_name(path):
    if FORBIDDEN.search(os.path.basename(path)):
        raise OSError(22, "The filename, directory name, or volume label syntax is incorrect", path)


def audit(event, arguments):
    """Refuse what Windows refuses. open: path, mode, flags; os.rename (also of replace): two paths;
    os.remove, os.mkdir, os.symlink: the path that is made comes last among them.
    """
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.symlink"):
        return
    paths = []
    for value in arguments[: 2 if event in ("os.rename", "os.symlink") else 1]:
        if isinstance(value, str | bytes | os.PathLike):
            paths.append(os.path.abspath(os.fsdecode(value)))
    if not paths or not paths[-1].startswith(DISK):
        return
    if event == "os.symlink":
        raise OSError(1314, "A required privilege is not held by the client", paths[-1])
    if event in ("os.rename", "os.remove"):
        for path in paths:
            in_use(path)
    if event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        check_name(paths[-1])


def play():
    for module in (os, signal, sys, time):
        module.__class__ = Guarded
    builtins.__import__ = guarded_import
    multiprocessing.set_start_method("spawn")
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    for name in os.environ.get("PLAYED_WITHOUT", "").split():
        sys.modules[name] = None
    sys.addaudithook(audit)


if ROOT:
    play()
