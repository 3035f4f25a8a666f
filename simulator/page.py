"""Reports as single HTML pages that ask nothing of a network and run no script."""

import base64
from dataclasses import dataclass

import jinja2


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot with its file's name, without a folder."""

    name: str
    title: str
    png: bytes

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


def page(template: str, **values: object) -> str:
    """The page that a template of this package makes of some values."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simulator", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
