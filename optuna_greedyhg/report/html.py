"""HTML pages that need nothing else: no other file, no network, no server.

A page's content security policy makes the browser see to that, whatever plotly.js has in it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

import plotly.graph_objects as go

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_CONFIG = {"displayModeBar": False, "responsive": True}


def whole_page(title: str, intro: str, parts: Sequence[str], footer: str = "") -> str:
    """A page.

    Args:
        title: Heading, and title in the browser; plain text, as are the intro and the footer.
        intro: Paragraphs, separated by empty lines.
        parts: HTML, one below the other.
        footer: Small print.
    """
    paragraphs = [text.strip() for text in intro.split("\n\n") if text.strip()]
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(text)}</p>" for text in paragraphs), *parts]
    if footer:
        body.append(f"<footer>{html.escape(footer)}</footer>")
    return _SHELL.format(
        title=html.escape(title),
        policy=_POLICY,
        css=resources.files("optuna_greedyhg.report").joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join(body),
    )


def figure_html(name: str, figure: go.Figure, caption: str, *, with_plotly: bool = False) -> str:
    """The figure in HTML; the first one of a page brings plotly.js along. Without a name, plotly makes up one a run."""
    content = figure.to_html(
        full_html=False,
        include_plotlyjs=with_plotly,
        config=_CONFIG,
        default_height=f"{figure.layout.height}px",
        div_id=name,
    )
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
{body}
</body>
</html>
"""
