"""How every command ends: a failure that its user can fix is one sentence and exit code 2.
`sys.exit(ended(lambda: work(args)))`
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable

from sarm.config import UserError

REFUSED = {
    errno.ENOSPC: (
        "no room left on its file system: free some or use another RUN, what is done stays done"
    ),
    errno.EDQUOT: (
        "no room left in your quota there: free some or use another RUN, what is done stays done"
    ),
    errno.EACCES: "you may not write or read there; use a place of your own",
    errno.EPERM: "you may not change that; use a place of your own",
    errno.EROFS: (
        "that file system is read-only; use a RUN, and an HF_HOME and SARM_CACHE for fetch, where"
        " you can write"
    ),
    errno.ENOTDIR: "a file stands where a folder should; use another RUN or remove the file",
    errno.EISDIR: "a folder stands where a file should; correct the path",
    errno.ENAMETOOLONG: "that name is too long; use a shorter RUN",
}
"""What to do about the operating system's refusals that a user can fix."""


def ended(work: Callable[[], int], where: str | os.PathLike[str] = "") -> int:
    """The exit code of `work`: its own; 2 on a failure that the user can fix, told in one
    sentence; 130 on Ctrl-C.

    `where` is named where the operating system does not say which file it refused. SARM_TRACEBACK=1
    adds the traceback. Whatever else goes wrong is a defect, and is raised.
    """
    try:
        code = work()
        # here, where a reader that has gone is no surprise, not when the interpreter ends
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as `| head` does: nothing is left to say, and nobody to say
        # it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        told = sentence(error, where)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        if os.environ.get("SARM_TRACEBACK"):
            traceback.print_exc()
        return 2


def sentence(error: Exception, where: str | os.PathLike[str] = "") -> str | None:
    """What to tell the user, or None where the failure is no fault of theirs."""
    if isinstance(error, UserError):
        return str(error)
    code = refusal(error)
    if code not in REFUSED:
        return None
    return (
        f"{getattr(error, 'filename', None) or os.fspath(where) or 'this command'}:"
        f" {os.strerror(code).lower()}; {REFUSED[code]}"
    )


def refusal(error: Exception) -> int:
    """The operating system's error number, 0 where there is none. Writers such as safetensors'
    hand it on in words alone.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\b(?:os error|errno) (\d+)\b", str(error), re.IGNORECASE)
    return int(found.group(1)) if found else 0
