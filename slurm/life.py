"""What a job script asks between its steps: may a life begin, and what does its end call for? Runs on the first node, without torch.

    python -m slurm.life blind RUN               this node cannot write the log; exit 10: requeue without the nodes on stdout, those that
                                                 all jobs leave out, a space, those that this job found; 70: stop
    python -m slurm.life begin RUN               exit 0: go on
    python -m slurm.life preflight RUN REPORT    exit 0: go on; 10: requeue without the nodes on stdout; 70: stop
    python -m slurm.life vain RUN BY             notes a life that was asked to stop before it trained; BY: `slurm`, or nothing
    python -m slurm.life end RUN CODE BY         stdout: `requeue REASON` or `exit CODE`
    python -m slurm.life evaluated RUN CODE BY   the same, of the measuring behind the last step

Invariant: a job is requeued at most `slurm.retries` times in a row without a new checkpoint between; what was counted lies in the run
directory, so that a life whose node died counts as well. One that was preempted does not: that is no fault.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_CRASH, EXIT_DONE, EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN, EXIT_USER, UserError
from slurm import config as slurm_config
from slurm.config import SlurmConfig
from slurm.job_dir import JobDir, newest_checkpoint

EXIT_NO_PROGRESS = 71
"""The job stopped: life after life ended without a new checkpoint."""
MUTE = "ended without a word: its node died or froze, or Slurm killed it"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    what, run, *rest = sys.argv[1:] if argv is None else argv
    job_dir = JobDir(run)
    job = os.environ["SLURM_JOB_ID"]
    try:
        settings = slurm_config.load(job_dir.run.config)
        if what == "begin":
            sys.exit(begin(job_dir, settings, job))
        elif what in ("blind", "preflight"):
            from slurm.preflight import judge_blind, judge_report

            sys.exit(judge_report(job_dir, settings, job, Path(rest[0])) if rest else judge_blind(job_dir, settings, job))
        elif what == "vain":
            _note_end(job_dir, job, EXIT_TRY_AGAIN, "asked to stop before it trained", by_slurm=rest[0] == "slurm")
        else:
            judge = {"end": end, "evaluated": evaluated}[what]
            with suppress(BrokenPipeError):  # Slurm has killed the script meanwhile
                print(judge(job_dir, settings, job, int(rest[0]), by_slurm=rest[1] == "slurm"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


def begin(job_dir: JobDir, settings: SlurmConfig, job: str) -> int:
    """Notes that a life begins; returns 0, or the code that the job is to end with."""
    run = job_dir.run
    if run.stop_file.exists():
        run.write_outcome(
            EXIT_TRY_AGAIN, f"{run.stop_file} exists: the job ends before it trains; xc-slurm submit goes on", newest_checkpoint(run)
        )
        return EXIT_TRY_AGAIN
    attempts = of_job(jsonl.read(job_dir.attempts), job)
    newest = newest_checkpoint(run)
    if attempts and stalled(attempts, newest) >= settings.retries:
        return _give_up(job_dir, settings, MUTE)
    if attempts and attempts[-1]["event"] == "begin":
        print(f"the life before {MUTE}", file=sys.stderr)
    run.forget_outcome()
    nodes, restart = os.environ.get("SLURM_JOB_NODELIST", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    _note(job_dir, "begin", job, checkpoint=newest, restart=restart, nodes=nodes, life=run.life())
    return EXIT_DONE


def end(job_dir: JobDir, settings: SlurmConfig, job: str, code: int, by_slurm: bool) -> str:
    """Notes that a life ended with srun's `code`; returns what is to be done.

    Args:
        job_dir: of the run.
        settings: the `slurm` section.
        job: Slurm's id.
        code: how srun ended; the outcome that a rank wrote knows better.
        by_slurm: whether Slurm takes the nodes away: it was preempted, or requeued by somebody.
    """
    run, newest = job_dir.run, newest_checkpoint(job_dir.run)
    if (run.final / "manifest.json").exists():
        outcome = {"code": EXIT_DONE, "reason": "done", "step": newest}
    else:
        outcome = run.read_outcome() or _unsaid(code, run.logs)
        outcome.setdefault("step", run.last_step())
        if outcome["code"] == EXIT_DONE:  # a rank that says done has written final weights
            outcome = {**outcome, "code": EXIT_CRASH, "reason": "ranks ended before the final weights were written"}
    attempts = of_job(jsonl.read(job_dir.attempts), job)
    began = next((a for a in reversed(attempts) if a["event"] == "begin"), None)
    with suppress(OSError):  # a full disk must not hide why the run ended
        if run.read_outcome() is None:
            run.write_outcome(outcome["code"], outcome["reason"], outcome["step"])
        if began and run.life() > began["life"]:
            run.end_life(outcome["code"], outcome["reason"], outcome["step"])
        _note_end(job_dir, job, outcome["code"], outcome["reason"], by_slurm)
    if outcome["code"] in (EXIT_DONE, EXIT_USER, EXIT_NEEDS_PERSON):
        return f"exit {outcome['code']}"
    return _another_life(job_dir, settings, job, outcome["reason"], by_slurm)


def evaluated(job_dir: JobDir, settings: SlurmConfig, job: str, code: int, by_slurm: bool) -> str:
    """Notes that the evaluation of a finished run ended with srun's `code`; returns what is to be done, as `end`."""
    if code == EXIT_DONE:
        return f"exit {EXIT_DONE}"
    run = job_dir.run
    reason = f"the evaluation ended with code {code} (see {job_dir.log}; the weights are whole: {run.final})"
    with suppress(OSError):
        _note_end(job_dir, job, code, reason, by_slurm)
    if code in (EXIT_USER, EXIT_NEEDS_PERSON):
        run.write_outcome(code, reason, newest_checkpoint(run))
        return f"exit {code}"
    return _another_life(job_dir, settings, job, reason, by_slurm)


def _another_life(job_dir: JobDir, settings: SlurmConfig, job: str, reason: str, by_slurm: bool) -> str:
    """What is to be done where another life may go better: it, unless somebody asked to stop or there were too many in vain."""
    if job_dir.run.stop_file.exists():
        return f"exit {EXIT_TRY_AGAIN}"
    lives = stalled(of_job(jsonl.read(job_dir.attempts), job), newest_checkpoint(job_dir.run))
    if not by_slurm and lives >= settings.retries:
        return f"exit {_give_up(job_dir, settings, reason)}"
    return f"requeue {reason}"


def of_job(attempts: Sequence[dict[str, Any]], job: str) -> list[dict[str, Any]]:
    """The lines that one job left: a new submission counts anew."""
    return [a for a in attempts if a["job"] == job]


def stalled(attempts: Sequence[dict[str, Any]], newest: int) -> int:
    """How many lives in a row, the newest last, began from the checkpoint that is still the newest.

    One that ended because preflight excluded a node does not count: there are only so many nodes; but one does whose nodes had all been
    excluded before, since then Slurm gives them all the same. Nor does one that Slurm ended.
    """
    counted, known = 0, set[str]()
    for line in attempts:
        nodes = set(line.get("nodes", ())) if line["event"] == "excluded" else set[str]()
        if line["checkpoint"] == newest:
            counted += (line["event"] == "begin") - (line["event"] == "taken") - bool(nodes - known)
        known |= nodes
    return counted


def _unsaid(code: int, logs: Path) -> dict[str, Any]:
    """How ranks ended that were killed before they could say it; the others may have ended with a code that they had agreed on."""
    if code in (EXIT_NEEDS_PERSON, EXIT_TRY_AGAIN):
        return {"code": code, "reason": f"ranks ended with code {code} (see {logs})"}
    return {"code": EXIT_CRASH, "reason": f"a rank was killed (srun ended with {code}; see {logs})"}


def _give_up(job_dir: JobDir, settings: SlurmConfig, reason: str) -> int:
    run, newest = job_dir.run, newest_checkpoint(job_dir.run)
    why = f"{settings.retries} lives in a row ended without a checkpoint after step {newest}; the last one: {reason}"
    cure = f"see xc-slurm logs {run.path}; mend the cause, then xc-slurm submit goes on"
    run.write_outcome(EXIT_NO_PROGRESS, f"{why} ({cure})", newest)
    print(f"error: {why} ({cure})", file=sys.stderr)
    return EXIT_NO_PROGRESS


def _note_end(job_dir: JobDir, job: str, code: int, reason: str, by_slurm: bool) -> None:
    _note(job_dir, "taken" if by_slurm else "end", job, checkpoint=newest_checkpoint(job_dir.run), code=code, reason=reason)


def _note(job_dir: JobDir, event: str, job: str, **facts: Any) -> None:
    jsonl.append(job_dir.attempts, [{"event": event, "job": job, "time": time.time(), **facts}])


if __name__ == "__main__":
    main()
