"""`xc-train`: train stages, measure what they learned, and write the report.

Invariant: everything that can be refused is refused before a process is started, in one line, with exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.cli import command_line, parse
from data_pipeline.errors import EXIT_DONE, UserError
from train.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(_parser(), argv, "what")
    sys.exit(command_line(lambda: args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-train",
        description="Train a vision-language model with Partial LoRA, one YAML a stage.",
        epilog="The demo: xc-train run configs/demo/*.yaml --procs 2; xc-train report runs/demo",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train one or more stages", description=_RUN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.add_argument("what", nargs="+", metavar="CONFIG | key=value", help="YAML files, a stage each, in order; then overrides for all")
    run.add_argument("--procs", type=int, default=None, metavar="N", help="ranks on this machine (default: one a GPU, or 1)")
    run.set_defaults(run=_run)

    evaluate = commands.add_parser("evaluate", help="measure a run's final weights on held-out data", description=_EVALUATE)
    evaluate.add_argument("run_dir", type=Path, help="a finished run directory")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="write summary.json and report.html of runs", description=_REPORT)
    report.add_argument("folder", type=Path, help="a run directory, or a folder of run directories (the stages of one model)")
    report.set_defaults(run=_report)

    prepare = commands.add_parser("prepare", help="compile what DeepSpeed needs, once a machine", description=_PREPARE)
    prepare.set_defaults(run=_prepare)
    return parser


_RUN = """Trains each stage in its run directory (run.dir), then measures it on its held-out data (evaluate).
A stage goes on from its newest checkpoint; a finished one is passed over. Ctrl-C, SIGTERM or `touch RUN/stop` end it after the step,
with a checkpoint.

  xc-train run configs/demo/*.yaml --procs 2
  xc-train run configs/demo/2_pretrain.yaml deepspeed.stage=3 train.lr=1e-3 run.dir=runs/try

Exit codes: 0 done; 1 crash; 2 your input, nothing was started or lost; 70 needs a person; 75 stopped, the same command goes on."""
_EVALUATE = "Caption loss with the right image, a wrong one and none; retrieval among ten captions; greedy captions; text-only loss."
_REPORT = "Collects metrics, stops, held-out figures and sample captions into one self-contained page."
_PREPARE = """Compiles DeepSpeed's CPU communication kernel, once an environment: about a minute, with g++ and ninja, no CUDA compiler.
xc-train run does it where it is missing; installers call it so that the minute is paid where it is seen. Nothing to do on GPUs."""


def _run(args: argparse.Namespace) -> int:
    from train import configure
    from train.run_dir import RunDir, write_atomic

    paths = [w for w in args.what if "=" not in w]
    overrides = [w for w in args.what if "=" in w]
    if not paths:
        raise UserError("xc-train run needs at least one CONFIG (the repository's own are in configs/)")
    configs = [configure.load(path, overrides) for path in paths]
    dirs = [c.run.dir for c in configs]
    if len(set(dirs)) < len(dirs):
        raise UserError(f"two stages share run.dir {next(d for d in dirs if dirs.count(d) > 1)} (give each its own)")
    for i, config in enumerate(configs):
        _check_stage(config, earlier=dirs[:i])

    from train.device import prepare_deepspeed
    from train.launch import run_stage

    procs = args.procs or _default_procs()
    prepare_deepspeed()
    for config in configs:
        run = RunDir(config.run.dir)
        run.create()
        if not (run.final / "manifest.json").exists():
            write_atomic(run.config, configure.to_yaml(config).encode())
            code = run_stage(config, procs)
            if code != EXIT_DONE:
                return code
        else:
            print(f"{config.run.name}: finished before, in {run.path}")
        if not run.evaluation.exists() and (config.evaluate.splits or config.evaluate.text):
            code = _evaluate_apart(run.path)
            if code != EXIT_DONE:
                return code
    last = Path(dirs[-1])
    print(f"next: xc-train report {last.parent if len(dirs) > 1 else last}")
    return EXIT_DONE


def _check_stage(config: Config, earlier: list[str]) -> None:
    """Opens the data and compares with what the run directory holds, before anything is started.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    from data_pipeline.loader import open_data
    from data_pipeline.shards.source import ShardSource
    from train import configure
    from train.run_dir import RunDir
    from train.weights import final

    data = open_data(config.data, config.run.seed, config.train.steps)
    rows, words = config.model.decoder.vocab, data.tokenizer.size
    if words > rows:
        raise UserError(f"model.decoder.vocab: {rows} rows do not hold the tokenizer's {words} words (set it to {words} or more)")
    held_out = {f"evaluate.splits.{name}": folder for name, folder in config.evaluate.splits.items()}
    for name, folder in held_out.items():
        if not (Path(folder) / "candidates.json").exists():
            raise UserError(f"{name}: no candidates.json in {Path(folder).resolve()} (mend the path)")
    if config.evaluate.text:
        held_out["evaluate.text"] = config.evaluate.text
    for name, folder in held_out.items():
        ShardSource(name, folder).require_tokenizer(data.tokenizer.digest)
    if config.run.init_from and config.run.init_from not in earlier:
        final.digest(config.run.init_from)
    run = RunDir(config.run.dir)
    if run.config.exists():
        key = configure.shaping_difference(config, configure.read_resolved(run.path))
        if key:
            others = ", or set data.change to go on with the new mix" if key.split(".")[1] in configure.MIX else ""
            raise UserError(f"{run.path} belongs to another config: {key} differs (choose another run.dir, or delete that one{others})")


def _default_procs() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _evaluate_apart(run_dir: Path) -> int:
    """In a process of its own, so that what is measured is what was written and read back."""
    import subprocess

    # Passive: threads that spin at every barrier collapse as soon as anything else runs on their cores.
    defaults = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**defaults, **os.environ}
    return subprocess.run([sys.executable, "-m", "train.cli", "evaluate", str(run_dir)], env=environment).returncode


def _evaluate(args: argparse.Namespace) -> int:
    from train.evaluate import evaluate_run

    evaluate_run(args.run_dir)
    return EXIT_DONE


def _report(args: argparse.Namespace) -> int:
    from train.report.build import write_report

    page = write_report(args.folder)
    print(f"open {page.resolve()}")
    return EXIT_DONE


def _prepare(args: argparse.Namespace) -> int:
    from train.device import prepare_deepspeed

    prepare_deepspeed()
    return EXIT_DONE


if __name__ == "__main__":
    main()
