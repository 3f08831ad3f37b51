"""modal-sandbox-fs-tools: one file operation, given as JSON; problems as JSON on stderr."""

import errno
import grp
import json
import os
import pwd
import shutil
import stat
import sys

READ_LIMIT = 5 << 30
KINDS = {
    errno.ENOENT: "NotFound",
    errno.EISDIR: "IsDirectory",
    errno.ENOTDIR: "NotDirectory",
    errno.EACCES: "PermissionDenied",
    errno.EPERM: "PermissionDenied",
    errno.EROFS: "PermissionDenied",
    errno.ENOTEMPTY: "DirectoryNotEmpty",
    errno.EEXIST: "PathAlreadyExists",
    errno.ENOSPC: "NoSpace",
}
TYPES = ((stat.S_ISLNK, "symlink"), (stat.S_ISDIR, "directory"), (stat.S_ISREG, "file"))


def owner(of, lookup, number):
    try:
        return getattr(lookup(number), of)
    except KeyError:
        return str(number)


def describe(path):
    info = os.lstat(path)
    return {
        "name": os.path.basename(path.rstrip("/")) or "/",
        "path": path,
        "type": next((name for test, name in TYPES if test(info.st_mode)), "file"),
        "size": info.st_size,
        "mode": stat.S_IMODE(info.st_mode),
        "permissions": stat.filemode(info.st_mode)[1:],
        "owner": owner("pw_name", pwd.getpwuid, info.st_uid),
        "group": owner("gr_name", grp.getgrgid, info.st_gid),
        "modified_time": info.st_mtime,
        "symlink_target": os.readlink(path) if stat.S_ISLNK(info.st_mode) else None,
    }


def tell(value):
    sys.stdout.write(json.dumps(value) + "\n")


def write_file(path):
    os.makedirs(os.path.dirname(path) or "/", exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)


def read_file(path):
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > READ_LIMIT:
            raise OSError(errno.EFBIG, "file is too large")
        shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)


def list_files(path):
    tell([describe(os.path.join(path, name)) for name in sorted(os.listdir(path))])


def remove(path, recursive=False):
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
    elif recursive:
        shutil.rmtree(path)
    else:
        os.rmdir(path)


def make_directory(path, parents=False):
    if parents:
        os.makedirs(path, exist_ok=True)
    else:
        os.mkdir(path)


def print_stat(path):
    tell(describe(path))


COMMANDS = {
    "WriteFile": write_file,
    "ReadFile": read_file,
    "ListFiles": list_files,
    "Remove": remove,
    "MakeDirectory": make_directory,
    "Stat": print_stat,
}


def main():
    ((name, arguments),) = json.loads(sys.argv[1]).items()
    if name not in COMMANDS:
        fail("NotSupported", f"this test server has no {name}")
    try:
        COMMANDS[name](**arguments)
    except OSError as error:
        kind = "FileTooLarge" if error.errno == errno.EFBIG else KINDS.get(error.errno, "Other")
        fail(kind, error.strerror or str(error))


def fail(kind, message):
    sys.exit(json.dumps({"error_kind": kind, "message": message, "detail": ""}))


main()
