"""Commands of pipeline."""

import typer

app = typer.Typer()
