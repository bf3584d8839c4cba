"""Start Python programs as forks of this process, which has imported what a new interpreter takes seconds to import."""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

_SAID = "FORKS "


class ForkingPopen(subprocess.Popen):
    """``Popen`` which forks this process where it is asked for a program of this interpreter.

    The program finds modules imported and what this process has changed in them. Where that matters, start a new
    interpreter: through a shell, or by :class:`subprocess.Popen` itself.
    """

    def __init__(self, args: Any, **how: Any) -> None:
        if not how.get("shell") and not isinstance(args, str) and args[0] == sys.executable:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # the fork would write it once more
            environment = dict(os.environ if how.get("env") is None else how["env"])
            become = functools.partial(_become, args[1:], environment, how.get("pass_fds", ()))
            how.update(preexec_fn=become, restore_signals=False)
        super().__init__(args, **how)


class Parent:
    """An interpreter that runs some code, and is then forked for each program. It ends with this process.

    For programs that must not find what this process has imported.

    Args:
        code: what to import.
        options: of the interpreter.
        environment: its variables beside those of this process.
    """

    def __init__(self, code: str, *options: str, **environment: str) -> None:
        command = [sys.executable, *options, "-c", f"{code}\nimport forks\nforks.serve()"]
        given = {**os.environ, **environment}
        self._process = subprocess.Popen(command, env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *programs: tuple[Sequence[str], Mapping[str, str]]) -> list[subprocess.CompletedProcess]:
        """Run programs at the same time.

        Args:
            programs: words after the name of the interpreter, and variables beside its own.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(programs) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_SAID):
                answers = json.loads(line.removeprefix(_SAID))
                return [subprocess.CompletedProcess(words, *answer) for (words, _), answer in zip(programs, answers)]
        raise AssertionError(f"the interpreter ended with code {self._process.wait()}")


def serve() -> None:
    """Run what the parent's creator asks for, until there is no creator any more."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for line in sys.stdin:
        running = [
            ForkingPopen([sys.executable, *words], env={**os.environ, **more}, text=True, **pipes)
            for words, more in json.loads(line)
        ]
        said = [program.communicate() for program in running]
        print(_SAID + json.dumps([(program.returncode, *texts) for program, texts in zip(running, said)]), flush=True)


def _become(words: Sequence[str], environment: Mapping[str, str], kept: Collection[int]) -> None:
    """Run a program in a process that has just been forked, and end it. Does not return."""
    code: Any = 1
    try:
        gc.freeze()  # what is garbage here has descriptors that are others' by now
        gc.enable()
        os.environ.clear()
        os.environ.update(environment)
        _close_all_but({0, 1, 2, *kept})
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        sys.stdin = open(0, closefd=False)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        _run(words)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(words: Sequence[str]) -> None:
    option, *more = words
    if option == "-c":
        sys.argv = ["-c", *more[1:]]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = more
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(option, run_name="__main__")


def _close_all_but(kept: Collection[int]) -> None:
    limits = [-1, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for before, after in pairwise(limits):
        if before + 1 < after:  # an empty range from 0 would be all of them
            os.closerange(before + 1, after)
