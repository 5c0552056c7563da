"""gpu.py's rows as a Markdown table and as lines to print."""

from experiments.benchmarks.gpu_profile import print_kernels

HEAD = (
    "| model | what differs | ms/step | flowing | img/s | MFU | peak GB | XLA's GB "
    "| init | trace | compile s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
)
CHECKS = {
    "Golden train step, relative to the reference": "golden",
    "Attention, relative to float64": "attention",
    "Feature extraction": "extraction",
}


def number(value, form: str) -> str:
    """The value in that form, '' for None."""
    return "" if value is None else format(value, form)


def step_line(name: str, row: dict) -> str:
    """One row of the table of training steps: 'step MODEL ..', 'peer WHO MODEL ..'."""
    kind, *words = name.split()
    if kind == "peer":
        words = [f"{words[0]}: {words[1]}", *words[2:]]
    cells = [words[0], " ".join(words[1:])]
    if "ms" not in row:
        why = (row.get("error") or "not run")[:160].replace("|", "/")
        return f"| {' | '.join(cells)} | {why} |\n"
    share, memory = row["mfu"], row.get("predicted_gb", {})
    cells += [
        f"{row['ms']:.1f} ({row['ms_min']:.1f} to {row['ms_max']:.1f})",
        number(row.get("ms_without_waiting"), ".1f"),
        f"{row['images_per_second']:.0f}",
        f"{100 * share:.1f} %" if share else "",
        number(row["peak_gb"], ".2f"),
        number(memory.get("total"), ".2f"),
    ]
    names = ("init_seconds", "trace_seconds", "compile_seconds")
    cells += [number(row.get(n), ".1f") for n in names]
    if not row.get("finite", True):
        cells[2] += ", LOSSES NOT FINITE"
    return f"| {' | '.join(cells)} |\n"


def check_lines(rows: dict) -> str:
    """Rows of a check, each figure by its name."""
    lines = ""
    for name, row in rows.items():
        figures = []
        for key, value in row.items():
            if isinstance(value, dict):
                inner = ", ".join(f"{k} {v:.1e}" for k, v in value.items())
                figures.append(f"{key}: {inner}")
            elif isinstance(value, float):
                form = {"ms": ".3f", "img/s": ".0f", "least": ".0f"}.get(key, ".1e")
                figures.append(f"{key} {value:{form}}")
            else:
                figures.append(f"{key} {value}")
        lines += f"- {name}: {'; '.join(figures)}\n"
    return lines


def fed_lines(steps: dict) -> str:
    """Training from the pipeline, of the rows that did."""
    lines = ""
    for name, row in steps.items():
        if fed := row.get("fed"):
            lines += (
                f"- {name.removeprefix('step ')}: {fed['images_per_second']:.0f} img/s,"
                f" {100 * fed['data_wait']:.1f} % of the time waiting for data; "
                f"{row['images_per_second']:.0f} img/s on one batch\n"
            )
    return lines


def repeat_lines(rows: dict) -> str:
    """What two runs in a process, and processes among them, have in common."""
    lines, wholes = "", {}
    for name, row in rows.items():
        found = row.get("repeat", {})
        if "equal" not in found:
            why = row.get("error") or found.get("error") or "not run"
            lines += f"- {name}: {why}\n"
            continue
        wholes[name] = found["digests"]["whole"]
        differ = ", ".join(found["differ"][1:7])
        same = "the same bits" if found["equal"] else f"OTHER bits ({differ})"
        lines += (
            f"- {name}: initial state {row['init_seconds']:.1f} s, traced in "
            f"{row['trace_seconds']:.1f} s, compiled in {row['compile_seconds']:.1f} s;"
            f" two runs of {found['steps']} steps in one process have {same}; "
            f"SHA-256 of the state {wholes[name][:12]}\n"
        )
    if len(wholes) > 1:
        first, *others = wholes
        for name in others:
            same = "the same" if wholes[name] == wholes[first] else "OTHER"
            lines += f"- {first} and {name}: {same} bits\n"
    return lines


def markdown(rows: dict[str, dict]) -> str:
    """The whole page."""
    seen = {
        f"{r['device']}, jax {r['jax']}, {r['date'].split()[0]}"
        for r in rows.values()
        if "device" in r
    }
    text = f"# {'; '.join(sorted(seen)) or 'nothing ran'}\n\n"
    text += "`python -m experiments.benchmarks.gpu`; its docstring says what is what.\n"
    for title, name in CHECKS.items():
        if name in rows:
            row = rows[name]
            text += f"\n## {title}\n\n" + check_lines(row.get("rows", {}))
            text += f"- {row['error']}\n" if "error" in row else ""
    steps = {n: r for n, r in rows.items() if n.split()[0] in ("step", "peer")}
    if steps:
        text += "\n## Training steps\n\n" + HEAD
        text += "".join(step_line(name, row) for name, row in steps.items())
    if lines := fed_lines(steps):
        text += "\n## From the input pipeline\n\n" + lines
    repeat = {n: r for n, r in rows.items() if n.startswith("repeat")}
    if repeat:
        text += "\n## Compiled again, run again\n\n" + repeat_lines(repeat)
    return text


def print_row(name: str, row: dict) -> None:
    """What a row says, as soon as it is there."""
    if name.split()[0] in ("step", "peer"):
        line = step_line(name, row) + fed_lines({name: row})
        line += repeat_lines({name: row}) if "repeat" in row else ""
    elif name.startswith("repeat"):
        line = repeat_lines({name: row})
    else:
        line = f"{name}: {row.get('error') or row.get('not_run') or ''}\n"
        line += check_lines(row.get("rows", {}))
    print(line, end="", flush=True)
    if "profile" in row:
        print_kernels(row["profile"])
