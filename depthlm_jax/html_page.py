"""What all pages share: one HTML file, light or dark, that opens without a server and asks no network for anything."""

import base64
from pathlib import Path

import jinja2

from depthlm_jax import files
from depthlm_jax.errors import InputError

STYLE = """
:root { --ink: #16181d; --grey: #666b75; --paper: #ffffff; --card: #f5f6f8; --line: #d5d8de; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e9eaee; --grey: #989ea9; --paper: #121317; --card: #1c1e24; --line: #363a43; --bad: #ff8a80; } }
:root { color-scheme: light dark; color: var(--ink); background: var(--paper); font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 90rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.45rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0; } p { margin: .3rem 0; } .grey { color: var(--grey); } .bad { color: var(--bad); }
h1, h2, h3, .plain, summary, pre { overflow-wrap: anywhere; } pre { white-space: pre-wrap; margin: .2rem 0 .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
summary { cursor: pointer; color: var(--grey); }
"""
BASE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""


def render(title: str, template: str, style: str, values: dict) -> str:
    """Returns a page.

    Args:
      title: of the window.
      template: in Jinja's language; extends "base" by its block `body`.
      style: beside what all pages share.
      values: that the template names; texts are escaped.
    """
    loader = jinja2.DictLoader({"base": BASE, "page": template})
    kinds = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return kinds.get_template("page").render(values | {"title": title, "style": STYLE + style})


def data_uri(kind: str, content: bytes) -> str:
    """Returns a picture as the address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def check_name(output: Path) -> None:
    """Raises InputError unless a page can be written there."""
    if output.suffix not in (".html", ".htm"):
        raise InputError(
            f"{output}: not the name of a page", found=output.suffix or "no ending",
            expected="a name that ends in .html", fix=f"give --output={output.with_suffix('.html')}",
        )  # fmt: skip
    files.make_writable(output.parent)
