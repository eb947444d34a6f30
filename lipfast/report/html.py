"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import json

from lipfast.report.bars import bars_figure
from lipfast.report.figures import svg_text
from lipfast.report.metrics import all_metrics
from lipfast.report.radar import radar_figure
from lipfast.report.results import Comparison
from lipfast.report.tables import failure_lines, table_cells


def html_report(comparison: Comparison) -> str:
    """Return a page with table, plots, definitions and configuration; it loads nothing."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lipfast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    head, rows = table_cells(comparison)
    recipes = comparison.config.get("recipes", {})
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        head=head,
        rows=list(zip(comparison.results, rows, strict=True)),
        failures=failure_lines(comparison),
        metrics=all_metrics(comparison),
        radar=_data_uri(svg_text(radar_figure(comparison))),
        bars=_data_uri(svg_text(bars_figure(comparison))),
        recipe_keys=sorted({key for recipe in recipes.values() for key in recipe}),
        recipes=recipes,
        config={
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in comparison.config.items()
            if key != "recipes"
        },
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
