"""Mutated files of every format, read in worker processes under a watchdog; what happened is printed as JSON.

    python -m tests.hostile.fuzz COUNT [WORKERS [SEED [FORMAT ...]]]     of all formats, by their shares
    python -m tests.hostile.fuzz --worker FORMAT SEED COUNT PLACE

A worker writes each file to disk before it reads it, so that one which killed it is still there. It ends by the
watchdog where a file takes 2 s of the processor, and its memory is limited.
"""

import collections
import faulthandler
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 2.0
WALL = 60.0  # of the clock, for what waits without working: the machine may be busy
ROOM = 1 << 30  # bytes beyond those that a worker has when it begins
SAMPLED = 50  # of so many files, the memory of one is measured: that is slow
MEMORY = 4 << 20  # beside four times the file
SHARES = {
    "safetensors": 0.25,
    "sharded": 0.13,
    "keras": 0.15,
    "torch": 0.12,
    "own": 0.06,
    "config": 0.07,
    "settings": 0.06,
    "adapter": 0.05,
    "tokenizer": 0.03,
    "data": 0.08,
}


class Hang(BaseException):
    """A file took longer than it may."""


# What the workers read


def _formats():
    from . import formats

    return formats.FORMATS


# What must not happen meanwhile

_HEARD: list[str] = []
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.link"),
    *("os.symlink", "os.chmod", "os.rmdir", "os.truncate", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
    *("pickle.find_class", "shutil.", "webbrowser.open"),
)
_PLACE = [""]


def _listen(event, arguments):
    if not _PLACE[0]:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else "w" in (mode or "")
        if writes and path != os.devnull:
            _HEARD.append(f"open {path} {mode}")
    elif event.startswith(_FORBIDDEN) or (event in ("exec", "compile", "import") and _PLACE[0] in repr(arguments)):
        _HEARD.append(f"{event} {arguments!r:.200}")


def _alarm(number, frame):
    raise Hang(
        f"{'processor' if number == signal.SIGPROF else 'clock'}, in {''.join(traceback.format_stack(frame)[-4:])}"
    )


def _guarded(load, path, passed=()):
    """How a path was answered: "read", or the error; with `passed`, errors of that class go on."""
    from jtl.errors import JtlError

    _HEARD.clear()
    _PLACE[0] = str(path)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.5)  # again, where a library swallows it
    signal.setitimer(signal.ITIMER_REAL, WALL, 0.5)
    faulthandler.dump_traceback_later(2 * WALL, exit=True)  # a library in C hears no signal
    try:
        load(path)
        answer = "read"
    except JtlError as error:
        if isinstance(error, passed):
            raise
        answer = f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        _PLACE[0] = ""
        if _HEARD:
            raise AssertionError(f"while it was read: {_HEARD[:5]}")
    return answer


def work(name, seed, count, place):
    """Read so many mutations of a format; stops at the first that breaks the law."""
    from . import seeds

    format_ = _formats()[name]
    rng, place = random.Random(f"{name} {seed}"), Path(place)
    good, load = format_.seeds(), format_.load()
    for files in good:
        _write(place / "good", files)
        answer = _guarded(load, place / "good")
        assert answer == "read", (name, answer)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    outcomes, kinds, most, slowest = collections.Counter(), collections.Counter(), 0, 0.0
    for number in range(count):
        files = format_.mutate(rng, rng.choice(good))
        _write(place / "case", files)
        before = sorted(seeds.read(place))
        sampled = not number % SAMPLED
        if sampled:
            tracemalloc.start()
        started = time.process_time()
        try:
            answer = _guarded(load, place / "case")
        except BaseException:
            return {"failure": traceback.format_exc()[-4000:], "number": number, "files": str(place / "case")}
        if sampled:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            over = peak - 4 * sum(map(len, files.values()))
            most = max(most, over)
            if over > format_.memory:
                return {"failure": f"{peak} bytes of memory", "number": number, "files": str(place / "case")}
        else:
            slowest = max(slowest, time.process_time() - started)
        if sorted(seeds.read(place)) != before:
            return {"failure": f"files appeared: {set(seeds.read(place)) - set(before)}", "files": str(place / "case")}
        outcomes[answer.split(":")[0]] += 1
        kinds[re.sub(r"/\S+|'.*'|\d+|\[.*\]|\(.*\)", "#", answer)[:80]] += 1
    return {"count": count, "outcomes": dict(outcomes), "kinds": len(kinds), "memory": most, "slowest": slowest}


def _write(folder, files):
    """The folder with these files and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file() and str(file.relative_to(folder)) not in files:
            file.unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# The driver


def command(*arguments):
    """A worker's result, or how it died."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    line = [sys.executable, "-m", "tests.hostile.fuzz", "--worker", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        return {
            "failure": f"the worker ended with {done.returncode}: {done.stderr[-3000:]}",
            "files": f"{arguments[-1]}/case",
        }
    return json.loads(done.stdout.splitlines()[-1])


def run(count, place, workers=1, chosen=tuple(SHARES), batch=2500, seed=0):
    """So many mutations of the chosen formats, and what came of them by format."""
    jobs, whole = [], sum(SHARES[name] for name in chosen)
    for name in chosen:
        left = round(count * SHARES[name] / whole)
        while left > 0:
            jobs.append((name, seed + len(jobs), min(batch, left), Path(place) / f"{name}-{len(jobs)}"))
            left -= batch
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: command(*job), jobs))
    report = {}
    for (name, *_), result in zip(jobs, results, strict=True):
        found = report.setdefault(
            name, {"count": 0, "outcomes": {}, "kinds": 0, "memory": 0, "slowest": 0, "failures": []}
        )
        if "failure" in result:
            found["failures"].append(result)
            continue
        found["count"] += result["count"]
        found["outcomes"] = dict(collections.Counter(found["outcomes"]) + collections.Counter(result["outcomes"]))
        for key in ("kinds", "memory", "slowest"):
            found[key] = max(found[key], result[key])
    return report


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        signal.signal(signal.SIGPROF, _alarm)
        signal.signal(signal.SIGALRM, _alarm)
        sys.addaudithook(_listen)
        print(json.dumps(work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
    else:
        place = tempfile.mkdtemp(prefix="fuzz-")
        workers, seed = [int(value) for value in sys.argv[2:4]] + [1, 0][len(sys.argv[2:4]) :]
        started = time.time()
        report = run(int(sys.argv[1]), place, workers, sys.argv[4:] or tuple(SHARES), seed=seed)
        for name, found in report.items():
            print(json.dumps({name: found}, indent=1))
        done, seconds = sum(found["count"] for found in report.values()), time.time() - started
        print(f"{done} files in {seconds:.0f} s, kept in {place}")
