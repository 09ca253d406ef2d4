"""`xc-train`: train stages, measure what they learned, and write the report.

Invariant: everything that can be refused is refused before a process is started, in one line, with exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.command_line import command_line, parse
from data_pipeline.errors import EXIT_DONE, UserError
from train.config import Config
from train.run_dir import RunDir

GPU_DRIVERS = ("/proc/driver/nvidia", "/dev/kfd")
"""One of these is where a machine has GPUs."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse(_parser(), argv, "what")
    sys.exit(command_line(lambda: args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xc-train",
        description="Train a vision-language model with Partial LoRA, one YAML a stage.",
        epilog="The demo, once make demo has indexed it: xc-train run configs/demo/[1-3]*.yaml --procs 2; xc-train report runs/demo",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="train one or more stages", description=_RUN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run.add_argument("what", nargs="+", metavar="CONFIG | key=value", help="YAML files, a stage each, in order; then overrides for all")
    run.add_argument("--procs", type=int, default=None, metavar="N", help="ranks on this machine (default: one a GPU, or 1)")
    run.set_defaults(run=_run)

    plan = commands.add_parser(
        "plan", help="what a stage will cost", description=_PLAN, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan.add_argument("what", nargs="+", metavar="CONFIG | key=value", help="one YAML file; then overrides")
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="ranks (default 8)")
    plan.add_argument("--gpu", type=float, default=80.0, metavar="GIB", help="memory of one GPU in GiB (default 80)")
    plan.add_argument("--peak", type=float, default=989.0, metavar="TFLOPS", help="dense TFLOP/s of one GPU (default 989: H100, bf16)")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="SHARE", help="model FLOPs utilisation that is expected (default 0.4)")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("evaluate", help="measure a run's final weights on held-out data", description=_EVALUATE)
    evaluate.add_argument("run_dir", type=Path, help="a finished run directory")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="write summary.json and report.html of runs", description=_REPORT)
    report.add_argument("folder", type=Path, help="a run directory, or a folder of run directories (the stages of one model)")
    report.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="the page (default: report.html in the folder)")
    report.set_defaults(run=_report)

    export = commands.add_parser(
        "export", help="write a run as a Hugging Face directory", description=_EXPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    export.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory, or RUN/checkpoints/step-N")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    export.set_defaults(run=_export)

    prepare = commands.add_parser(
        "prepare",
        help="compile what DeepSpeed needs, once a machine; make a run directory for torchrun",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("what", nargs="*", metavar="CONFIG | key=value", help="the YAML file of a stage; then overrides")
    prepare.set_defaults(run=_prepare)
    return parser


_RUN = """Trains each stage in its run directory (run.dir), then measures it on its held-out data (evaluate).
A stage goes on from its newest checkpoint; a finished one is passed over. Ctrl-C, SIGTERM or `touch RUN/stop` end it after the step,
with a checkpoint; `touch RUN/save` asks for one. docs/training.md says what watches over a run.

  xc-train run configs/demo/[1-3]*.yaml --procs 2
  xc-train run configs/demo/2_pretrain.yaml deepspeed.stage=3 train.lr=1e-3 run.dir=runs/try

Exit codes: 0 done; 1 crash; 2 your input, nothing was started or lost; 70 needs a person; 75 stopped, the same command goes on."""
_PLAN = """Prints what a stage trains, its steps, the FLOPs of a step, the memory of a GPU, and the GPU-hours. No GPU is needed.

  xc-train plan configs/pretrain_7b.yaml --gpus 64 --gpu 80 --mfu 0.4
  xc-train plan configs/pretrain_7b.yaml deepspeed.stage=3 train.checkpointing.kind=full

FLOPs come from the indexed data where it is there, else from full packs; steps and GPU-hours of a run in epochs need the index."""
_EVALUATE = "Caption loss with the right image, a wrong one and none; retrieval among ten captions; greedy captions; text-only loss."
_REPORT = "Collects metrics, stops, held-out figures and sample captions into one self-contained page."
_EXPORT = """Writes weights as a Hugging Face directory with the names and config values of the released InternLM-XComposer2: safetensors
shards with their index, tokenizer, config.json (its auto_map names the official modelling code), and a model card.

  xc-train export runs/pretrain_7b hub/my-xcomposer2
  xc-train export runs/pretrain_7b/checkpoints/step-00002000 hub/step-2000

It says what of the language model is bitwise what the stage began from, and where PLoRA's ranks, scales or mode are not what engines
take for granted. The folder can be given as run.init_from again, bitwise (docs/weights.md)."""
_PREPARE = """Compiles DeepSpeed's CPU communication kernel, once an environment: about a minute, with g++ and ninja, no CUDA compiler.
xc-train run does it where it is missing; installers call it so that the minute is paid where it is seen. Nothing to do on GPUs.

With a CONFIG it also checks the stage and makes its run directory, for ranks that something else than xc-train or xc-slurm starts:

  xc-train prepare configs/demo/2_pretrain.yaml
  torchrun --nproc-per-node 2 -m train.rank runs/demo/pretrain; xc-train evaluate runs/demo/pretrain

How such a life ended is in RUN/outcome.json: torchrun makes 1 of every code."""


def _run(args: argparse.Namespace) -> int:
    from train import configure

    paths = [w for w in args.what if "=" not in w]
    overrides = [w for w in args.what if "=" in w]
    if not paths:
        raise UserError("xc-train run needs at least one CONFIG (the repository's own are in configs/)")
    configs = [configure.load(path, overrides) for path in paths]
    dirs = [Path(c.run.dir).resolve() for c in configs]
    if len(set(dirs)) < len(dirs):
        raise UserError(f"two stages share run.dir {next(d for d in dirs if dirs.count(d) > 1)} (give each its own)")
    procs = _ranks(args.procs)
    for i, config in enumerate(configs):
        _check_stage(config, earlier=configs[:i])

    from train.extensions import prepare_deepspeed, prepared
    from train.launch import run_stage

    for config in configs:
        configure.data_parallel(config, procs)
    if not prepared():
        prepare_deepspeed()
    for config in configs:
        run = RunDir(config.run.dir)
        if not (run.final / "manifest.json").exists():
            code = run_stage(config, procs)
            if code != EXIT_DONE:
                return code
        else:
            configure.require_same(config, run.path)  # somebody may have trained another one since it was checked
            print(f"{config.run.name}: finished before, in {run.path}")
        if not run.evaluation.exists() and configure.held_out(config):
            code = _evaluate_apart(run.path)
            if code != EXIT_DONE:
                return code
    last = Path(configs[-1].run.dir)
    print(f"next: xc-train report {last.parent if len(dirs) > 1 else last}")
    return EXIT_DONE


def _plan(args: argparse.Namespace) -> int:
    from train.outlook import Machine, plan

    paths = [w for w in args.what if "=" not in w]
    if len(paths) != 1:
        raise UserError(f"xc-train plan needs one CONFIG, not {len(paths)} (plan stages one by one)")
    if min(args.gpus, args.gpu, args.peak, args.mfu) <= 0 or args.mfu > 1:
        raise UserError("xc-train plan: --gpus, --gpu and --peak must be above 0, and --mfu a share up to 1 (change them)")
    print(plan(paths[0], [w for w in args.what if "=" in w], Machine(args.gpus, args.gpu, args.peak * 1e12, args.mfu)))
    return EXIT_DONE


def _check_stage(config: Config, earlier: list[Config]) -> None:
    """Opens the data and compares with what the run directory and the stages before hold, before anything is started.

    Raises:
        UserError: what is wrong, where, and the cure.
    """
    from data_pipeline.opened import open_data
    from data_pipeline.shards.source import ShardSource
    from train import configure
    from train.weights import meaning

    data = open_data(config.data, config.run.seed, config.train.steps)
    rows, words = config.model.decoder.vocab, data.tokenizer.size
    if words > rows:
        raise UserError(f"model.decoder.vocab: {rows} rows do not hold the tokenizer's {words} words (set it to {words} or more)")
    held_out = configure.held_out(config)
    for name, folder in held_out.items():
        if name != "evaluate.text" and not (Path(folder) / "candidates.json").exists():
            raise UserError(f"{name}: no candidates.json in {Path(folder).resolve()} (mend the path)")
    for name, folder in held_out.items():
        ShardSource(name, folder, key=name).require_tokenizer(data.tokenizer.digest)
    named = configure.named_weights(config)
    begins = Path(config.run.init_from).resolve() if config.run.init_from else None
    before = next((stage for stage in earlier if Path(stage.run.dir).resolve() == begins), None)
    if before is not None:
        trained = meaning.trains_low_rank(before.model, before.train)
        for key, what in meaning.differences(before.model, config.model, config.data.context, trained).items():
            raise UserError(f"{config.run.name}: {key}: {before.run.name}, which it begins from, has {what} (give both the same)")
    elif named:
        from train.weights import initial  # and with it torch and the model, which nothing else here waits for

        initial.check(config)
    configure.require_same(config, Path(config.run.dir))


def _ranks(asked: int | None) -> int:
    """How many to start: those that were asked for, else one a GPU, or 1.

    Raises:
        UserError: there are GPUs, and fewer; or none were asked for.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--procs {asked}: at least one rank trains (give 1 or more)")
    if asked and not any(Path(driver).exists() for driver in GPU_DRIVERS):
        return asked  # without torch, whose import costs more than all else here
    import torch

    gpus = torch.cuda.device_count()
    if asked and 0 < gpus < asked:
        from train.device import too_many_ranks

        raise too_many_ranks(asked, gpus)
    return asked or max(1, gpus)


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

    page = write_report(args.folder, args.output)
    print(f"open {page.resolve()}")
    return EXIT_DONE


def _export(args: argparse.Namespace) -> int:
    from train.weights.export import export

    export(args.path, args.out)
    return EXIT_DONE


def _prepare(args: argparse.Namespace) -> int:
    from train import configure
    from train.extensions import prepare_deepspeed
    from train.launch import made

    paths = [w for w in args.what if "=" not in w]
    if len(paths) > 1 or (args.what and not paths):
        raise UserError(
            f"xc-train prepare takes one CONFIG, not {len(paths)} (prepare stages one by one, each when the one before is done)"
        )
    prepare_deepspeed()
    for path in paths:
        config = configure.load(path, [w for w in args.what if "=" in w])
        _check_stage(config, earlier=[])
        run = RunDir(config.run.dir)
        if not (run.final / "manifest.json").exists():
            with made(config):
                pass
        print(f"next: torchrun --nproc-per-node N -m train.rank {run.path}")
    return EXIT_DONE


if __name__ == "__main__":
    main()
