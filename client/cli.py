"""`unpoison`: the service from a terminal.

Exit codes: 0 done, 1 usage or API error, 2 the job failed, 3 it crashed, 4 it was cancelled, 5 waiting took too long, 6 its verdict is none of
those that were required.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import TextColumn
from rich.table import Table

from client.errors import UnpoisonError, WaitTimeout
from client.flows import Json
from client.sessions import Client
from client.terminal import Output, cell, out, say

EXIT = {"succeeded": 0, "failed": 2, "crashed": 3, "cancelled": 4}
EXIT_ERROR, EXIT_TIMEOUT, EXIT_VERDICT = 1, 5, 6
JOB = ["id", "status", "method", "attempt", "cleaned_model_id", "cleansed_dataset_id", "started_at", "finished_at"]


output = Output()
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
models, datasets, methods, jobs, artifacts = (typer.Typer(no_args_is_help=True) for _ in range(5))
for _name, _group, _help in (
    ("models", models, "Suspect and purified models."),
    ("datasets", datasets, "Image sets."),
    ("methods", methods, "What can be run."),
    ("jobs", jobs, "Run and follow defenses."),
    ("artifacts", artifacts, "What jobs gave back."),
):
    app.add_typer(_group, name=_name, help=_help)

Id = Annotated[str, typer.Argument(metavar="ID")]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False)]
Required = Annotated[
    list[str] | None,
    typer.Option(
        "--require", metavar="VERDICT", help="Wait for the job and exit with 6 unless this is its verdict (purified, no_evidence, …); may be repeated."
    ),
]
Resize = Annotated[int | None, typer.Option(help="Only data sets: make every picture a square of this many pixels.")]


@app.callback()
def _options(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print ids only.")] = False,
    url: Annotated[str | None, typer.Option(envvar="UNPOISON_URL", help="Where the service is.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="UNPOISON_API_KEY", help="The key to use.", show_envvar=True)] = None,
) -> None:
    output.as_json, output.quiet, output.url, output.api_key = as_json, quiet, url, api_key


# -- the machine ---------------------------------------------------------------------------------------------------


@app.command()
def serve() -> None:
    """Run the API and one worker on this machine."""
    raise typer.Exit(subprocess.run([sys.executable, "-m", "service", "serve"], check=False).returncode)


@app.command()
def doctor() -> None:
    """Say what each floor of a service on this machine sees."""
    more = ["--json"] if output.as_json else []
    raise typer.Exit(subprocess.run([sys.executable, "-m", "service", "doctor", *more], check=False).returncode)


# -- models and datasets -------------------------------------------------------------------------------------------


def _uploads(group: typer.Typer, kind: str, columns: list[str]) -> None:
    @group.command("upload", help=f"Upload one of your {kind} and wait until it was read.")
    def upload(file: File, name: Annotated[str | None, typer.Option(help="What to call it.")] = None, resize: Resize = None) -> None:
        with output.client() as client, output.transfer(f"uploading {file.name}") as told:
            found = getattr(client, kind).upload(file, name=name, resize=resize, progress=told)
        _show_upload(found, columns)

    @group.command("inspect", help="Say what a file is, or why it would be refused; nothing is stored.")
    def inspect(file: File, resize: Resize = None) -> None:
        with output.client() as client, output.transfer(f"sending {file.name}") as told:
            found = getattr(client, kind).inspect(file, resize=resize, progress=told)
        _show_upload(found, ["sha256"])

    @group.command("ls", help=f"List {kind}.")
    def listing() -> None:
        with output.client() as client:
            output.show(getattr(client, kind).list(), columns)

    @group.command("show", help="Show one.")
    def show(item: Id) -> None:
        with output.client() as client:
            found = getattr(client, kind).get(item)
        _show_upload(found, [name for name in found if name != "description"])

    @group.command("rm", help="Delete one; refused while a job needs it.")
    def remove(item: Id) -> None:
        with output.client() as client:
            getattr(client, kind).delete(item)

    @group.command("download", help="Get the bytes back, as they were uploaded.")
    def download(item: Id, to: Annotated[Path, typer.Option("-o", "--output")]) -> None:
        with output.client() as client, output.transfer(f"downloading {to.name}") as told:
            getattr(client, kind).download(item, to, progress=told)


_uploads(models, "models", ["id", "name", "status", "bytes", "created_at"])
_uploads(datasets, "datasets", ["id", "name", "status", "bytes", "created_at"])


# -- methods -------------------------------------------------------------------------------------------------------


@methods.command("ls")
def list_methods() -> None:
    """List defenses and attacks."""
    with output.client() as client:
        output.show(client.methods.list(), ["name", "kind", "title", "summary"])


@methods.command("show")
def show_method(name: Annotated[str, typer.Argument()]) -> None:
    """Show a method and its parameters."""
    with output.client() as client:
        method = client.methods.get(name)
    if output.as_json:
        print(json.dumps(method))
        return
    say(f"{method['title']} ({method['kind']}): {method['summary']}\n{method['paper']}\nneeds: {', '.join(method['needs'])}", console=out)
    if method["caution"]:
        say(f"caution: {method['caution']}", console=out)
    table = Table("parameter", "default", "bounds", "description")
    for key, part in method["params_schema"]["properties"].items():
        if key != "method":
            table.add_row(*map(cell, (key, method["defaults"].get(key), _bounds(part), part.get("description") or part.get("title", ""))))
    out.print(table)


@methods.command("propose")
def propose(have: Annotated[list[str], typer.Argument(metavar="HAVE...", help="model, clean_images, clean_labels, suspect_dataset: what you have.")]) -> None:
    """Say which methods to start with, and why."""
    with output.client() as client:
        output.show(client.methods.propose(*have), ["kind", "defense", "why"])


# -- jobs ----------------------------------------------------------------------------------------------------------


@jobs.command("submit")
def submit(
    method: Annotated[str, typer.Option(help="See `unpoison methods ls`; it also says what each needs.")],
    model: Annotated[str | None, typer.Option(help="Id of the suspect model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of the clean images.")] = None,
    suspect: Annotated[str | None, typer.Option(help="Id of the untrusted training set, to cleanse it or to train on it.")] = None,
    param: Annotated[list[str] | None, typer.Option("-p", "--param", metavar="KEY=VALUE", help="A parameter; may be repeated.")] = None,
    params: Annotated[Path | None, typer.Option(help="A JSON file of parameters.", exists=True)] = None,
    test: Annotated[str | None, typer.Option(help="Id of a labelled test set: BA is measured on it.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", metavar="KEY=VALUE", help="The known attack (method=badnets target=5): ASR is measured.")
    ] = None,
    attack_file: Annotated[
        Path | None, typer.Option(help="A JSON file of the known attack: own patches and pictures are too long for a line.", exists=True)
    ] = None,
    triggered: Annotated[str | None, typer.Option(help="Id of images that carry the trigger, labelled with their true classes: ASR is measured.")] = None,
    target: Annotated[int | None, typer.Option(help="The class the triggered images are sent to; all-to-all when left out.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, run nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job to its end.")] = False,
    require: Required = None,
) -> None:
    """Run a defense."""
    defense = {**_object(params), **_pairs(param), "method": method}
    known = {**_object(attack_file), **_pairs(attack)}
    evaluation: dict[str, Any] | None = {"dataset_id": test, "attack": known or None} if test else None
    if evaluation and triggered:
        evaluation["triggered"] = {"dataset_id": triggered, "target": target}
    if (known or triggered) and not test:
        raise typer.BadParameter("--attack and --triggered need --test: BA is measured on a clean test set")
    with output.client() as client:
        job = client.jobs.create(
            model=model, dataset=dataset, suspect_dataset=suspect, defense=defense, evaluation=evaluation, seed=seed, validate_only=dry_run
        )
        if dry_run or not (wait or require):
            output.show(job, ["object", "method", "kind", "request"] if dry_run else JOB)
            if not dry_run:
                say(f"follow it: unpoison jobs watch {job['id']}")
            return
        _follow(client, job["id"], None, require)


@jobs.command("ls")
def list_jobs(status: Annotated[str | None, typer.Option()] = None) -> None:
    """List jobs."""
    with output.client() as client:
        output.show(client.jobs.list(**({"status": status} if status else {})), ["id", "status", "method", "phase", "created_at"])


@jobs.command("show")
def show_job(job: Id) -> None:
    """Show a job."""
    with output.client() as client:
        output.show(client.jobs.get(job), [])


@jobs.command("watch")
def watch(job: Id, timeout: Annotated[float | None, typer.Option(help="Seconds.")] = None, require: Required = None) -> None:
    """Follow a job to its end; the exit code says how it ended."""
    with output.client() as client:
        _follow(client, job, timeout, require)


@jobs.command("wait")
def wait_for(
    job: Annotated[list[str], typer.Argument(metavar="ID...")],
    timeout: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    require: Required = None,
) -> None:
    """Wait for jobs; the exit code is the highest of theirs."""
    with output.client() as client:
        raise typer.Exit(max(_ended(client.jobs.wait(one, timeout=timeout), require) for one in job))


@jobs.command("logs")
def logs(job: Id, follow: Annotated[bool, typer.Option("-f", "--follow")] = False) -> None:
    """Print a job's events."""
    with output.client() as client:
        for event in client.jobs.stream(job) if follow else client.jobs.events(job):
            if output.as_json:
                print(json.dumps(event))
            else:
                say(f"{event['at']}  {event['type']:<9} {event['message']}", console=out)


@jobs.command("cancel")
def cancel(job: Id) -> None:
    """Stop a job."""
    with output.client() as client:
        output.show(client.jobs.cancel(job), ["id", "status"])


@jobs.command("retry")
def retry(job: Id) -> None:
    """Run a finished job again."""
    with output.client() as client:
        output.show(client.jobs.retry(job), ["id", "status"])


@jobs.command("rm")
def remove_job(job: Id) -> None:
    """Delete a finished job and its files."""
    with output.client() as client:
        client.jobs.delete(job)


# -- results -------------------------------------------------------------------------------------------------------


@artifacts.command("ls")
def list_artifacts(job: Id) -> None:
    """List what a job gave back."""
    with output.client() as client:
        output.show(client.jobs.artifacts(job), ["id", "kind", "filename", "bytes", "sha256"])


@artifacts.command("get")
def get_artifact(
    job: Id,
    kind: Annotated[str, typer.Option(help="cleaned_model, manifest, report_html, report_json, trigger or rejected_model.")] = "cleaned_model",
    to: Annotated[Path | None, typer.Option("-o", "--output")] = None,
) -> None:
    """Download a job's file, verified."""
    with output.client() as client:
        found = next((item for item in client.jobs.artifacts(job) if item["kind"] == kind), None)
        if found is None:
            raise typer.BadParameter(f"job {job} has no {kind}; see `unpoison artifacts ls {job}`")
        target = to or Path(Path(found["filename"]).name)
        with output.transfer(f"downloading {target.name}") as told:
            client.artifacts.download(found["id"], target, progress=told)
    print(target)


@app.command()
def audit() -> None:
    """Show who changed or took away what; needs a key with the scope admin."""
    with output.client() as client:
        output.show(client.audit.list(), ["created_at", "action", "subject", "status", "key_id", "address"])


@app.command()
def report(job: Id) -> None:
    """Print a job's report."""
    with output.client() as client:
        found = client.jobs.report(job)
    if output.as_json:
        print(json.dumps(found))
        return
    table = Table("", "before", "after")
    for name in ("ba", "ba_excluding_target", "asr", "asr_without_trigger", "pa"):
        cells = [_rate((found[when] or {}).get(name)) for when in ("before", "after")]
        if any(cells):
            table.add_row(name, *cells)
    what = found["recognised"]["architecture"] if found["recognised"] else f"{found['inputs']['suspect_images']} training images"
    measured = "" if found["kind"] == "cleanse" else f", {found['measured_on'] or 'nothing to measure on'}"
    say(f"{found['method']} on {what}{measured}", console=out)
    if table.rows:
        out.print(table)
    for verdict, why in _verdicts(found):
        say(f"{verdict}: {why}", console=out)
    if found.get("cleansing"):
        say(", ".join(f"{count} {name}" for name, count in found["cleansing"]["counts"].items()), console=out)
    for one in found.get("classes_lost", ()):
        say(f"class {one['class']} fell from {_rate(one['before'])} to {_rate(one['after'])}", console=out)


# -- shared --------------------------------------------------------------------------------------------------------


def _show_upload(found: Json, names: list[str]) -> None:
    """Print these fields of an upload and what was understood of it, or all of it as JSON. The tensors' names fill pages; --json has them."""
    if not (output.as_json or output.quiet):
        understood = {name: value for name, value in (found["description"] or {}).items() if name != "tensors"}
        found = {name: found[name] for name in names} | understood
    output.show(found, [])


def _verdicts(found: Json) -> list[tuple[str, str]]:
    """Return what a job's results or report say of the model that came out, of the training set, or of the model that was inspected, with the reason."""
    said = []
    if found.get("verdict"):
        said.append((found["verdict"]["verdict"], f"{'; '.join(found['verdict']['reasons'])}. {found['verdict']['advice']}".rstrip()))
    if found.get("cleansing"):
        cleansing, names = found["cleansing"], found.get("class_names")
        target = cleansing["target"] if cleansing["verdict"] == "poisoned" else None
        which = "" if target is None else f"class {target} ({names[target]})" if names else f"class {target}"
        # Reports of services before this one have no `missed`.
        said.append((cleansing["verdict"], ". ".join(filter(None, (which, cleansing["evidence"], cleansing.get("missed"))))))
    elif "verdict" in found["findings"]:
        said.append((found["findings"]["verdict"], found["findings"]["reason"]))
    return said


def _follow(client: Client, job_id: str, timeout: float | None, require: list[str] | None) -> None:
    try:
        with output.progress(TextColumn("{task.completed:.0f}/{task.total:.0f}")) as bars:
            bar = bars.add_task("queued", total=1)

            def seen(job: Json) -> None:
                progress = job["progress"]
                numbers = "  ".join(f"{name.upper()} {value:.1%}" for name, value in (progress or {}).get("metrics", {}).items())
                step, total = (progress["step"], progress["total"]) if progress else (0, 1)
                bars.update(bar, description=f"{job['status']} {job['phase'] or ''} {numbers}", completed=step, total=total)

            job = client.jobs.wait(job_id, timeout=timeout, seen=seen)
    except KeyboardInterrupt:
        say(f"detached; the job goes on. Follow it: unpoison jobs watch {job_id}   stop it: unpoison jobs cancel {job_id}")
        raise typer.Exit(EXIT_ERROR) from None
    raise typer.Exit(_ended(job, require))


def _ended(job: Json, require: list[str] | None) -> int:
    """Print how a job ended and what it says; return the exit code."""
    output.show(job, JOB)
    if job["error"]:
        say(f"{job['error']['code']}: {job['error']['detail']} {job['error']['advice']}")
    elif job["status"] == "succeeded":
        said = _verdicts(job["results"])
        for verdict, why in said:
            say(f"{verdict}: {why}")
        say(f"unpoison report {job['id']}")
        if job["cleaned_model_id"]:
            say(f"unpoison artifacts get {job['id']} -o clean.safetensors")
        if job["cleansed_dataset_id"]:
            say(f"unpoison artifacts get {job['id']} --kind manifest   unpoison datasets download {job['cleansed_dataset_id']} -o FILE")
        if require and not any(verdict in require for verdict, _ in said):
            return EXIT_VERDICT
    return EXIT[job["status"]]


def _object(file: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes()) if file else {}
    except ValueError as error:
        raise typer.BadParameter(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{file} holds no JSON object of parameters")
    return found


def _pairs(given: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in given or []:
        for part in pair.split():
            key, sign, value = part.partition("=")
            if not sign:
                raise typer.BadParameter(f"{part!r} is not KEY=VALUE")
            try:
                found[key] = json.loads(value)
            except ValueError:
                found[key] = value
    return found


def _bounds(part: Json) -> str:
    parts = [part, *part.get("anyOf", ())]
    names = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    words = [f"{sign} {piece[name]}" for piece in parts for name, sign in names.items() if name in piece]
    return ", ".join([*words, *("|".join(map(str, piece["enum"])) for piece in parts if "enum" in piece)])


def _rate(found: Json | None) -> str:
    if not found or found["value"] is None:
        return ""
    return f"{found['value']:.2%} ({found['hits']}/{found['n']})"


def main() -> None:
    """Run the command line; API errors are one sentence and exit code 1."""
    try:
        app()
    except WaitTimeout as error:
        say(str(error))
        sys.exit(EXIT_TIMEOUT)
    except UnpoisonError as error:
        say(str(error), style="red")
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
