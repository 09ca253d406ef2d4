"""Shows a simulation: tables on a terminal, and a page with curves over steps.

Invariant: every figure says over what it was taken; estimates are called so.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipeline.inspect import charts, page
from data_pipeline.inspect.simulate import Simulation, Step

Row = tuple[str, str, str, str]
"""(what, mean over the steps, worst step, in which words)."""


def show(simulation: Simulation, name: str, output: Path | None) -> None:
    """Prints the tables; writes the page where one is asked for.

    Raises:
        UserError: the page cannot be written.
    """
    console = Console(highlight=False)
    console.print(Text(heading(simulation, name), "bold"))
    for title, head, rows in tables(simulation):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim")
        for i, column in enumerate(head):
            last = i == len(head) - 1
            table.add_column(column, justify="left" if i == 0 or last else "right", style="dim" if last else None)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    for warning in simulation.warnings:
        console.print(Text(f"\nwarning: {warning}", "yellow"))
    if output is not None:
        values = {"heading": heading(simulation, name), "tables": tables(simulation), "warnings": simulation.warnings}
        page.write(page.render("simulate.html", name=name, panels=panels(simulation), digest=simulation.data.plan.digest, **values), output)


def heading(simulation: Simulation, name: str) -> str:
    """What was simulated."""
    done, whole = len(simulation.steps), simulation.run_steps
    of = "the whole run" if simulation.ended else f"the first of {whole:,}" if whole else "the first of a mix without end"
    return f"{name}: {done:,} step{'s' if done != 1 else ''} on {simulation.world:,} rank{'s' if simulation.world != 1 else ''}, {of}"


def tables(simulation: Simulation) -> list[tuple[str, Sequence[str], list[Row]]]:
    """(title, names of the columns, rows) of each table."""
    return [
        ("packs", ("", "mean", "worst step", ""), _packs(simulation)),
        ("ranks", ("", "mean", "worst step", ""), _ranks(simulation)),
        ("disks", ("", "mean", "most", ""), _disks(simulation)),
        ("shuffle", ("", "measured", "uniform", ""), _shuffle(simulation)),
        ("sources", ("", "samples a step", "tokens", "epochs"), _sources(simulation)),
    ]


def _packs(simulation: Simulation) -> list[Row]:
    section, full = simulation.section, simulation.full_steps
    whole = simulation.run_steps
    length = "–" if whole is None else f"{whole:,}"
    known = "walked to its end" if simulation.ended else "estimated" if simulation.section.unit.value == "epochs" else "train.steps"
    return [
        ("steps of the run", length, "", known if whole else "no end: data.unit is not epochs and train.steps is not given"),
        ("packs a step", f"{section.global_batch:,}", "", f"{simulation.micro_steps} micro-steps of {section.micro_packs} a rank"),
        ("empty packs", _percent(_mean(full, lambda s: s.empty)), _percent(max(s.empty for s in full)), "of all places"),
        (
            "fill",
            _percent(_mean(full, lambda s: s.fill)),
            _percent(min(s.fill for s in full)),
            f"of a context of {section.context:,} tokens",
        ),
        (
            "padding-free",
            _percent(_mean(full, lambda s: s.padding_free)),
            _percent(min(s.padding_free for s in full)),
            "of the tokens laid out, padding segments and empty packs included",
        ),
        ("tokens a step", f"{_mean(full, lambda s: s.tokens):,.0f}", f"{min(s.tokens for s in full):,}", "without padding"),
    ]


def _ranks(simulation: Simulation) -> list[Row]:
    steps, costs = simulation.full_steps, simulation.cost
    model = f"token {costs.token:,}, pair {costs.attention:,}, image {costs.image:,}"
    rows = [
        ("cost, max/mean", _mean_of(steps, lambda s: s.cost), f"{max(s.cost for s in steps):.3f}", f"sums of ranks; costs: {model}"),
        (
            "cost in lock step",
            _mean_of(steps, lambda s: s.lock_step),
            f"{max(s.lock_step for s in steps):.3f}",
            "dearest rank of each micro-step / mean of ranks",
        ),
    ]
    shown = [s for s in steps if s.image_tokens[0]]
    if shown:
        mean = f"{_mean(shown, lambda s: s.image_tokens[0]):,.0f}"
        rows.append(("image tokens a rank", mean, f"{max(s.image_tokens[1] for s in shown):,.0f}", "a step"))
        spread = [s.image_tokens[1] / s.image_tokens[0] for s in shown]
        rows.append(("image tokens, max/mean", f"{fmean(spread):.3f}", f"{max(spread):.3f}", "over ranks"))
    return rows


def _disks(simulation: Simulation) -> list[Row]:
    steps = simulation.steps
    total = sum(len(source.facts.shards) for source in simulation.data.sources)
    return [
        ("read a step", _bytes(_mean(steps, lambda s: s.bytes)), _bytes(max(s.bytes for s in steps)), "by all ranks, from shards"),
        ("shards open", f"{_mean(steps, lambda s: s.shards):,.1f}", f"{max(s.shards for s in steps):,}", f"in a step, of {total:,}"),
    ]


def _shuffle(simulation: Simulation) -> list[Row]:
    steps = simulation.steps
    rows = [
        (
            "two samples from one shard",
            _percent(_mean(steps, lambda s: s.shuffle.pairs)),
            _percent(_mean(steps, lambda s: s.uniform.pairs)),
            "of the pairs of one source in a step",
        ),
        (
            "largest share of one shard",
            _percent(_mean(steps, lambda s: s.shuffle.largest)),
            _percent(_mean(steps, lambda s: s.uniform.largest)),
            "of a step's samples",
        ),
    ]
    measured, uniform = simulation.neighbours
    if uniform:
        rows.append(("between neighbours on disk", f"{measured:,.1f}", f"{uniform:,.1f}", "steps, of pairs within the steps simulated"))
    return rows


def _sources(simulation: Simulation) -> list[Row]:
    steps = simulation.steps
    tokens = [sum(s.tokens_by_source[i] for s in steps) for i in range(len(simulation.data.sources))]
    rows = []
    for i, source in enumerate(simulation.data.sources):
        drawn, kept = sum(s.samples[i] for s in steps), int(source.block_starts[-1])
        epochs = f"{drawn / kept:,.2f} of {kept:,} samples"
        if simulation.run_steps and not simulation.ended:
            epochs += f"; at the end about {drawn / kept / len(steps) * simulation.run_steps:,.2f}"
        rows.append((source.name, f"{drawn / len(steps):,.1f}", _percent(tokens[i] / max(1, sum(tokens))), epochs))
    return rows


def panels(simulation: Simulation) -> list[tuple[str, charts.Chart, list[tuple[str, str]]]]:
    """(title, chart, (name, colour) of its curves) of the page."""
    steps, sources = simulation.full_steps, simulation.data.sources
    colours = [f"var(--s{i % 8})" for i in range(max(2, len(sources)))]
    kept = [max(1, int(source.block_starts[-1])) for source in sources]
    share = [[100 * s.tokens_by_source[i] / max(1, s.tokens) for s in steps] for i in range(len(sources))]
    epochs = [[n / kept[i] for n in accumulate(s.samples[i] for s in steps)] for i in range(len(sources))]
    spread = [s.image_tokens[1] / s.image_tokens[0] if s.image_tokens[0] else 1.0 for s in steps]
    names = [source.name for source in sources]
    wanted: list[tuple[str, Sequence[str], list[list[float]], bool]] = [
        ("Fill, %", ("of the context", "padding-free"), [[100 * s.fill for s in steps], [100 * s.padding_free for s in steps]], False),
        ("Cost over ranks, max/mean", ("sums of ranks", "in lock step"), [[s.cost for s in steps], [s.lock_step for s in steps]], False),
        ("Share of tokens, %", names, share, True),
        ("Epochs", names, epochs, True),
        ("Image tokens over ranks, max/mean", ("max/mean",), [spread], False),
        ("Read a step, MB", ("MB",), [[s.bytes / 1e6 for s in steps]], True),
        ("Shards open in a step", ("shards",), [[float(s.shards) for s in steps]], True),
        (
            "Two samples of a step from one shard, %",
            ("measured", "uniform"),
            [[100 * s.shuffle.pairs for s in steps], [100 * s.uniform.pairs for s in steps]],
            True,
        ),
    ]
    found = []
    for title, labels, values, zero in wanted:
        lines = [
            charts.Series(label, colour, list(range(1, len(steps) + 1)), line, [1.0] * len(steps))
            for label, colour, line in zip(labels, colours, values, strict=False)
        ]
        chart = charts.draw(lines, smooth=title != "Epochs", zero=zero, x_count=4)
        if chart:
            found.append((title, chart, list(zip(labels, colours, strict=False)) if len(labels) > 1 else []))
    return found


def _mean(steps: Sequence[Step], value: Callable[[Step], float]) -> float:
    return fmean(map(value, steps))


def _mean_of(steps: Sequence[Step], value: Callable[[Step], float]) -> str:
    return f"{_mean(steps, value):.3f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"
