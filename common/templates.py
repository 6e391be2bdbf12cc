"""Jinja2 templates of a package: what is put into HTML is escaped, a name that is not there is an error."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def templates_beside(module_file: str) -> Environment:
    """The templates in the folder `templates` beside a module (`__file__`). Markdown (`.md`) is not escaped."""
    return Environment(
        loader=FileSystemLoader(Path(module_file).with_name("templates")),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
