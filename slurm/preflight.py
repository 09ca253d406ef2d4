"""Judges what the nodes of a job measured (`train.preflight`), and keeps the reasons in the cordon file.

Invariant: `problems` is pure. A node is fit only if it said so to the end. What most nodes have is the job's fault, not a node's: then
nothing is excluded, and a person is asked.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline import jsonl
from data_pipeline.errors import EXIT_DONE, EXIT_NEEDS_PERSON
from slurm.config import SlurmConfig
from slurm.job_dir import JobDir, newest_checkpoint
from slurm.life import of_job

EXIT_EXCLUDE = 10
"""Requeue, without the nodes on stdout."""
BLIND = "cannot write the run directory"
ENDS_OF_ALL_REDUCE = {"all_reduce_ms", "absent", "all_reduce_problem"}
"""What a node says of the all-reduce, one of them if it came to its end."""


def judge_report(job_dir: JobDir, settings: SlurmConfig, job: str, report: Path) -> int:
    """Prints a line a node to stderr, and the nodes to exclude to stdout; returns the exit code of `slurm.life preflight`."""
    nodes = _job_nodes()
    facts = read_facts(report)
    found = problems(facts, nodes, settings)
    for node in nodes:
        print(f"preflight {node}: {found.get(node) or _summary(facts[node])}", file=sys.stderr)
    if not found:
        return EXIT_DONE
    if 2 * len(found) > len(nodes):
        why = "; ".join(f"{node}: {reason}" for node, reason in found.items())
        reason = f"preflight failed on {len(found)} of {len(nodes)} nodes, so no node is excluded: {why} (mend it, then xc-slurm submit)"
        job_dir.run.write_outcome(EXIT_NEEDS_PERSON, reason, newest_checkpoint(job_dir.run))
        print(f"error: {reason}", file=sys.stderr)
        return EXIT_NEEDS_PERSON
    own = [node for line in of_job(jsonl.read(job_dir.attempts), job) if line["event"] == "excluded" for node in line["nodes"]]
    excluded = _cordon(job_dir, settings, job, found, own)
    newest = newest_checkpoint(job_dir.run)
    jsonl.append(job_dir.attempts, [{"event": "excluded", "job": job, "time": time.time(), "checkpoint": newest, "nodes": list(found)}])
    print(excluded)
    return EXIT_EXCLUDE


def judge_blind(job_dir: JobDir, settings: SlurmConfig, job: str) -> int:
    """The node of the job script cannot write the job's log: as `judge_report`, but nothing can be said in the run directory."""
    before = [entry for entry in jsonl.read(settings.cordon_file) if entry.get("job") == job and entry["reason"] == BLIND]
    # Where the cordon file cannot be written either, nothing remembers but Slurm.
    lives = 0 if os.access(_existing(settings.cordon_file), os.W_OK) else int(os.environ.get("SLURM_RESTART_COUNT", 0))
    if max(len(before), lives) >= settings.retries:  # it is hardly the nodes
        return EXIT_NEEDS_PERSON
    own = [entry["node"] for entry in before]
    print(_cordon(job_dir, settings, job, {os.environ["SLURMD_NODENAME"]: BLIND}, own))
    return EXIT_EXCLUDE


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _cordon(job_dir: JobDir, settings: SlurmConfig, job: str, found: Mapping[str, str], own: Sequence[str]) -> str:
    """Notes the nodes and the reasons; returns all nodes that this job is to do without, and those without what other jobs noted: their
    nodes may be another cluster's. `own` are nodes that the job excluded before.
    """
    file = settings.cordon_file
    about = {"time": time.time(), "job": job, "run": str(job_dir.path)}
    with suppress(OSError):  # a node that can write nowhere is to be left out all the same
        file.parent.mkdir(parents=True, exist_ok=True)
        jsonl.append(file, [{"node": node, "reason": reason, **about} for node, reason in found.items()])
    mine = dict.fromkeys([*settings.exclude, *own, *found])
    everybodys = dict.fromkeys([*settings.exclude, *(entry["node"] for entry in jsonl.read(file)), *mine])
    return f"{','.join(everybodys)} {','.join(mine)}"


def read_facts(report: Path) -> dict[str, dict[str, Any]]:
    """What each node said; lines of a node add up."""
    facts: dict[str, dict[str, Any]] = {}
    for line in jsonl.read(report):
        if isinstance(line, dict) and "node" in line:
            facts.setdefault(line["node"], {}).update(line)
    return facts


def problems(facts: Mapping[str, Mapping[str, Any]], nodes: Sequence[str], settings: SlurmConfig) -> dict[str, str]:
    """Why a node is not fit, by node; nodes that are fit are not in it.

    Args:
        facts: by node.
        nodes: the job's, in the order of their ranks.
        settings: the `slurm` section.
    """
    limits = settings.preflight
    usual = Counter(_text(f["versions"]) for f in facts.values() if "versions" in f).most_common(1)
    rate = statistics.median([f["tflops"] for f in facts.values() if "tflops" in f] or [0.0])
    absent = {nodes[r] for f in facts.values() for r in f.get("absent", ()) if r < len(nodes)}
    found: dict[str, str] = {}
    for node in nodes:
        f = facts.get(node, {})
        reasons = []
        if "versions" not in f:
            reasons.append("said nothing")
        elif _text(f["versions"]) != usual[0][0]:
            reasons.append(f"other versions than most nodes: {_text(f['versions'])}")
        if f.get("write"):
            reasons.append(f"cannot use the run directory: {f['write']}")
        if settings.gpus_per_node and "gpus" in f and f["gpus"] != settings.gpus_per_node:
            reasons.append(f"{f['gpus']} GPUs, not {settings.gpus_per_node}")
        reasons += f.get("gpu_problems", ())
        if "tflops" in f and f["tflops"] < limits.slowest * rate:
            reasons.append(f"matmul at {f['tflops']:.3g} TFLOPS, the median is {rate:.3g}")
        if abs(f.get("clock_skew", 0.0)) > limits.clock_skew:
            reasons.append(f"clock is off by {f['clock_skew']:.1f} s")
        if f and "tflops" not in f:
            reasons.append("did not finish measuring")
        if node in absent and f:
            reasons.append("did not come to the all-reduce")
        if reasons:
            found[node] = "; ".join(reasons)
    # With a node to blame, that the others could not sum is no fault of theirs; nor that they saw the sum fail, with one that hung in it.
    return found or _hung(facts, nodes) or _failed(facts, nodes)


def _hung(facts: Mapping[str, Mapping[str, Any]], nodes: Sequence[str]) -> dict[str, str]:
    return {node: "did not finish the all-reduce" for node in nodes if not ENDS_OF_ALL_REDUCE & facts[node].keys()}


def _failed(facts: Mapping[str, Mapping[str, Any]], nodes: Sequence[str]) -> dict[str, str]:
    return {node: f"all-reduce: {facts[node]['all_reduce_problem']}" for node in nodes if facts[node].get("all_reduce_problem")}


def _text(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _summary(facts: Mapping[str, Any]) -> str:
    parts = [f"{facts['gpus']} GPUs", f"matmul {facts['tflops']:.3g} TFLOPS"] if "tflops" in facts else []
    parts += [f"all-reduce {facts['all_reduce_ms']:.3g} ms", f"clock {facts['clock_skew']:+.3f} s"] if "all_reduce_ms" in facts else []
    return ", ".join(parts) or json.dumps(dict(facts))


def _job_nodes() -> list[str]:
    listed = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True)
    return listed.stdout.split()
