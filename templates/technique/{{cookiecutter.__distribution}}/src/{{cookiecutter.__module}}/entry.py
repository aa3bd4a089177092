"""Tells the eke registry what this distribution provides. Imports only eke, so that asking costs nothing."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="{{ cookiecutter.__entry }}",
    kind="{{ cookiecutter.kind }}",
    factory="{{ cookiecutter.__module }}:{{ cookiecutter.class_name }}",
    paper="{{ cookiecutter.paper }}",
    does="{{ cookiecutter.summary }}",
{%- if cookiecutter.kind == "callback" %}
    effects=("changes gradients",),
    exactness="model-changing",
{%- elif cookiecutter.kind == "plugin" %}
    effects=("changes optimizer",),
    exactness="reordered sums",
{%- else %}
    effects=(),
    exactness="reordered sums",
{%- endif %}
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
