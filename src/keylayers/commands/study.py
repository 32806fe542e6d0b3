# SPDX-License-Identifier: Apache-2.0
"""`keylayers study`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from keylayers.commands import sub_command
from keylayers.errors import ConfigError, StudyError

app = sub_command("""\
keylayers study study.yaml --dry-run
keylayers study study.yaml --output results --workers 4
keylayers study study.yaml --output results --ray-address auto
keylayers study recipes/small/*.yaml --set model=my-model --set data=[mine.jsonl]
""")


@app.default
def study(
    *studies: Path,
    output: Path = Path("study"),
    settings: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    workers: int | None = None,
    ray_address: str | None = None,
    dry_run: bool = False,
) -> None:
    """Run every combination of models, data, seeds, methods and budgets, each once.

    Rankings of the same model, data and training share one stage 1. Finished cells are never run
    again. A failed cell does not stop the others; the next run tries it again. Writes
    results.parquet and results.csv, agreement.csv if rankings are compared, and report.html if the
    packages for charts are installed.

    Args:
        studies: YAML files with `options`, `grid` and what is measured. Several files share their
            cells, and each has its results in a folder of its name.
        output: Folder of the cells and results.
        settings: `name=value` replaces an option of the files, `name=[value, value]` an axis.
        workers: Cells to run at the same time. Default: one per accelerator, or per core without
            accelerators.
        ray_address: Run on this Ray cluster, which must see the same files: HOST:PORT,
            ray://HOST:PORT, or `auto` to find a running cluster.
        dry_run: Only list the cells and their commands.
    """
    from keylayers.commands import study_workers
    from keylayers.commands.console import stdout
    from keylayers.commands.study_cells import CELLS, check, plan
    from keylayers.commands.study_grid import printable, read_study
    from keylayers.commands.study_results import COLUMNS, write_results
    from keylayers.files import one_at_a_time, output_folder
    from keylayers.yaml_values import read_yaml

    if workers is not None and (workers < 1 or ray_address is not None):
        raise ConfigError("`workers` must be at least 1, and left out with `ray_address`")
    names = {path.stem: path for path in studies}
    if not studies or len(names) < len(studies) or CELLS in names:
        raise ConfigError("studies must be files with different names, other than `cells`")
    files = {name: read_study(read_yaml(p, "study"), str(p), settings) for name, p in names.items()}
    for axis in {axis for file in files.values() for axis in file.grid} & COLUMNS:
        raise ConfigError(f"no axis of a study must be named like a column of results, got {axis}")
    planned = {name: plan(file, output) for name, file in files.items()}
    cells = list({cell.name: cell for own in planned.values() for cell in own}.values())
    check(cells)
    states = {cell.name: study_workers.state_of(cell) for cell in cells}
    console = stdout()
    if dry_run:
        for cell in cells:
            line = f"{cell.name} ({states[cell.name].status}): {cell.command}"
            console.print(printable(line), markup=False, soft_wrap=True)
        return
    with output_folder(output), one_at_a_time(output):
        if any(state.status != "finished" for state in states.values()):
            ray = study_workers.on_ray(ray_address) if ray_address is not None else None
            with ray or study_workers.local(workers) as submit:
                states = study_workers.run_cells(cells, submit)
        for name, own in planned.items():
            folder = output / name if len(planned) > 1 else output
            write_results(folder, files[name], own, states)
    num_finished = sum(state.status == "finished" for state in states.values())
    console.print(f"{num_finished} of {len(cells)} cells finished")
    if num_finished < len(cells):
        raise StudyError(
            "every cell must finish; the errors of those that did not are in results.csv and their "
            "log.txt, and the same command tries them again"
        )
