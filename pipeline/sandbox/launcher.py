"""The process between the evaluation and a program that nobody has read.

    evaluation
      launcher        makes the namespaces and a file system of its own, waits
        init          process 1 of the new process namespace; ends it when the time is over
          judge       the program, with limits and without any privilege

When init ends, the kernel kills every process of its namespace, whatever they ignore. As the
judge's, this file's text is given to `python -I -S -c`, so it imports the standard library alone.

A job is one JSON object on standard input, see `pipeline.sandbox.run`. The answer on standard
output is one line, "ready", or "error " and what the machine does not allow.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import sys
from typing import Any, NoReturn

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_OTHERS = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same on every machine
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_INSIDE_ID = 65534
# No account has such a number, and no two sandboxes share one, so limits count for each alone.
_FIRST_OUTSIDE_ID = 1 << 30
_MOST_PROCESS_IDS = 1 << 22  # of Linux
_VERDICT = 3  # as the judge has it
_TIME_IS_OVER = 124

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)


class _Attributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


class _TimeIsOverError(Exception):
    """Raised in init by its timer."""


def main() -> NoReturn:
    """Run one job; the exit status says how the judge ended."""
    verdict = int(sys.argv[1])
    job = json.load(sys.stdin)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        os._exit(1)
    program = _in_memory(json.dumps({"program": job["program"], "token": job["token"]}))
    privileged = False
    if job["confined"]:
        try:
            privileged = _enter_namespaces(job["user_namespace"])
            _enter_file_system(job["folder"], job["readable"])
        except OSError as error:
            print(f"error {error.strerror}: {error.filename}", flush=True)
            os._exit(1)
    print("ready", flush=True)
    outside_id = _FIRST_OUTSIDE_ID + os.getpid() if privileged else None
    init = os.fork()
    if init == 0:
        _init(job, program, verdict, outside_id)
    _, status = os.waitpid(init, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _enter_namespaces(wanted: bool) -> bool:
    """Leave all namespaces of the machine; whether that was done with a real root's privileges.

    Root needs no user namespace, and can then give the program a user id of its own. Everybody
    else, and the root of a container with few user ids, has in the new user namespace what the
    mounts below need, and loses it at the exec.

    Args:
        wanted: whether to take a user namespace even as root.
    """
    if os.geteuid() == 0 and _has_outside_ids() and not wanted:
        _check(_libc.unshare(_OTHERS), "namespaces for root, which needs CAP_SYS_ADMIN")
        return True
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(_NEWUSER), "a user namespace")
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_INSIDE_ID} {user} 1")
    _write("/proc/self/gid_map", f"{_INSIDE_ID} {group} 1")
    _check(_libc.unshare(_OTHERS), "mount, process and network namespaces")
    return False


def _has_outside_ids() -> bool:
    """Whether the ids that sandboxes take exist here; in many containers few ids do."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    last = _FIRST_OUTSIDE_ID + _MOST_PROCESS_IDS
    return any(first <= _FIRST_OUTSIDE_ID and last <= first + count for first, _, count in ranges)


def _enter_file_system(folder: str, readable: list[str]) -> None:
    """See nothing but the system's programs, the interpreter, a few devices and an empty /tmp.

    Args:
        folder: an empty one, to build the new root on.
        readable: paths that are there, too, read-only.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    root = f"{folder}/inside"
    for path in (*_SYSTEM, *readable):
        if os.path.islink(path):
            _make_folder(root, os.path.dirname(path))
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            _bind(path, root, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    for name in _DEVICES:
        _bind(f"/dev/{name}", root, _ATTR_RDONLY | _ATTR_NOSUID)
    _make_folder(root, "/tmp")
    _set_attributes(folder, _ATTR_RDONLY, recursive=False)
    limits = "size=64m,nr_inodes=1k,mode=777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, limits)
    os.chdir(folder)
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        raise OSError(0, "unknown machine", platform.machine())
    _check(_libc.syscall(number, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    # Below the root that is left, since then the kernel lets nobody make a user namespace, in
    # which a program would have privileges again.
    os.chroot("/inside")
    os.chdir("/")


def _bind(path: str, root: str, attributes: int) -> None:
    """Show a file or folder at the same path below a new root."""
    target = root + path
    if os.path.isdir(path):
        _make_folder(root, path)
    else:
        _make_folder(root, os.path.dirname(path))
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, _MS_BIND | _MS_REC)
    _set_attributes(target, attributes, recursive=True)


def _make_folder(root: str, path: str) -> None:
    os.makedirs(root + path, mode=0o755, exist_ok=True)


def _set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    wanted = _Attributes(set=attributes)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), size
    )
    _check(done, "mount_setattr, which needs Linux 5.12")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    data = None if options is None else options.encode()
    _check(_libc.mount(*texts, flags, data), f"mount on {target}")


def _init(job: dict[str, Any], program: int, verdict: int, outside_id: int | None) -> NoReturn:
    """Start the judge and wait for it, no longer than it may take."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGALRM, _end_time)
    status = _TIME_IS_OVER
    judge = os.fork()
    if judge == 0:
        _become_judge(job, program, verdict, outside_id)
    try:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        while True:
            ended, found = os.wait()
            if ended == judge:
                status = os.waitstatus_to_exitcode(found)
                break
    except _TimeIsOverError:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not job["confined"]:
        _kill_all(judge)
    os._exit(status & 0xFF)


def _end_time(*_: object) -> None:
    raise _TimeIsOverError


def _become_judge(
    job: dict[str, Any], program: int, verdict: int, outside_id: int | None
) -> NoReturn:
    """Give everything up and start the interpreter that runs the program."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        kept = {0: program, 1: nothing, 2: nothing, _VERDICT: verdict}
        # Moved up first, so that none is overwritten before it is in its place.
        moved = {to: fcntl.fcntl(at, fcntl.F_DUPFD, _VERDICT + 1) for to, at in kept.items()}
        for target, source in moved.items():
            os.dup2(source, target)
        os.closerange(_VERDICT + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/tmp" if job["confined"] else job["folder"])
        if outside_id is not None:
            os.setgroups([])
            os.setresgid(outside_id, outside_id, outside_id)
        for name, value in job["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if outside_id is not None:
            os.setresuid(outside_id, outside_id, outside_id)
        _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        python = job["python"]
        os.execve(python, [python, "-I", "-S", "-B", "-c", job["judge"]], {})
    finally:
        os._exit(125)


def _kill_all(judge: int) -> None:
    """Kill what a program has left behind, where no namespace ends with it."""
    for _ in range(1000):  # whoever forks faster than this stays
        with contextlib.suppress(OSError):
            os.killpg(judge, signal.SIGKILL)
        # Those whose parents have ended are children of this process, whatever group they are in.
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(number) for number in file.read().split()]
        except OSError:
            return
        if not children:
            return
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _in_memory(text: str) -> int:
    """A file without a name that holds a text, at its beginning."""
    descriptor = os.memfd_create("program", 0)
    with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
        file.write(text)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
