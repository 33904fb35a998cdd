"""Stands in for r1jax/launch.py on the workers of a fake pod: six updates of 0.2 s, of which each is a checkpoint.

It resumes from --workdir. At the update in its file `preempt` of the fake's folder the pod is preempted, once; with
`exit` there, worker I ends with exit code `exit`[I] at update 3 or a later one; while
`hold` is there, no worker makes update 3. It has a grader, a process of its own, and says at SIGTERM whether that lives.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

home, cloud = pathlib.Path(os.environ["HOME"]), pathlib.Path(os.environ["FAKE_GCLOUD"])
workdir = pathlib.Path(next(text.partition("=")[2] for text in sys.argv if text.startswith("--workdir=")))
workdir.mkdir(parents=True, exist_ok=True)
index = int(home.name.rpartition("-w")[2])
first = home.name in ("r1-w0", "r1-0-w0")
update = int((workdir / "update").read_text()) if (workdir / "update").exists() else 0
print(f"arguments {json.dumps(sys.argv[1:])}", flush=True)
grader = subprocess.Popen(["sleep", "600"])


def end(*_) -> None:
    time.sleep(0.2)
    print(f"grader {grader.pid} ended with {grader.poll()}", flush=True)
    sys.exit(143)


signal.signal(signal.SIGTERM, end)
while update < 6:
    time.sleep(0.2)
    while (cloud / "hold").exists() and update == 2:
        time.sleep(0.05)
    update += 1
    print(f"update {update}", flush=True)
    if first:
        (workdir / "update").write_text(str(update))
        with (workdir / "metrics").open("a") as file:
            file.write(f"{update}\n")
    if first and (cloud / "preempt").exists() and update == int((cloud / "preempt").read_text()):
        (cloud / "preempt").unlink()
        time.sleep(1.5)  # worker 0's log is followed up to here
        subprocess.Popen([str(cloud / "bin" / "gcloud"), "preempt"], env={"PATH": "/usr/bin:/bin"})
        time.sleep(60)
    if (cloud / "exit").exists() and update >= 3:
        code = json.loads((cloud / "exit").read_text())[index]
        if code:
            print(f"error: worker {index} ends with {code}", flush=True)
            sys.exit(code)
