"""The watchdog: a rank that is silent for longer than its phase may take shows where it hangs and ends the job, to be tried again.

Invariant: nothing here waits for another rank or for the main thread. A thread of each rank compares the last beat with the limit of its
phase; the first that finds a silence notes it in `RUN/hang.json`, on which all ranks dump the stacks of all their threads to
`RUN/logs/stacks-rank-N.txt`, and leave with code 75 once the first has read what they say of themselves: only it reads the files of
others, and while steps are done nobody looks for any. A rank whose main thread holds the interpreter cannot run that thread: SIGUSR1, which
the launcher sends, makes it dump all the same. Beating costs an assignment; the heartbeat file is written by the thread.
"""

import faulthandler
import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from data_pipeline.errors import EXIT_TRY_AGAIN
from train.config import WatchdogConfig
from train.run_dir import RunDir, read_json

TICK_S = 0.5
_MARK = "== silent: "
GRACE_S = 10.0
"""How long the rank that found a silence waits for the stacks of the others."""
LOOK_AFTER_S, LOOK_EVERY_S = 30.0, 5.0
"""When a silent rank begins to look whether another found a silence, at the latest, and how often: ranks that wait for each other are
silent for about as long as each other, so that half of the shortest limit is soon enough."""


@dataclass(frozen=True)
class Silence:
    """Where a rank was last heard of."""

    rank: int
    phase: str
    step: int
    """Steps done."""
    beats: int
    """Beats in this life: all ranks beat alike, so that fewer means behind."""
    seconds: float
    """Silence since, in the watchdog's own ticks: a job that was suspended was not silent."""
    time: float


class Watchdog:
    """Watches one rank from inside."""

    def __init__(self, config: WatchdogConfig, run: RunDir, rank: int, world: int) -> None:
        """Starts watching, in phase `start`."""
        self._limits, self._run, self._rank, self._world = asdict(config), run, rank, world
        self._look_after = min([LOOK_AFTER_S, *(limit / 2 for limit in self._limits.values() if limit)])
        self.began = time.time()
        """When this rank's part of the life began, in seconds since 1970."""
        self._beat = (0, "start", 0)
        self._started = False
        self._stacks = run.stacks(rank).open("a")
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Says that this rank is alive, has done so many steps, and enters a phase: start, data, forward or checkpoint.

        All of the first step counts as `start`, since much is made when it is first used.
        """
        self._beat = (step, phase if self._started else "start", self._beat[-1] + 1)

    def started(self) -> None:
        """The first step of this life is done."""
        self._started = True

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, silent, last, noted, look_at = self._beat, 0.0, time.monotonic(), None, self._look_after
        while not self._closed.wait(TICK_S):
            now, beat = time.monotonic(), self._beat
            silent = silent + min(now - last, 2 * TICK_S) if beat is seen else 0.0
            look_at = look_at if silent else self._look_after
            seen, last = beat, now
            step, phase, beats = beat
            if self._rank == 0 and (beat is not noted or silent % 5 < TICK_S):
                with suppress(OSError):  # a full disk is for the main thread to tell
                    self._run.beat(step, phase)
                noted = beat
            limit = self._limits[phase]
            own = Silence(self._rank, phase, step, beats, silent, time.time())
            looks = silent > look_at
            look_at += LOOK_EVERY_S if looks else 0.0
            if (limit and silent > limit) or (looks and found_silence(self._run, self.began)):
                self._end(own)

    def _end(self, own: Silence) -> None:
        """Dumps, says why, leaves."""
        with suppress(OSError):
            self._stacks.write(f"{_MARK}{json.dumps(asdict(own))}\n")
            self._stacks.flush()
            os.fsync(self._stacks.fileno())  # what an open file holds, other nodes of a network file system see half a minute later
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            if self._is_first(own):
                found = self._silences()
                if not self._run.outcome.exists():
                    self._run.write_outcome(EXIT_TRY_AGAIN, self._reason(found), own.step)
            else:  # whoever leaves first takes the others with it
                deadline = time.monotonic() + 2 * GRACE_S
                while not self._run.outcome.exists() and time.monotonic() < deadline:
                    time.sleep(1)
        os._exit(EXIT_TRY_AGAIN)

    def _is_first(self, own: Silence) -> bool:
        """Notes a silence; whether no other rank of this life has, however many find theirs at once. What a life before noted is gone."""
        try:
            with self._run.hang.open("x") as file:
                json.dump(asdict(own), file)
        except FileExistsError:
            return False
        return True

    def _silences(self) -> list[Silence]:
        """What the ranks that dumped in this life say of themselves; waits for those that have not yet."""
        found: dict[int, Silence] = {}
        deadline = time.monotonic() + GRACE_S
        while True:
            for rank in set(range(self._world)) - found.keys():
                with suppress(OSError, ValueError):
                    lines = [line for line in self._run.stacks(rank).read_text().splitlines() if line.startswith(_MARK)]
                    newest = Silence(**json.loads(lines[-1].removeprefix(_MARK))) if lines else None
                    if newest and newest.time > self.began:
                        found[rank] = newest
            if len(found) == self._world or time.monotonic() > deadline:
                return [found[rank] for rank in sorted(found)]
            time.sleep(TICK_S)

    def _reason(self, found: list[Silence]) -> str:
        """Names the ranks that are furthest behind, since the others wait for them; one that did not even dump comes before all.

        Of ranks that have come as far as each other only the stacks tell which waits: all are named.
        """
        mute = sorted(set(range(self._world)) - {silence.rank for silence in found})
        behind = [silence for silence in found if silence.beats == min(other.beats for other in found)]
        who = f"{_ranks([silence.rank for silence in behind])} {'was' if len(behind) == 1 else 'were'} silent"
        if mute:
            who = f"{_ranks(mute)} {'does' if len(mute) == 1 else 'do'} not answer at all, {who}"
        longest = max(behind, key=lambda silence: silence.seconds)
        what = f"for {longest.seconds:.0f} s in phase {longest.phase} after step {longest.step}"
        limit = f"watchdog.{longest.phase} is {self._limits[longest.phase]:g}"
        return f"{who} {what}, {limit} (see {self._run.logs}/stacks-rank-*.txt; the same command goes on)"


def _ranks(ranks: list[int], shown: int = 8) -> str:
    """Such as `rank 3`, `ranks 0, 1`, or the first few of many."""
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:shown]))}{more}"


def found_silence(run: RunDir, since: float) -> bool:
    """Whether a rank found a silence after this time."""
    try:
        found = read_json(run.hang)
    except (OSError, ValueError):
        return False
    return bool(found) and found["time"] > since
