"""A world of ranks that only load: `python loader_worker.py ROOT RANKS WORKERS FOLDER`, to be killed and started again.

After each step, what it held goes to FOLDER/steps.jsonl, and then the consumed cursor replaces FOLDER/cursor.json. Each step takes a
byte from stdin, so that a slow killer is not outrun; at its end, the rest runs freely.
"""

import json
import sys
from pathlib import Path

from demo_data import SEED, data_config, packs_of_step, run_world

from data_pipeline.opened import open_data
from data_pipeline.plan.plan import Cursor


def main() -> None:
    """Goes on from the cursor in FOLDER to the end of the plan."""
    root, ranks, workers, folder = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    state = json.loads((folder / "cursor.json").read_text())
    config = data_config(root, workers=workers)
    with (folder / "steps.jsonl").open("a") as steps:
        for parts in run_world(config, open_data(config, SEED), ranks, Cursor(*state["cursor"]), state["step"]):
            sys.stdin.buffer.read(1)
            steps.write(json.dumps({"step": parts[0].step, "ranks": ranks, "packs": packs_of_step(parts)}) + "\n")
            steps.flush()
            cursor = parts[0].cursor
            beside = folder / "cursor.json.partial"
            beside.write_text(json.dumps({"cursor": [cursor.window, cursor.pack], "step": parts[0].step + 1}))
            beside.replace(folder / "cursor.json")


if __name__ == "__main__":
    main()
