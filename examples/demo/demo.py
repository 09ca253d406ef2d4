"""The demo, start to end: index the data, train three stages, kill a rank on the way, go on, and write the report.

Invariant: it only runs the commands that a user would type, and prints them. Run again, it goes on where it was.

    make demo        (or: python examples/demo/demo.py, from the repository's top, with the package installed)
"""

import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from train.run_dir import RunDir, read_json

DATA = Path("examples/demo")
RUNS = Path("runs/demo")
SOURCES = ("pairs", "documents", "text", "prose")
HELD_OUT = (
    "heldout/text",
    *(f"heldout/{split}/{half}" for split in ("unseen_picture", "unseen_concept") for half in ("validation", "test")),
)
TRAIN = ["xc-train", "run", *(f"configs/demo/{n}" for n in ("1_language.yaml", "2_pretrain.yaml", "3_sft.yaml")), "--procs", "2"]
KILL_AFTER_STEP = 120
"""Of the pretraining stage: past its first checkpoint, so that there is work to lose and to find again."""


def main() -> int:
    """Returns the exit code of the first command that fails."""
    if not Path("configs/demo").is_dir():
        print("error: run this from the repository's top folder (make demo does)", file=sys.stderr)
        return 2
    for name in (*SOURCES, *HELD_OUT):
        for command in (["index", str(DATA / name), "--tokenizer", str(DATA / "tokenizer")], ["merge", str(DATA / name)]):
            code = run(["xc-data", *command], quiet=True)
            if code:
                return code
    RUNS.mkdir(parents=True, exist_ok=True)
    code = run(["xc-data", "preview", "configs/demo/2_pretrain.yaml", "-o", str(RUNS / "preview.html")])
    if code:
        return code
    pretrain = RunDir(RUNS / "pretrain")
    if pretrain.life() == 0:
        show(TRAIN)
        training = subprocess.Popen(on_path(TRAIN))
        if kill_a_rank(training, pretrain):
            training.wait()
            print(
                f"demo: a rank was killed with SIGKILL after step {KILL_AFTER_STEP} of pretraining; the same command goes on:", flush=True
            )
        elif training.wait():
            return training.returncode
    return run(TRAIN) or run(["xc-train", "report", str(RUNS)])


def kill_a_rank(training: subprocess.Popen[bytes], run_dir: RunDir) -> bool:
    """Waits until pretraining is past the step, then ends one of its ranks as the kernel would when memory runs out."""
    while training.poll() is None:
        beat = read_json(run_dir.heartbeat)
        if beat and beat["step"] >= KILL_AFTER_STEP:
            with suppress(psutil.NoSuchProcess):  # one that ends right now
                ranks = [p for p in psutil.Process(training.pid).children() if str(run_dir.path) in p.cmdline()]
                if ranks:
                    ranks[-1].kill()
                    return True
        time.sleep(0.1)
    return False


def run(command: list[str], quiet: bool = False) -> int:
    """Prints and runs a command."""
    show(command)
    return subprocess.run(on_path(command), stdout=subprocess.DEVNULL if quiet else None).returncode


def show(command: list[str]) -> None:
    """The line as one would type it."""
    print(f"$ {shlex.join(command)}", flush=True)


def on_path(command: list[str]) -> list[str]:
    """The command of this Python's environment, whether or not that is activated."""
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


if __name__ == "__main__":
    sys.exit(main())
