"""A part that hangs, in a process of its own as well."""

import subprocess
import sys


def hang(visit):
    yield {"right": True}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (visit.out / "child").write_text(str(child.pid))
    child.wait()


def parts(visit):
    yield "hangs", lambda: hang(visit)
