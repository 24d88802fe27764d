"""Commands of data_prep."""

import typer

app = typer.Typer()
