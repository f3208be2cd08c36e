"""The commands that share a model, show it and describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_ddpm.commands.options import Json, Model
from hf_ddpm.commands.results import table_of_results
from hf_ddpm.image_size import format_size, to_size
from hf_ddpm.runtime.command_line import finish, option, report_errors, switch, table


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of any DDPMPipeline.")],
    repo_id: Annotated[str, typer.Argument(help="NAME in your namespace, or NAMESPACE/NAME; created if need be.")],
    public: Annotated[bool, switch("public", "Make a new repository public.")] = False,
    revision: Annotated[str, option("revision", "The branch, created if need be.")] = "main",
    averages: Annotated[bool, switch("averages", "Also push each average in RUN/ema as a branch.")] = False,
    message: Annotated[str | None, option("message", "The commit's. Default: the run's step and images.")] = None,
    json: Json = False,
) -> None:
    """Upload a model, its card and figures to the Hub.

    That is one commit, or none if nothing has changed.
    """
    with report_errors():
        from dataclasses import asdict

        from hf_ddpm.hub import upload

        pushed = upload.push(run, repo_id, public=public, revision=revision, message=message, averages=averages)
    if pushed.kept_readme:
        typer.echo(upload.KEPT_README, err=True)
    change = "was pushed" if pushed.is_new else "is the newest: nothing has changed"
    load = f'DDPMPipeline.from_pretrained("{pushed.repo_id}")'
    finish(json, asdict(pushed), f"{pushed.url}: commit {pushed.commit[:12]} {change}. Load the model with: {load}")


def demo(
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of http://127.0.0.1.")] = 7860,
    mcp_server: Annotated[bool, switch("mcp_server", "Serve what the page does to agents, too, as tools.")] = False,
) -> None:
    """Open a page that shows a model on this machine."""
    with report_errors():
        from hf_ddpm.hub.space import run_demo

        run_demo(model, port, mcp_server)


def space(
    model: Annotated[str, typer.Argument(help="The folder of a run whose model is on the Hub, or a Hub id.")],
    space_id: Annotated[str, typer.Argument(help="The Space: NAME or NAMESPACE/NAME.")],
    model_id: Annotated[
        str | None,
        typer.Option("--model_id", help="The model on the Hub. Default: as the run says."),
    ] = None,
    public: Annotated[bool, switch("public", "Create the Space public.")] = False,
    out: Annotated[Path | None, option("out", "Write the Space into this folder, and push nothing.")] = None,
    json: Json = False,
) -> None:
    """Make a Space of the page of `hf-ddpm demo`."""
    import tempfile

    with report_errors():
        from hf_ddpm.hub.space import model_id_of, push_space, write_space

        model_id = model_id_of(model, model_id)
        if out is not None:
            write_space(model, model_id, out)
            upload = f"hf upload --repo-type space {space_id} {out}"
            finish(json, {"out": str(out), "model_id": model_id}, f"{out} shows {model_id}. Upload it: {upload}")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_space(model, model_id, Path(folder))
            result = push_space(Path(folder), space_id, model_id, public)
    finish(json, {"url": result, "model_id": model_id}, result)


def info(
    model: Annotated[str | None, typer.Argument(help="A folder that holds a pipeline, or a Hub id.")] = None,
    json: Json = False,
) -> None:
    """Describe a model, or this machine.

    Of a model: its network, how far it was trained, what was measured. Without one: the versions for a bug report.
    """
    with report_errors():
        from hf_ddpm.hub.info import machine_info, model_info

        result = machine_info() if model is None else model_info(model)
    shown = {name: value for name, value in result.items() if name != "measured" and value is not None}
    if isinstance(shown.get("size"), list):
        shown["size"] = format_size(to_size(shown["size"]))
    lines = table([(name, ", ".join(value) if isinstance(value, list) else value) for name, value in shown.items()])
    if model is not None and result["measured"]:
        lines += ["", *table_of_results(result["measured"])]
    elif model is not None:
        lines.append(f"Nothing was measured yet: hf-ddpm evaluate {model}")
    finish(json, result, *lines)
